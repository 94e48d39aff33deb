"""A page that shows adaptive decoding behind vLLM: one prompt, two completions side by side.

    python -m autodeco_fast.demo.serve        what `make serve` runs, in an environment with vLLM

__main__.py     starts both servers, and stops them
engine.py       vLLM with SmolLM2 and its head, a process
completions.py  what the page may ask for, and vLLM's stream joined with the log of temperatures
page_server.py  HTTP between the page and vLLM
page/           the page itself
"""
