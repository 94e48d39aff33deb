"""`AutoDecoModelForCausalLM.save_pretrained`: a draft beside the files, then each is put in its
place, the configuration last."""

import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

from autodeco_fast.autodeco import layout, tensor_files
from autodeco_fast.autodeco.config import AutoDecoConfig
from autodeco_fast.autodeco.convert import elements, index_of
from autodeco_fast.autodeco.folder import OF_BASE, read_folder, read_optional
from autodeco_fast.autodeco.layout import BASE_PREFIX, CONFIG_NAME, INDEX_NAME, WEIGHTS_NAME
from autodeco_fast.autodeco.own_heads import Heads
from autodeco_fast.autodeco.tensor_files import TensorFile
from autodeco_fast.causal_lm import embedding_width
from autodeco_fast.checkpoint import check_finite
from autodeco_fast.files import atomic_write, put

if TYPE_CHECKING:
    from autodeco_fast.autodeco.model import AutoDecoModelForCausalLM


_DTYPES = {  # as safetensors names them
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}
_OF_WEIGHTS = (INDEX_NAME, *OF_BASE)
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")


def save(
    model: "AutoDecoModelForCausalLM",
    folder: str,
    *,
    heads_only: bool,
    state_dict: Mapping[str, torch.Tensor] | None,
    max_shard_size: int | str,
) -> None:
    """See `AutoDecoModelForCausalLM.save_pretrained`."""
    name = model.config.base_model_name_or_path
    if heads_only and not name:
        raise ValueError(
            "heads alone need the name of their base model: set config.base_model_name_or_path, or "
            "pass heads_only=False"
        )
    if not heads_only and model._dequantized:
        raise ValueError(  # transformers would write dequantised weights under quantised names
            "the base model was dequantised when it was loaded, so it cannot be saved: join its "
            "files and the heads with `autodeco-fast merge`"
        )
    if os.path.lexists(folder) and not os.path.isdir(folder):
        raise ValueError(f"save_directory must be a folder, got {folder!r}, which is a file")
    target = Path(folder)
    if heads_only:
        _refuse_a_base(target, name)
    width = embedding_width(model.llm)
    heads = Heads(model.temp_head, model.top_p_head)
    heads.check(width)
    config = AutoDecoConfig.of(model.llm.config, name, hidden_size=width, **heads.flags())
    tensors = _heads(model.state_dict() if state_dict is None else state_dict)
    found = {each: (_DTYPES.get(t.dtype, str(t.dtype)), t.shape) for each, t in tensors.items()}
    layout.check_heads(config.to_dict(), found, f"the heads for {folder!r}")
    check_finite(tensors, f"the heads for {folder!r}")
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target, prefix=".draft-") as made:
        draft = Path(made)
        metadata = {"format": "pt"}
        atomic_write(draft / WEIGHTS_NAME, lambda path: save_file(tensors, path, metadata=metadata))
        model.generation_config.save_pretrained(draft)
        if not heads_only:
            _join_base(model, draft, max_shard_size)
        (draft / CONFIG_NAME).write_text(config.to_json_string())
        _put(draft, target)


def _refuse_a_base(target: Path, base: str) -> None:
    """That heads alone take no base model's place.

    Raises:
        ValueError: if the folder holds weights that are no head's, another model's configuration,
            or is where the named base model lies.
    """
    if not target.is_dir():
        return
    config = read_optional(target, CONFIG_NAME) or {}
    files = [path for path in sorted(target.iterdir()) if _WEIGHTS.fullmatch(path.name)]
    names = (name for path in files for name in tensor_files.read(path).tensors)
    is_own = os.path.isdir(base) and os.path.samefile(base, target)
    is_plain = config.get("model_type") not in (None, layout.MODEL_TYPE)
    if is_own or is_plain or not all(map(layout.is_head, names)):
        raise ValueError(
            f"save_directory {str(target)!r} holds a base model, whose place heads alone would "
            "take: name another folder, or pass heads_only=False"
        )


def _heads(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The heads of a state dict, as they are saved."""
    tensors = {name: tensor for name, tensor in state.items() if layout.is_head(name)}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _join_base(model: "AutoDecoModelForCausalLM", draft: Path, max_shard_size: int | str) -> None:
    """Saves the base as its own class does, and writes its files again with `llm.` before every
    name; the heads, which lie in the draft, go into the last of them."""
    heads = tensor_files.read((draft / WEIGHTS_NAME).rename(draft / "heads"))
    model.llm.save_pretrained(draft / "base", max_shard_size=max_shard_size)
    base = read_folder(str(draft / "base"), "base")
    files = {
        name: file.renamed(lambda tensor: BASE_PREFIX + tensor) for name, file in base.files.items()
    }
    last = max(files)
    joined = {**files[last].tensors, **heads.tensors}
    files[last] = TensorFile(joined, files[last].metadata)
    for name, file in files.items():
        tensor_files.write(draft / name, file, lambda size: None)
        (draft / "base" / name).unlink()  # so that there is never a whole base too many
    if base.index is not None:
        index = index_of(files, base.index, more=elements(heads.tensors))
        (draft / INDEX_NAME).write_text(index)
    shutil.rmtree(draft / "base")
    (draft / "heads").unlink()


def _put(draft: Path, target: Path) -> None:
    """Moves the draft's files, and removes those of an earlier checkpoint that would contradict
    them."""
    new = {path.name for path in draft.iterdir()}
    stale = [
        path
        for path in target.iterdir()
        if path.name not in new and (path.name in _OF_WEIGHTS or _WEIGHTS.fullmatch(path.name))
    ]
    put(draft, target, stale=stale, last=CONFIG_NAME)
