"""Checkpoints of the original AutoDeco system (arXiv 2510.26697), in and out.

layout.py       names, keys and shapes of the released format
folder.py       a checkpoint's folder as it lies on disk or on the hub
tensor_files.py safetensors files renamed and joined without decoding a tensor
convert.py      construct, merge and split
own_heads.py    heads between that format and this library's folders
config.py       AutoDecoConfig
model.py        AutoDecoModelForCausalLM; loading.py and saving.py are its from_pretrained and
                save_pretrained, losses.py its losses

Files are read and written without transformers; the classes are imported on first use, and from
then on `AutoConfig` and `AutoModelForCausalLM` know such checkpoints.
"""

_CLASSES = ("AutoDecoConfig", "AutoDecoModelForCausalLM", "AutoDecoOutput")
__all__ = list(_CLASSES)


def __getattr__(name: str):
    if name not in _CLASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from autodeco_fast.autodeco import model

    return getattr(model, name)
