"""`AutoDecoModelForCausalLM.save_pretrained`: a draft beside the files, then each is put in its
place, the configuration last."""

import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

from autodeco_fast.autodeco import layout, tensor_files
from autodeco_fast.autodeco.config import AutoDecoConfig
from autodeco_fast.autodeco.convert import elements, index_of
from autodeco_fast.autodeco.folder import BASE_CONFIG_NAME, BASE_INDEX_NAME, read_folder
from autodeco_fast.autodeco.layout import BASE_PREFIX, CONFIG_NAME, INDEX_NAME, WEIGHTS_NAME
from autodeco_fast.autodeco.tensor_files import TensorFile
from autodeco_fast.checkpoint import check_finite
from autodeco_fast.files import atomic_write

if TYPE_CHECKING:
    from autodeco_fast.autodeco.model import AutoDecoModelForCausalLM


_OF_WEIGHTS = (INDEX_NAME, BASE_CONFIG_NAME, BASE_INDEX_NAME)
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
    heads = _heads(model.state_dict() if state_dict is None else state_dict)
    check_finite(heads, f"the heads for {folder!r}")
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target, prefix=".draft-") as made:
        draft = Path(made)
        metadata = {"format": "pt"}
        atomic_write(draft / WEIGHTS_NAME, lambda path: save_file(heads, path, metadata=metadata))
        model.generation_config.save_pretrained(draft)
        if not heads_only:
            _join_base(model, draft, max_shard_size)
        config = AutoDecoConfig.of(model.llm.config, name, **model.config.added())
        (draft / CONFIG_NAME).write_text(config.to_json_string())
        _put(draft, target)


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


def _put(draft: Path, target: Path) -> None:
    """Moves the draft's files, and removes those of an earlier checkpoint that would contradict
    them."""
    new = {path.name for path in draft.iterdir() if path.is_file() and path.name != "heads"}
    (target / CONFIG_NAME).unlink(missing_ok=True)  # what lies there is no checkpoint meanwhile
    for path in target.iterdir():
        stale = path.name in _OF_WEIGHTS or _WEIGHTS.fullmatch(path.name)
        if stale and path.name not in new:
            path.unlink()
    for name in sorted(new, key=lambda name: name == CONFIG_NAME):
        os.replace(draft / name, target / name)
