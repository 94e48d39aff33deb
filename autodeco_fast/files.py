"""Writing: files that are whole or not there, in folders that one run at a time holds."""

import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from tempfile import TemporaryDirectory

from autodeco_fast.urls import Location, Url

LOCK = ".lock"
_PROBE = 1 << 20  # bytes that must fit before a run begins


def atomic_write(path: Location, write: Callable[[Path], object]) -> None:
    """Calls `write` with a temporary path, in the same folder but for a URL, then renames it to
    `path`, or uploads it."""
    if isinstance(path, Url):
        with TemporaryDirectory() as folder:
            draft = Path(folder) / path.name
            write(draft)
            path.upload(draft)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        draft.touch()
        mode = draft.stat().st_mode  # by the umask; safetensors puts a private file in its place
        write(draft)
        draft.chmod(mode)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def write_text(path: Location, text: str) -> None:
    """Writes UTF-8 text atomically; bytes of a file name that are no text are written escaped."""
    data = text.encode("utf-8", "backslashreplace")
    atomic_write(path, lambda draft: draft.write_bytes(data))


def put(draft: Path, folder: Path, *, stale: Iterable[Path] = (), last: str) -> None:
    """Moves a draft's files to a folder, the one that makes a whole of them last.

    What lay there under that name is gone before the others are replaced, so that files of two
    writes never pass for one.

    Args:
        draft: a folder of files on the same file system.
        stale: files that are removed meanwhile.
        last: the name of that file.
    """
    (folder / last).unlink(missing_ok=True)
    for path in stale:
        path.unlink()
    for path in sorted(draft.iterdir(), key=lambda path: path.name == last):
        os.replace(path, folder / path.name)


def append_text(path: Path, text: str) -> None:
    """Appends UTF-8 text, all of it or nothing."""
    with path.open("ab", buffering=0) as file:
        before, data = file.tell(), text.encode("utf-8")
        try:
            while data:
                data = data[file.write(data) :]
        except OSError:
            with suppress(OSError):  # what was wrong first is what is told
                file.truncate(before)
            raise


@contextmanager
def output_folder(folder: Location, name: str = "output") -> Iterator[None]:
    """Holds a folder for one run, until the end of the block or of the process.

    The folder is made if it is missing, and removed again if nothing was written into it. Only one
    process of a run should call this. At a URL nothing can be held: it is asked whether it can be
    reached.

    Args:
        name: of the setting, for complaints.

    Raises:
        ValueError: if it is no folder, cannot be written, has no room, or another run holds it.
    """
    if isinstance(folder, Url):
        folder.check(name)
        yield
        return
    _refuse_url(folder, name)
    missing = []
    try:
        with _refused(folder, name):
            missing = [path for path in (folder, *folder.parents) if not path.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            lock = _take(folder)
        try:
            yield
        finally:
            (folder / LOCK).unlink(missing_ok=True)
            lock.close()
    finally:
        for path in missing:
            with suppress(OSError):  # not there, or something was written into it
                path.rmdir()


def _refuse_url(folder: Path, name: str) -> None:
    """A Path made of a URL has lost one of its slashes and would be a folder named `s3:`."""
    if str(folder).partition("/")[0].endswith(":"):
        raise ValueError(f"{name} must be a folder of this machine, got {str(folder)!r}, a URL")


@contextmanager
def new_folder(folder: Path, name: str = "output", *, size: int = 0) -> Iterator[Path]:
    """Yields a draft folder that becomes `folder` at the end of the block; an exception leaves
    nothing of it.

    What a run that was killed left of its draft is thrown away by the next one.

    Args:
        name: of the setting, for complaints.
        size: bytes that will be written.

    Raises:
        ValueError: if `folder` holds something, is a URL, cannot be made, another run makes it, or
            the disk has less room than `size`.
    """
    _refuse_url(folder, name)
    given, folder = str(folder), Path(os.path.abspath(folder))
    taken = f"{name} must name a new folder, got {given!r}"
    if os.path.lexists(folder) and not _is_empty(folder):
        raise ValueError(f"{taken}, which is there already")
    draft = folder.with_name(f".{folder.name}.draft")
    if draft.is_symlink():
        raise ValueError(f"{name} {given!r} cannot be written: {draft} is a link")
    with output_folder(draft, name):
        try:
            _clear(draft)
            free = shutil.disk_usage(draft).free
            if size > free:
                raise ValueError(
                    f"{name} {given!r} takes {size / 1e9:.3g} GB, the disk has {free / 1e9:.3g} GB"
                )
            yield draft
            try:
                draft.rename(folder)
            except OSError as error:
                raise ValueError(f"{taken}: {error}") from None
        except BaseException:
            _clear(draft)
            raise
        (folder / LOCK).unlink()


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir())


def _clear(folder: Path) -> None:
    """Removes what is in a folder, but for its lock."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


@contextmanager
def _refused(folder: Path, name: str) -> Iterator[None]:
    """What the file system says of a folder, as a complaint about a setting."""
    given = str(folder)
    try:
        yield
    except BlockingIOError:
        raise ValueError(f"{name} {given!r} is being written by another run") from None
    except FileExistsError:
        raise ValueError(f"{name} must be a folder, got {given!r}, which is a file") from None
    except OSError as error:
        raise ValueError(f"{name} {given!r} cannot be written: {error}") from None


def _take(folder: Path) -> FileIO:
    """The folder's lock file, locked; a megabyte was written into it on the way.

    Raises:
        OSError: from the file system; BlockingIOError if another process holds the lock.
    """
    path = folder / LOCK
    while True:
        file = path.open("ab", buffering=0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
                _probe(file, path)
                return file
        except OSError:
            file.close()
            raise
        file.close()  # its holder removed it just now: the name is another file's, or nobody's


def _probe(file: FileIO, path: Path) -> None:
    """Writes a megabyte and takes it back."""
    try:
        if file.write(bytes(_PROBE)) < _PROBE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(file.fileno())
        file.truncate(0)
    except OSError:
        path.unlink()
        raise
