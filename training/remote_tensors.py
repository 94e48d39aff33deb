"""Safetensors files at URLs, of which only what is asked for is downloaded.

Training reads a scan's shards, or slices of them, in another order every epoch. It downloads them
as it needs them and keeps none: each of W processes that train for E epochs downloads all the
scan's bytes E times, W·E times together, and takes no disk. A copy on every machine's disk would be
downloaded once, but the scans that need shared storage are those that no such disk holds; for the
others `simplecache::` before a URL is fsspec's copy.
"""

import math
from dataclasses import dataclass

import torch

from autodeco_fast.autodeco import tensor_files
from autodeco_fast.urls import Url

_HEADER = 1 << 13  # bytes that are asked for at once: a shard's header has about 1,100
_DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32, "I32": torch.int32}


@dataclass(frozen=True)
class _Slices:
    """A tensor in a file, of which slices along the first dimension are downloaded."""

    stored: tensor_files.Stored

    def get_dtype(self) -> str:
        return self.stored.dtype

    def get_shape(self) -> list[int]:
        return list(self.stored.shape)

    def __getitem__(self, index: slice) -> torch.Tensor:
        dtype, (n, *row) = _DTYPES[self.stored.dtype], self.stored.shape
        start, stop, _ = index.indices(n)
        width = dtype.itemsize * math.prod(row)
        first = self.stored.start
        data = self.stored.path.read_range(first + start * width, first + stop * width)
        if not data:
            return torch.empty(0, *row, dtype=dtype)
        return torch.frombuffer(bytearray(data), dtype=dtype).view(-1, *row)


class RemoteTensors:
    """A file at a URL, with as much of `safetensors.safe_open` as scans need. Opening it reads the
    header.

    Raises:
        ValueError: if there is no such file, or its size is not what its header says.
    """

    def __init__(self, url: Url):
        size, start = url.size(), tensor_files.LENGTH.size
        head = url.read_range(0, min(size, _HEADER))
        (length,) = tensor_files.LENGTH.unpack_from(head)
        begin = start + length  # of the tensors
        if len(head) < begin <= size:
            head = url.read_range(0, begin)
        self._file = tensor_files.parsed(url, head[start:begin])
        if begin + self._file.size != size:
            raise ValueError(f"it has {size} bytes, by its header {begin + self._file.size}")

    def __enter__(self) -> "RemoteTensors":
        return self

    def __exit__(self, *_) -> None:
        pass

    def metadata(self) -> dict[str, str] | None:
        return self._file.metadata

    def get_slice(self, name: str) -> _Slices:
        return _Slices(self._file.tensors[name])
