"""AutoDeco checkpoints made, joined with their base model and taken apart again, on disk.

Tensors are moved byte for byte (`tensor_files.py`); only the heads, a few megabytes, are looked at.
Every function writes one new folder, whole or not at all, and refuses one that is there. Splitting
what `merge` wrote gives its two folders back, byte for byte where safetensors wrote the files.
"""

import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from autodeco_fast.autodeco import layout
from autodeco_fast.autodeco.folder import (
    BASE_CONFIG_NAME,
    BASE_GENERATION_NAME,
    BASE_INDEX_NAME,
    GENERATION_CONFIG_NAME,
    Content,
    ModelFolder,
    Progress,
    inside,
    read_folder,
    read_optional,
    write_folder,
)
from autodeco_fast.autodeco.layout import BASE_PREFIX, CONFIG_NAME, INDEX_NAME, WEIGHTS_NAME
from autodeco_fast.autodeco.own_heads import Heads, heads_of, new_heads, read_heads
from autodeco_fast.autodeco.tensor_files import Stored, TensorFile
from autodeco_fast.checkpoint import check_finite
from autodeco_fast.files import atomic_write, new_folder

PARTS = ("base", "autodeco", "head")

# A checkpoint's configuration lost these, which other programs look for in the base's.
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
}


def construct(
    base: str,
    output: Path,
    *,
    head: str | None = None,
    top_p_head: str | None = None,
    seed: int = 0,
) -> None:
    """Makes a heads-only checkpoint for a base model, of which no weights are read.

    Args:
        base: folder or hub id of the base model.
        output: the new folder.
        head: folder or hub id of a `TemperatureHead`.
        top_p_head: folder or hub id of a `TopPHead`. Heads that are given are the ones that are
            used; if none is, both are made anew.
        seed: of new heads.

    Raises:
        ValueError: for a base without a width, or a head that is none of it or has no place in the
            format.
    """
    plain = read_folder(base, "base", weights=False)
    width = layout.width_of(plain.config.get)
    if width is None:  # under another name
        from autodeco_fast.autodeco.config import written_width

        width = written_width(plain.config)
    new = head is None and top_p_head is None
    heads = new_heads(width, seed) if new else read_heads(head, top_p_head, width=width)
    config = layout.flatten(
        plain.config,
        base_model_name_or_path=os.path.abspath(base) if Path(base).is_dir() else base,
        hidden_size=width,
        **heads.flags(),
    )
    files = {CONFIG_NAME: _text(config), **plain.carried()}
    with new_folder(output) as draft:
        tensors, metadata = heads.tensors(), {"format": "pt"}
        atomic_write(draft / WEIGHTS_NAME, lambda path: save_file(tensors, path, metadata))
        write_folder(draft, files)


def merge(base: str, heads: str, output: Path, *, progress: Progress | None = None) -> None:
    """Joins a base model and a heads-only checkpoint into one folder that needs neither.

    Memory: a block of bytes, and the heads.

    Args:
        base: folder or hub id of the base model, in one safetensors file or several.
        heads: folder or hub id of the checkpoint.
        output: the new folder.
        progress: called with the bytes of tensors that are written so far, and of all.

    Raises:
        ValueError: for a base that the heads were not made for, heads that do not fit their
            configuration, or files that are broken or leave their folder.
    """
    plain, given = read_folder(base, "base"), read_folder(heads, "heads")
    config = checked_config(given)
    head_tensors(given)
    if layout.is_merged(given.tensors):
        raise ValueError(f"heads {heads!r} holds a base model too: split it first")
    layout.check_base(config, plain.config, f"base {base!r}")
    if "auto_map" in plain.config:
        warnings.warn(f"base {base!r} has code of its own, which is not copied", stacklevel=2)
    contents = [file.renamed(lambda name: BASE_PREFIX + name) for file in plain.files.values()]
    contents.append(_heads_of(given))
    weights = {_numbered(i, len(contents)): content for i, content in enumerate(contents, 1)}
    files = {
        **weights,
        INDEX_NAME: index_of(weights, plain.index, more=elements(given.tensors)),
        CONFIG_NAME: inside(given.folder, CONFIG_NAME),
        BASE_CONFIG_NAME: inside(plain.folder, CONFIG_NAME),
        **_carried(plain, given),
    }
    if not layout.knows_its_base(config):
        files[CONFIG_NAME] = _text({**config, "base_model_type": plain.config.get("model_type")})
    if plain.index is not None:
        files[BASE_INDEX_NAME] = inside(plain.folder, INDEX_NAME)
    with new_folder(output, size=_size(files)) as draft:
        write_folder(draft, files, progress)


def split(
    checkpoint: str,
    output: Path,
    *,
    parts: Sequence[str] = (),
    progress: Progress | None = None,
) -> None:
    """Takes a checkpoint apart, into folders of these names below the new one:

    - `base`: the base model, as it was before `merge`;
    - `autodeco`: the heads-only checkpoint;
    - `head`: the heads that are used, in this library's format, as `autodeco-fast train` leaves
      them: a `TemperatureHead`, and a `TopPHead` in `top_p_head` within it.

    Args:
        checkpoint: folder or hub id; of a heads-only one there is `head` alone.
        output: the new folder.
        parts: those to write, by default all that there are.
        progress: called with the bytes of tensors that are written so far, and of all.

    Raises:
        ValueError: for a part that there is not, or a checkpoint as `merge` refuses it.
    """
    full = read_folder(checkpoint, "checkpoint")
    config = checked_config(full)
    tensors = head_tensors(full)
    there = PARTS if layout.is_merged(full.tensors) else ("head",)
    unknown = [part for part in parts if part not in there]
    if unknown:
        raise ValueError(f"part must be one of {', '.join(there)}, got {', '.join(unknown)}")
    parts = parts or there
    heads = heads_of(config, tensors) if "head" in parts else None
    files: dict[str, Content] = {}
    for name, made in (("base", _base_folder), ("autodeco", _heads_folder)):
        if name in parts:
            content = {**full.carried(), **made(full, config)}
            files |= {f"{name}/{file}": each for file, each in content.items() if each is not None}
    with new_folder(output, size=_size(files)) as draft:
        write_folder(draft, files, progress)
        if heads is not None:
            heads.save(draft / "head")


def load_heads(checkpoint: str) -> Heads:
    """The heads that a checkpoint uses, in fp32.

    Of a merged one no file is fetched or read that an index says is the base model's alone.

    Args:
        checkpoint: folder or hub id.

    Raises:
        ValueError: if it is none, or its heads do not fit its configuration.
    """
    given = read_folder(checkpoint, "checkpoint", wanted=layout.is_head)
    config = checked_config(given)
    return heads_of(config, head_tensors(given))


def checked_config(given: ModelFolder) -> dict:
    """The configuration of a checkpoint whose heads fit it.

    Raises:
        ValueError: as `layout.check_config` and `layout.check_heads`.
    """
    config = layout.check_config(given.config, str(given.folder / CONFIG_NAME))
    found = {name: (stored.dtype, stored.shape) for name, stored in given.tensors.items()}
    layout.check_heads(config, found, str(given.folder))
    return config


def head_tensors(given: ModelFolder) -> dict[str, torch.Tensor]:
    """The heads themselves.

    Raises:
        ValueError: if there is none, or one is not finite.
    """
    tensors = {}
    for file in given.files.values():
        for name, stored in file.only(layout.is_head).tensors.items():
            with safe_open(stored.path, "pt") as opened:
                tensors[name] = opened.get_tensor(name)
    if not tensors:
        raise ValueError(f"{str(given.folder)!r} has no tensors of heads")
    check_finite(tensors, str(given.folder))
    return tensors


def _base_folder(full: ModelFolder, config: Mapping) -> dict[str, Content | None]:
    """The base model's files out of a merged checkpoint's, but for those that are carried; None for
    one of these that is not the base's."""
    parts = [file.only(layout.is_base) for file in full.files.values()]
    bare = [part.renamed(lambda name: name.removeprefix(BASE_PREFIX)) for part in parts]
    bare = [part for part in bare if part.tensors]
    files: dict[str, Content] = {CONFIG_NAME: _base_config(full, config)}
    index = read_optional(full.folder, BASE_INDEX_NAME)
    if index is not None:
        where = str(full.folder / BASE_INDEX_NAME)
        weights = _arranged(bare, layout.check_index(index, where), where)
        files[INDEX_NAME] = inside(full.folder, BASE_INDEX_NAME)
    elif len(bare) == 1:
        weights = {WEIGHTS_NAME: bare[0]}
    else:
        weights = {_numbered(i, len(bare)): part for i, part in enumerate(bare, 1)}
        heads = {name: t for name, t in full.tensors.items() if layout.is_head(name)}
        files[INDEX_NAME] = index_of(weights, full.index, more=-elements(heads))
    return {**weights, **files, **_base_generation(full)}


def _carried(plain: ModelFolder, given: ModelFolder) -> dict[str, Content]:
    """What goes along with a merged checkpoint: the base's files, but for the generation
    configuration of heads that have one of their own."""
    files: dict[str, Content] = {**plain.carried()}
    own, before = given.carried().get(GENERATION_CONFIG_NAME), files.get(GENERATION_CONFIG_NAME)
    if own is not None and (before is None or own.read_bytes() != before.read_bytes()):
        files |= {GENERATION_CONFIG_NAME: own, BASE_GENERATION_NAME: before or ""}
    return files


def _base_generation(full: ModelFolder) -> dict[str, Content | None]:
    """The base's generation configuration, where `merge` kept it apart; None if it has none."""
    if not (full.folder / BASE_GENERATION_NAME).exists():
        return {}
    kept = inside(full.folder, BASE_GENERATION_NAME)
    return {GENERATION_CONFIG_NAME: kept if kept.stat().st_size else None}


def _base_config(full: ModelFolder, config: Mapping) -> Content:
    """The base's own configuration, where `merge` kept it; else what the checkpoint's says."""
    kept = read_optional(full.folder, BASE_CONFIG_NAME)
    if kept is not None:
        layout.check_base(config, kept, str(full.folder / BASE_CONFIG_NAME))
        return inside(full.folder, BASE_CONFIG_NAME)
    base = layout.base_config(config)
    architecture = _ARCHITECTURES.get(base["model_type"])
    if architecture is None:
        warnings.warn(
            f"the base's architectures are not known: add them to its {CONFIG_NAME}", stacklevel=3
        )
        return _text(base)
    return _text({**base, "architectures": [architecture]})


def _heads_folder(full: ModelFolder, config: Mapping) -> dict[str, Content]:
    """A heads-only checkpoint's files out of a merged one's, but for those that are carried."""
    return {WEIGHTS_NAME: _heads_of(full), CONFIG_NAME: inside(full.folder, CONFIG_NAME)}


def _heads_of(given: ModelFolder) -> TensorFile:
    """The heads as one file."""
    files = [file.only(layout.is_head) for file in given.files.values()]
    files = [file for file in files if file.tensors]
    tensors = {name: stored for file in files for name, stored in file.tensors.items()}
    return TensorFile(tensors, files[0].metadata)


def _arranged(
    files: Sequence[TensorFile], weight_map: Mapping[str, str], where: str
) -> dict[str, TensorFile]:
    """Tensors in the files that an index names, in the order in which they lie.

    Raises:
        ValueError: if the index is of other tensors.
    """
    found = {name for file in files for name in file.tensors}
    if found != set(weight_map):
        odd = min(found ^ set(weight_map))
        raise ValueError(f"{where} and the checkpoint's tensors differ in {odd!r}")
    arranged: dict[str, dict[str, Stored]] = {}
    metadata = {}
    for file in files:
        for name, stored in file.tensors.items():
            arranged.setdefault(weight_map[name], {})[name] = stored
            metadata.setdefault(weight_map[name], file.metadata)
    return {name: TensorFile(tensors, metadata[name]) for name, tensors in arranged.items()}


def _numbered(i: int, total: int) -> str:
    return f"model-{i:05d}-of-{total:05d}.safetensors"


def index_of(files: Mapping[str, TensorFile], before: Mapping | None, *, more: int) -> str:
    """The text of an index.

    Args:
        before: the index of what was converted, whose metadata stays but for the totals.
        more: elements that the files have more than there were.
    """
    metadata = before.get("metadata") if before else None
    metadata = dict(metadata) if isinstance(metadata, Mapping) else {}
    metadata["total_size"] = sum(file.size for file in files.values())
    if isinstance(metadata.get("total_parameters"), int):
        metadata["total_parameters"] += more
    weight_map = {name: file for file, content in files.items() for name in content.tensors}
    return _text({"metadata": metadata, "weight_map": weight_map})


def elements(tensors: Mapping[str, Stored]) -> int:
    return sum(math.prod(stored.shape) for stored in tensors.values())


def _text(value: Mapping) -> str:
    return json.dumps(value, indent=2, sort_keys=True) + "\n"


def _size(files: Mapping[str, Content]) -> int:
    """Bytes of what will be written, nearly."""
    sizes = {TensorFile: lambda x: x.size, str: len}
    return sum(sizes.get(type(each), lambda x: x.stat().st_size)(each) for each in files.values())
