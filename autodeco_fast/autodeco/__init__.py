"""Checkpoints of the original AutoDeco system (arXiv 2510.26697), in and out.

layout.py       names, keys and shapes of the released format
folder.py       a checkpoint's folder as it lies on disk or on the hub
tensor_files.py safetensors files renamed and joined without decoding a tensor
convert.py      construct, merge and split
own_heads.py    heads between that format and this library's folders
config.py       AutoDecoConfig
model.py        AutoDecoModelForCausalLM
loading.py      its from_pretrained
saving.py       its save_pretrained

Importing this package makes `AutoConfig` and `AutoModelForCausalLM` know such checkpoints.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from autodeco_fast.autodeco.config import AutoDecoConfig
from autodeco_fast.autodeco.layout import MODEL_TYPE
from autodeco_fast.autodeco.model import AutoDecoModelForCausalLM, AutoDecoOutput

AutoConfig.register(MODEL_TYPE, AutoDecoConfig, exist_ok=True)
for _auto in (AutoModel, AutoModelForCausalLM):
    _auto.register(AutoDecoConfig, AutoDecoModelForCausalLM, exist_ok=True)

__all__ = ["AutoDecoConfig", "AutoDecoModelForCausalLM", "AutoDecoOutput"]
