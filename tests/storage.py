"""Storage in memory that can be watched and can refuse, under the URLs own://…"""

import threading

import fsspec
from fsspec.core import url_to_fs
from fsspec.implementations.memory import MemoryFileSystem


def stored(url: str) -> dict[str, bytes]:
    """Name → bytes of each file of a folder; none if there is no folder."""
    storage, folder = url_to_fs(url)
    try:
        paths = storage.ls(folder, detail=False)
    except FileNotFoundError:
        return {}
    return {path.rpartition("/")[2]: storage.cat_file(path) for path in paths}


def new_storage(*bases: type) -> type:
    """An empty one, which own:// stands for from now on; like object stores without renames, unless
    a base brings them."""

    class Storage(*bases, MemoryFileSystem):
        store, pseudo_dirs = {}, [""]
        downloaded = 0  # bytes
        refused: tuple[str, ...] = ()  # names of methods, without the credentials they need
        put, threads = [], set()  # names under which files were uploaded; who downloaded

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return MemoryFileSystem._strip_protocol(path.removeprefix("own://"))

        def _asked(self, method: str) -> None:
            if method in self.refused:
                raise PermissionError("Access Denied")

        def info(self, path, **options):
            self._asked("info")
            return super().info(path, **options)

        def cat_file(self, path, version=None, start=None, end=None):  # in the order of s3fs
            self._asked("cat_file")
            data = super().cat_file(path, start=start, end=end)
            type(self).downloaded += len(data)
            self.threads.add(threading.get_ident())
            return data

        def get_file(self, path, file, **options):  # what fsspec's caches call
            type(self).downloaded += self.info(path)["size"]
            super().get_file(path, file, **options)

        def put_file(self, file, path, **options):
            self._asked("put_file")
            self.put.append(path.rpartition("/")[2])
            super().put_file(file, path, **options)

    fsspec.register_implementation("own", Storage, clobber=True)
    return Storage


class Renames:
    """Of a file system."""

    def mv(self, old: str, new: str) -> None:
        self.store[new] = self.store.pop(old)


class Refuses:
    """Of one that does not rename onto a file."""

    def mv(self, old: str, new: str) -> None:
        if new in self.store:
            raise FileExistsError(new)
        self.store[new] = self.store.pop(old)
