"""The plugin that vLLM starts in every one of its processes: front end, engine and workers."""


def register() -> None:
    """Wraps vLLM's model loaders, once a process. Heads are attached where models are loaded."""
    from autodeco_fast.serving import vllm_loading

    vllm_loading.install()
