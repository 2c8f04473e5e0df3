"""A folder that a run writes to is its own: a second run into it is refused, by a lock that a killed process loses."""

from __future__ import annotations

import errno
import fcntl
import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from utils import distributed

LOCK = ".lock"
READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


def _open_lock(path: Path) -> int | None:
    """Descriptor of the locked file; None where another process holds it. The holder removes the file when it is done,
    so what was opened may be gone by the time it is locked: then once more."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        with suppress(FileNotFoundError):
            if os.fstat(descriptor).st_ino == path.stat().st_ino:
                return descriptor
        os.close(descriptor)


@contextmanager
def exclusive(folder: Path, flag: str, remedy: str = "name another folder") -> Iterator[None]:
    """No other run writes to the folder meanwhile; it is made where it is missing, and not left behind empty.

    Raises ValueError where another process holds it, or nothing can be written there.
    """
    new = [one for one in (folder, *folder.parents) if not one.exists()]
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
            for one in new:
                one.rmdir()


def exclusive_folder(name: str, instead: str | None = None) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """Decorator of a script's main(args): the folder that it writes to is held while it runs.

    That is what the flag --`name` gives, which is made where it is missing, or if it gives none what --`instead` gives,
    which main is to refuse where it is missing. Of several processes the first one holds it for all.
    """

    def decorate(main: Callable[[Any], None]) -> Callable[[Any], None]:
        @functools.wraps(main)
        def alone(args: Any) -> None:
            folder, flag = getattr(args, name), name
            if folder is None and instead is not None and getattr(args, instead).is_dir():
                folder, flag = getattr(args, instead), instead
            if folder is None or not distributed.is_main():
                return main(args)
            with exclusive(folder, f"--{flag}", f"name one by --{name}"):
                return main(args)

        return alone

    return decorate
