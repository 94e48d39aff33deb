"""A model's folder as it lies on disk or on the hub: configuration, weights, and what goes along.

Only names and headers are read. A path that leaves the folder is refused, a link too; those of the
hub's cache lead from `snapshots/…` to `blobs/…` and stay within it.
"""

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from autodeco_fast.autodeco import tensor_files
from autodeco_fast.autodeco.layout import CONFIG_NAME, INDEX_NAME, WEIGHTS_NAME, check_index
from autodeco_fast.autodeco.tensor_files import Stored, TensorFile
from autodeco_fast.checkpoint import CONFIG_NAME as HEAD_CONFIG_NAME
from autodeco_fast.checkpoint import fetch
from autodeco_fast.errors import read_json_object

_TEMPLATES, GENERATION_CONFIG_NAME = "additional_chat_templates", "generation_config.json"
# What a tokenizer, `generate` and a licence need; text all of it, no pickle and no code.
CARRIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "*.tiktoken",
    "chat_template.jinja",
    "chat_template.json",
    f"{_TEMPLATES}/*.jinja",
    GENERATION_CONFIG_NAME,
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "NOTICE",
    "NOTICE.txt",
    "USE_POLICY.md",
)
# In a merged folder: the base's own configuration and index, so that it can be had back as it was;
# and its generation configuration where the heads have another, empty if it has none.
BASE_CONFIG_NAME, BASE_INDEX_NAME = "base_config.json", "base_index.json"
BASE_GENERATION_NAME = "base_generation_config.json"
OF_BASE = (BASE_CONFIG_NAME, BASE_INDEX_NAME, BASE_GENERATION_NAME)

Content = TensorFile | str | Path  # of a file to write: tensors, a text, or a copy of a file
Progress = Callable[[int, int], object]


@dataclass(frozen=True)
class ModelFolder:
    """What lies in a folder."""

    folder: Path
    config: dict
    index: dict | None  # None where one file holds all weights
    files: Mapping[str, TensorFile]  # by name, in the order of names; empty if not asked for

    @property
    def tensors(self) -> dict[str, Stored]:
        """Of all files."""
        return {name: t for file in self.files.values() for name, t in file.tensors.items()}

    def carried(self) -> dict[str, Content]:
        """The files that go along with the weights.

        Raises:
            ValueError: for a link that leaves the folder or leads nowhere.
        """
        names = os.listdir(self.folder)
        if (self.folder / _TEMPLATES).is_dir():
            names += [f"{_TEMPLATES}/{name}" for name in os.listdir(self.folder / _TEMPLATES)]
        found = [name for name in sorted(names) if any(fnmatchcase(name, p) for p in CARRIED)]
        return {name: inside(self.folder, name) for name in found}


def read_folder(
    name: str,
    what: str,
    *,
    weights: bool = True,
    wanted: Callable[[str], bool] = lambda tensor: True,
    **hub: object,
) -> ModelFolder:
    """Reads a local folder, or an id on the Hugging Face hub, which is downloaded.

    As in transformers, `model.safetensors` wins over an index of other files.

    Args:
        what: the setting, for complaints.
        weights: whether to look at the weights, too.
        wanted: of the files that an index lists, those that hold such a tensor are looked at.
        hub: as of `fetch`.

    Raises:
        ValueError: if there is none, its configuration or index is no JSON object, or weights are
            missing, no safetensors, or others than the index says.
    """
    extra = (CONFIG_NAME, INDEX_NAME, *OF_BASE)
    folder = fetch(name, what, (*extra, *CARRIED), **hub)
    if (folder / HEAD_CONFIG_NAME).exists() and not (folder / CONFIG_NAME).exists():
        raise ValueError(f"{what} {name!r} is a head folder: `construct` makes a checkpoint of it")
    config = read_json_object(inside(folder, CONFIG_NAME))
    if not weights:
        return ModelFolder(folder, config, None, {})
    index = read_optional(folder, INDEX_NAME)
    where = str(folder / INDEX_NAME)
    weight_map = {} if index is None else check_index(index, where)
    listed = set(weight_map.values())
    names = {file for tensor, file in weight_map.items() if wanted(tensor)}
    if str(folder) != name:
        folder = fetch(name, what, (*extra, *CARRIED, WEIGHTS_NAME, *names), **hub)
    if (folder / WEIGHTS_NAME).exists() and listed != {WEIGHTS_NAME}:
        index = None
    if index is None and not (folder / WEIGHTS_NAME).exists():
        raise ValueError(
            f"{what} {name!r} has neither {WEIGHTS_NAME} nor {INDEX_NAME}; other formats, pickle "
            "above all, are not read"
        )
    names = names if index is not None else {WEIGHTS_NAME}
    files = {file: tensor_files.read(inside(folder, file)) for file in sorted(names)}
    if index is not None:
        _check_against_index(index["weight_map"], files, where)
    return ModelFolder(folder, config, index, files)


def inside(folder: Path, name: str) -> Path:
    """The path of a file in a folder.

    Raises:
        ValueError: if it is no file, or a link that leaves the folder.
    """
    path, root = folder / name, Path(os.path.realpath(folder))
    if root.parent.name == "snapshots":  # the hub's cache
        root = root.parent.parent
    target = Path(os.path.realpath(path))
    if not target.is_relative_to(root):
        raise ValueError(f"{path} is a link that leaves its folder")
    if not target.is_file():
        raise ValueError(f"{str(folder)!r} has no file {name}")
    return path


def read_optional(folder: Path, name: str) -> dict | None:
    """The JSON object in a file of a folder; None if there is no such file.

    Raises:
        ValueError: as `inside` and `read_json_object`.
    """
    return read_json_object(inside(folder, name)) if os.path.lexists(folder / name) else None


def _check_against_index(
    weight_map: Mapping[str, str], files: Mapping[str, TensorFile], where: str
) -> None:
    """Raises ValueError if files hold other tensors than the index says. It may list more files."""
    for name, file in weight_map.items():
        if file in files and name not in files[file].tensors:
            raise ValueError(f"{where}: {name!r} is not in {file}")
    for file, content in files.items():
        for name in content.tensors:
            if weight_map.get(name) != file:
                raise ValueError(f"{where}: does not know {name!r} of {file}")


def write_folder(
    folder: Path, files: Mapping[str, Content], progress: Progress | None = None
) -> None:
    """Writes files of these names and contents.

    Args:
        folder: a new one, which is there.
        progress: called with the bytes of tensors that are written so far, and of all.
    """
    total, done = sum(each.size for each in files.values() if isinstance(each, TensorFile)), 0

    def wrote(size: int) -> None:
        nonlocal done
        done += size
        if progress is not None:
            progress(done, total)

    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, TensorFile):
            tensor_files.write(path, content, wrote)
        elif isinstance(content, str):
            path.write_text(content)
        else:
            shutil.copyfile(content, path)
