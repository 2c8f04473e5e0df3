"""Arrays with a row per spot: in memory up to a budget (--memory), beyond it in files that vanish with the process."""

from __future__ import annotations

import errno
import math
import os
import tempfile
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import DTypeLike


class ArrayStore:
    """Gives out empty arrays until `gib` GiB are used up, from then on memory-mapped ones of unnamed files in `folder`.

    The system writes their pages out and drops them when it needs the memory, so a set of spots of any size fits.
    """

    def __init__(self, gib: float, folder: Path):
        self.left, self.folder = int(gib * 2**30), folder

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
        """Raises OSError where the disk has no room: a mapped file that is full would kill the process later."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if size <= self.left:
            self.left -= size
            return np.empty(shape, dtype)
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=self.folder) as file:
            try:
                _reserve(file, size)
            except OSError as error:
                needed = f"expected {size / 2**30:.1f} GiB of disk for what is beyond --memory, found too little"
                raise OSError(f"{self.folder}: {needed} ({error.strerror}); make room, or raise --memory") from error
            return np.memmap(file, dtype, "r+", shape=shape)


def _reserve(file: IO[bytes], size: int) -> None:
    """Give an empty file its size, and the disk its room. Raises OSError where there is none.

    macOS has no posix_fallocate, some file systems do not know it: there zeros are written.
    """
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file.fileno(), 0, size)
            return
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                raise
    zeros = bytes(2**20)
    for start in range(0, size, len(zeros)):
        file.write(zeros[: size - start])
    file.flush()
