"""A folder that one run writes to at a time: a second run is refused, by a lock that a killed process loses."""

from __future__ import annotations

import errno
import fcntl
import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from utils import distributed

LOCK = ".lock"
Settings = TypeVar("Settings")
READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
HELD = (errno.EAGAIN, errno.EACCES)  # of flock; the second where NFS makes a lock of bytes of it
# of flock where a file system has no locks: Lustre mounted without -o flock, NFS without its lock service, some of FUSE
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)
_warned: set[int] = set()  # file systems, by their device number


def _warn_once(device: int, folder: Path, error: OSError) -> None:
    """One line for all folders of a file system without locks."""
    if device not in _warned:
        print(
            f"warning: {folder}: expected a file system with locks (flock), found none ({error.strerror}): a second "
            "run that writes there would not be refused; fix: start one at a time",
            flush=True,
        )
    _warned.add(device)


def _open_lock(path: Path) -> int | None:
    """Descriptor of the locked file; None where another process holds it. The holder removes the file when it is done,
    so what was opened may be gone by the time it is locked: then once more. Where the file system has no locks, a
    warning is printed and the file is only open."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in NO_LOCKS:
                _warn_once(os.fstat(descriptor).st_dev, path.parent, error)
                return descriptor
            os.close(descriptor)
            if error.errno in HELD:
                return None
            raise
        with suppress(FileNotFoundError):
            if os.fstat(descriptor).st_ino == path.stat().st_ino:
                return descriptor
        os.close(descriptor)


@contextmanager
def exclusive(folder: Path, flag: str, remedy: str = "name another folder") -> Iterator[None]:
    """Lock a folder against other runs; it is made where it is missing, and removed again if it stays empty.

    Raises ValueError where another process holds it, or nothing can be written there.
    """
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _open_lock(folder / LOCK)
    except OSError as error:
        if error.errno not in READ_ONLY:
            raise
        raise ValueError(
            f"{flag}: expected a folder that can be written to, found {folder} ({error.strerror}); fix: {remedy}"
        ) from error
    if descriptor is None:
        raise ValueError(
            f"{flag}: expected a folder of this run's own, found another run writing to {folder}; wait for it, or "
            "choose another"
        )
    try:
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)
        os.close(descriptor)
        with suppress(OSError):  # not empty: it has what was written
            for path in new:
                path.rmdir()


def exclusive_folder(
    name: str, instead: str | None = None
) -> Callable[[Callable[[Settings], None]], Callable[[Settings], None]]:
    """Decorator of a script's main(settings): the folder that it writes to is locked while it runs.

    Of several processes the first one locks it for all.

    Parameters
    ----------
    name : flag of the folder, which is made where it is missing
    instead : flag of the folder to lock where --`name` is not given; main refuses it where it is missing
    """

    def decorate(main: Callable[[Settings], None]) -> Callable[[Settings], None]:
        @functools.wraps(main)
        def alone(settings: Settings) -> None:
            folder, flag = getattr(settings, name), name
            if folder is None and instead is not None and getattr(settings, instead).is_dir():
                folder, flag = getattr(settings, instead), instead
            if folder is None or not distributed.is_main():
                return main(settings)
            with exclusive(folder, f"--{flag}", f"name one by --{name}"):
                return main(settings)

        return alone

    return decorate
