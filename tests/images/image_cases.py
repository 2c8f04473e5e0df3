"""The cases of image files, CASES: name of a case -> Case, and what the modules that add cases share.

A writer takes a path and the pixels (h, w, 3) uint8, and gives what must be read of them where that is not the pixels
themselves.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

HEIGHT, WIDTH = 160, 192
EXACT, LOSSY = 0, 3  # of 255
TILED, WHOLE_TILES = {"tile": (64, 80)}, {"tile": (32, 64)}  # JPEG blurs the padding of tiles that are cut off
NAMES = {"axes": "CYX", "Channel": {"Name": ["Red", "Green", "Blue"]}}


@dataclass(frozen=True)
class Case:
    """A file: its name, how it is written, and how far its pixels may be off or what its refusal holds.

    `row` is the first cell of the line of docs/images.md that it belongs to; `notes` what one of the notes must hold.
    """

    row: str
    file: str
    write: Callable[[Path, np.ndarray], Any]
    within: int = EXACT
    refused: str = ""
    notes: str = ""
    um_per_px: float | None = None


CASES: dict[str, Case] = {}


def coded() -> np.ndarray:
    """Smooth, different in every channel, no symmetry, and bright as glass in places: (h, w, 3) uint8."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    ramps = [250 - 0.9 * x, 60 + y, 120 + 0.4 * x + 0.3 * y]
    return np.stack(ramps, -1).round().astype(np.uint8)


def add(row: str, name: str, file: str, write: Callable, **how: Any) -> None:
    assert name not in CASES, name
    CASES[name] = Case(row, file, write, **how)


def tiff(path: Path, pixels: np.ndarray, **how: Any) -> None:
    how = {"photometric": "rgb", "metadata": None} | how
    tifffile.imwrite(path, pixels, **copy.deepcopy(how))  # it writes into the arguments of a codec


def planes(path: Path, pixels: np.ndarray, **how: Any) -> None:
    """Channels as planes (3, h, w)."""
    tiff(path, np.moveaxis(pixels, -1, 0), **how)


def tag(code: int, value: Any, kind: int = 3, count: int = 1) -> dict[str, Any]:
    return {"extratags": [(code, kind, count, value, True)]}


def wrapped(write: Callable, change: Callable) -> Callable:
    """A writer of changed pixels, of which the unchanged ones are expected."""

    def write_changed(path: Path, pixels: np.ndarray) -> None:
        write(path, change(pixels))

    return write_changed


def grey(pixels: np.ndarray) -> np.ndarray:
    return pixels[..., 0]


def expect_grey(write: Callable) -> Callable:
    def write_grey(path: Path, pixels: np.ndarray) -> np.ndarray:
        write(path, grey(pixels))
        return np.repeat(grey(pixels)[..., None], 3, -1)

    return write_grey
