"""Tensors of safetensors files moved to other files under other names, none of them decoded.

A safetensors file is 8 bytes (the header's length n, little-endian), n bytes of JSON (each tensor's
dtype, shape and place in the buffer) and the buffer. So a tensor is renamed by writing another
header, and its bytes are copied a block at a time: memory does not depend on any tensor's size.
The order of tensors is kept, so that a file renamed and renamed back has the same bytes.
"""

import json
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from safetensors import safe_open

from autodeco_fast.errors import foreign
from autodeco_fast.urls import Location

BLOCK = 1 << 22  # bytes in memory at a time
LENGTH = struct.Struct("<Q")  # of the header
_METADATA = "__metadata__"
_ALIGNMENT = 8  # of the buffer, as safetensors pads its headers


class Stored(NamedTuple):
    """A tensor as it lies in a file."""

    path: Location
    dtype: str  # as safetensors names it
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the file
    size: int  # bytes


@dataclass(frozen=True)
class TensorFile:
    """The tensors of a file that is there or will be, in their order, and its metadata."""

    tensors: Mapping[str, Stored]
    metadata: Mapping[str, str] | None

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.size for tensor in self.tensors.values())

    def only(self, keep: Callable[[str], bool]) -> "TensorFile":
        """With some of the tensors."""
        tensors = {name: stored for name, stored in self.tensors.items() if keep(name)}
        return TensorFile(tensors, self.metadata)

    def renamed(self, rename: Callable[[str], str]) -> "TensorFile":
        """With other names."""
        tensors = {rename(name): stored for name, stored in self.tensors.items()}
        return TensorFile(tensors, self.metadata)


def read(path: Path) -> TensorFile:
    """What a file holds, from its header alone.

    Raises:
        ValueError: if it is not a whole safetensors file.
    """
    # safetensors checks the header: every tensor's bytes are there, none overlap, none is left out.
    with foreign(f"{path} is not a safetensors file"), safe_open(path, "numpy") as checked:
        names = set(checked.keys())
    with path.open("rb") as file:
        (length,) = LENGTH.unpack(file.read(LENGTH.size))
        found = parsed(path, file.read(length))
    if set(found.tensors) != names or LENGTH.size + length + found.size != path.stat().st_size:
        raise ValueError(f"{path} is not a safetensors file: its header is ambiguous")
    return found


def parsed(path: Location, header: bytes) -> TensorFile:
    """What a file holds, by its header, which is not checked."""
    entries = json.loads(header)
    metadata = entries.pop(_METADATA, None)
    found = {}
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        start, end = entry["data_offsets"]
        place = {"start": LENGTH.size + len(header) + start, "size": end - start}
        found[name] = Stored(path, entry["dtype"], tuple(entry["shape"]), **place)
    return TensorFile(found, metadata)


def write(path: Path, content: TensorFile, wrote: Callable[[int], object]) -> None:
    """Makes a file of tensors that lie in others.

    Args:
        path: of no file yet.
        wrote: called with the number of bytes of every block.

    Raises:
        ValueError: if a file that is copied from became shorter since it was read.
        OSError: from the file system.
    """
    header: dict = {} if content.metadata is None else {_METADATA: dict(content.metadata)}
    end = 0
    for name, stored in content.tensors.items():
        start, end = end, end + stored.size
        shape = list(stored.shape)
        header[name] = {"dtype": stored.dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("xb") as out:
        out.write(LENGTH.pack(len(text)) + text)
        for source, start, size in _runs(content):
            _copy(source, start, size, out, wrote)


def _runs(content: TensorFile) -> Iterator[tuple[Path, int, int]]:
    """Tensors that lie one after another in the same file, as one place and size."""
    path, start, size = None, 0, 0
    for stored in content.tensors.values():
        if path == stored.path and start + size == stored.start:
            size += stored.size
            continue
        if path is not None:
            yield path, start, size
        path, start, size = stored.path, stored.start, stored.size
    if path is not None:
        yield path, start, size


def _copy(
    source: Path, start: int, size: int, out: BinaryIO, wrote: Callable[[int], object]
) -> None:
    with source.open("rb", buffering=0) as file:
        file.seek(start)
        while size:
            block = file.read(min(size, BLOCK))
            if not block:
                raise ValueError(f"{source} became shorter while it was copied")
            out.write(block)
            size -= len(block)
            wrote(len(block))
