"""Files on storage that fsspec knows, by URL: s3://bucket/scan, gs://…, hf://…, memory://…

fsspec comes with torch; what speaks to a certain storage (s3fs, gcsfs) is the user's to install.
"""

import posixpath
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TypeVar
from uuid import uuid4

from autodeco_fast.errors import foreign

_PASSWORD = re.compile(r"(?<!\bzip)(?<!\btar)://[^/@:]*:[^/]*@")  # member:name@… is none
_AT_ONCE = 16  # requests to storage that answers many: each is mostly waited for
_Found = TypeVar("_Found")


class Unreachable(ValueError):
    """The storage of a URL refused something, or nothing is installed that speaks to it."""


class Url(str):
    """The URL of a file or a folder.

    It has what is used here of `pathlib.Path`, under the same names. A Path itself would make one
    slash of two.

    Raises:
        Unreachable: from every method that asks the storage; it names the URL.
        FileNotFoundError: from `size`.
        EOFError: from `read_range`.
    """

    _folder: "Url | None" = None

    def __reduce__(self):
        return Url, (str(self),)  # copied without what it is connected to

    def __truediv__(self, name: str) -> "Url":
        file = Url(posixpath.join(self, name))
        file._folder = self
        return file

    @property
    def name(self) -> str:
        return posixpath.basename(self.rstrip("/"))

    @cached_property
    def _place(self) -> tuple:
        """The file system, one for all files of a folder and all threads, and the path in it."""
        if self._folder is not None:
            storage, folder = self._folder._place
            return storage, posixpath.join(folder, self.name)
        from fsspec.core import url_to_fs

        return url_to_fs(str(self))

    def _now(self) -> tuple:
        """`_place`; what the file system remembers of folders that others write is forgotten."""
        self._place[0].invalidate_cache()
        return self._place

    def _info(self) -> dict | None:
        """None if there is nothing. fsspec's `exists` would say so of refused credentials too."""
        storage, path = self._now()
        try:
            return storage.info(path)
        except FileNotFoundError:
            return None

    def check(self, name: str) -> None:
        """Asks the storage something.

        Args:
            name: of the setting, for complaints.

        Raises:
            Unreachable: naming it.
        """
        with foreign(f"{name} {str(self)!r} cannot be reached", Unreachable):
            self._info()

    def exists(self) -> bool:
        with foreign(f"cannot read {self}", Unreachable):
            return self._info() is not None

    def is_file(self) -> bool:
        with foreign(f"cannot read {self}", Unreachable):
            return (self._info() or {}).get("type") == "file"

    def size(self) -> int:
        """Of a file, in bytes."""
        with foreign(f"cannot read {self}", Unreachable):
            info = self._info()
        if info is None:
            raise FileNotFoundError(f"there is no {self}")
        return info["size"]

    def read_bytes(self) -> bytes:
        return self.read_range(None, None)

    def read_range(self, start: int | None, end: int | None) -> bytes:
        """The bytes from `start` until before `end`, which must be there."""
        if start is not None and start == end:
            return b""  # as a range of HTTP it could not be said
        with foreign(f"cannot read {self}", Unreachable):
            storage, path = self._now()
            data = storage.cat_file(path, start=start, end=end)  # s3fs has them elsewhere
        if start is not None and len(data) != end - start:
            raise EOFError(f"{len(data)} bytes of {end - start} are there")
        return data

    def unlink(self, missing_ok: bool = False) -> None:
        with foreign(f"cannot remove {self}", Unreachable):
            storage, path = self._now()
            try:
                storage.rm_file(path)
            except FileNotFoundError:
                if not missing_ok:
                    raise

    def upload(self, file: Path) -> None:
        """Puts a local file there, whole or not at all, in place of one that is there.

        An object store shows an object once it is whole, and keeps the one before until then.
        Where files are seen while they are written, they can be renamed: there it is written beside
        its place, and the old one is removed before the new one is moved, since some do not rename
        onto a file.
        """
        with foreign(f"cannot write {self}", Unreachable):
            (storage, path), draft, before = self._now(), None, None
            if _renames(storage):
                folder, name = posixpath.split(path)
                draft = posixpath.join(folder, f".{name}.{uuid4().hex}.tmp")
                storage.makedirs(folder, exist_ok=True)
            else:
                before = self._info()
            try:
                storage.put_file(str(file), draft or path)
                if draft:
                    with suppress(FileNotFoundError):
                        storage.rm_file(path)
                    storage.mv(draft, path)
            except BaseException:
                with suppress(Exception):  # not there, or refused like what was refused
                    # Some storage ends a file that a broken loop writes.
                    if draft or self._info() != before:
                        storage.rm_file(draft or path)
                raise

    @property
    def answers_many(self) -> bool:
        """Whether the storage is asked from several threads for the sake of speed."""
        return self._place[0].async_impl


Location = Path | Url


def location(given: str | Path) -> Location:
    """A path of this machine, or what a text with :// in it is the URL of.

    Raises:
        ValueError: for a URL with a password, which would be written wherever a scan is named.
    """
    if not isinstance(given, str) or "://" not in given:
        return Path(given)
    if _PASSWORD.search(given):
        raise ValueError(
            f"a URL must hold no password, got one in {_PASSWORD.sub('://…@', given)!r}: give it "
            "in fsspec's configuration"
        )
    return Url(given)


def _renames(storage) -> bool:
    """Whether it renames files, instead of copying and removing them."""
    from fsspec import AbstractFileSystem

    return type(storage).mv is not AbstractFileSystem.mv


def of_each(
    read: Callable[..., _Found], files: Iterable[Location], *others: Iterable
) -> Iterator[_Found]:
    """`map(read, files, *others)`; from storage that answers many requests at once, files are read
    many at a time."""
    jobs = zip(files, *others)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        while some := list(islice(jobs, 8 * _AT_ONCE)):
            first = some[0][0]
            together = pool.map if isinstance(first, Url) and first.answers_many else map
            yield from together(read, *zip(*some))
