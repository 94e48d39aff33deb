"""Tests of `autodeco_fast.serving` against a real vLLM, in an environment of its own.

    make test-vllm

Every engine is a process of its own (`engine.py`); the tests hold what it returned against a
forward of transformers with the head in fp64 (`reference.py`).
"""
