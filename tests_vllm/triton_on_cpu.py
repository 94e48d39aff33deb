"""vLLM's Triton kernels on a CPU, in Triton's interpreter: its V2 runner, ten tokens a second.

PyPI's triton has no CPU backend, so vLLM would fall back to its V1 runner and to kernels in C++,
whose n-gram decoding is wrong for sampled requests, with and without a head; a dummy stands for it.
"""

import os
from types import SimpleNamespace


def install(runner: str) -> None:
    """Must come before vLLM is imported.

    Args:
        runner: v1 or v2.
    """
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # inductor would ask the dummy for a target
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = str(int(runner == "v2"))
    import numpy as np
    from triton.backends import backends
    from triton.runtime import interpreter

    driver = SimpleNamespace(is_active=lambda: True)
    backends["cpu"] = SimpleNamespace(driver=driver, compiler=None)
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def truth(mask):
        return interpreter.TensorHandle(mask.data.astype(np.bool_), mask.dtype)

    def masked_load(self, ptrs, mask, *rest):
        return load(self, ptrs, truth(mask), *rest)

    def masked_store(self, ptrs, value, mask, *rest):
        return store(self, ptrs, value, truth(mask), *rest)

    builder.create_masked_load, builder.create_masked_store = masked_load, masked_store
