"""Writes checkpoint files so that a kill at any moment leaves the previous file or the new file, never a torn file.

Lightning's writer composes the file in the system's temporary folder and, if that is another file system than the
target's, copies it: a kill during the copy leaves a torn file.

A file under way is called ``.diloco-<machine>-<random>.part``: short, whatever the target's name, and nothing that
Lightning looks for in a folder. Its writer holds a lock on it, which ends with the process however that ends, so that
the next save can tell the leftovers of killed processes from files that are being written.
"""

import errno
import hashlib
import os
import platform
import secrets
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch
from fsspec.core import url_to_fs  # type: ignore[import-untyped]
from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped]
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from typing_extensions import override

try:
    import fcntl
except ImportError:  # Windows, where a file that is open can't be removed anyway
    fcntl = None  # type: ignore[assignment]

_OLD = 3600.0  # seconds without a write after which a file under way is a leftover, where locks don't tell
_UNSUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM, errno.EACCES, errno.EBADF}


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a temporary file beside the target, flushes it to the disk, and renames it over the target.

    Remote paths (``s3://…``) are left to Lightning: their file systems commit at the end.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        file_system, local_path = url_to_fs(os.fsdecode(path))  # a TypeError for file objects, as from Lightning
        if storage_options is not None or not isinstance(file_system, LocalFileSystem):
            super().save_checkpoint(checkpoint, path, storage_options=storage_options)
            return
        target = Path(local_path)
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target.parent)
        with _temporary(target) as (file, temporary):
            torch.save(checkpoint, file)  # type: ignore[arg-type] # which only writes
            file.flush()
            _sync(file.fileno())
            os.replace(temporary, target)
        _sync_folder(target.parent)


class _Written:
    """A file that remembers why a write failed: torch's writer raises another error over it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()

    def fileno(self) -> int:
        return self._file.fileno()


@contextmanager
def _temporary(target: Path) -> Iterator[tuple[_Written, Path]]:
    """A new file beside ``target``, which is gone afterwards if it was not renamed.

    Raises:
        OSError: names the target and why it can't be written: the disk is full, a quota is exceeded, …
    """
    path: Path | None = None
    file: _Written | None = None
    try:
        path, descriptor = _create(target.parent)
        with os.fdopen(descriptor, "wb") as raw:
            file = _Written(raw)
            yield file, path
    except BaseException as error:
        if path is not None:
            path.unlink(missing_ok=True)
        cause = file.error if isinstance(error, Exception) and file is not None and file.error is not None else error
        if isinstance(cause, OSError) and cause.errno is not None and _is_under_way(cause.filename):
            raise OSError(cause.errno, cause.strerror, str(target)) from error
        raise


def _is_under_way(filename: Any) -> bool:
    """Whether an error with this file name is about the temporary file, created or not."""
    return filename is None or os.path.basename(os.fsdecode(filename)).startswith(_prefix())


def _create(folder: Path) -> tuple[Path, int]:
    """A file under way, locked; the permissions are the umask's, as for any new file."""
    while True:
        path = folder / f"{_prefix()}{secrets.token_hex(6)}.part"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        _lock(descriptor)
        if path.exists():
            return path, descriptor
        os.close(descriptor)  # another process has found it before it was locked, and removed it


def _remove_leftovers(folder: Path) -> None:
    """Removes the files that killed processes have left; an error here must not prevent the save."""
    with suppress(OSError):
        for entry in os.scandir(folder):
            if entry.name.startswith(".diloco-") and entry.name.endswith(".part"):
                with suppress(OSError):
                    _remove_leftover(entry)


def _remove_leftover(entry: os.DirEntry[str]) -> None:
    """Removes a file that no process writes.

    On the writer's machine the lock tells. From another machine it doesn't on every file system; there a file without
    a write for an hour counts as a leftover.

    Raises:
        OSError: it is locked, or locks don't exist here.
    """
    old = time.time() - entry.stat().st_mtime > _OLD
    if old or fcntl is None:  # on Windows the attempt tells
        os.unlink(entry.path)
    elif entry.name.startswith(_prefix()):
        descriptor = os.open(entry.path, os.O_RDWR)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(entry.path)  # still locked: its writer may be about to lock it
        finally:
            os.close(descriptor)


def _lock(descriptor: int) -> None:
    if fcntl is not None:
        with suppress(OSError):  # not every file system has locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)


def _prefix() -> str:
    machine = hashlib.blake2b(platform.node().encode(), digest_size=4).hexdigest()
    return f".diloco-{machine}-"


def _sync(descriptor: int) -> None:
    """Flushes to the disk, so that the data survive a crash of the machine, on file systems that can."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise


def _sync_folder(folder: Path) -> None:
    """The same for the rename, where folders can be opened (not on Windows)."""
    if hasattr(os, "O_DIRECTORY"):
        try:
            descriptor = os.open(folder, os.O_DIRECTORY)
        except OSError:
            return  # a folder that can be written to but not read
        try:
            _sync(descriptor)
        finally:
            os.close(descriptor)


def is_truncated(io: CheckpointIO, path: Any) -> bool:
    """Whether a file that ``io`` could not read is cut off, or no file of torch's at all.

    Private because the wrapper's base class, by which Lightning recognises it, has no public name.
    """
    while isinstance(io, _WrappingCheckpointIO) and io.checkpoint_io is not None:
        io = io.checkpoint_io
    file_system, local_path = url_to_fs(str(path))
    if not (isinstance(io, TorchCheckpointIO) and isinstance(file_system, LocalFileSystem)):
        return False  # unknown formats and places
    if not os.path.isfile(local_path):
        return False
    with open(local_path, "rb") as file:
        legacy = file.read(1) == b"\x80"  # torch's format before zip files
    return not legacy and not zipfile.is_zipfile(local_path)
