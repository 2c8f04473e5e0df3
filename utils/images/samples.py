"""What the stored samples of a pixel mean, and how they become 8-bit RGB on white.

Letters: h, w rows and columns, C samples of a pixel as they are stored, n colours.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from utils.images.checks import ImageError

DEPTHS = (8, 10, 12, 14, 16)  # bits that cameras have


@dataclass(frozen=True)
class Samples:
    """The samples of a pixel.

    Attributes
    ----------
    kind : "grey", "inverted" (grey, zero is white), "palette", "rgb" or "cmyk" (inverted too: zero is white)
    colours : places of the colours among the C samples
    alpha : place of the opacity, None without
    premultiplied : whether the colours are multiplied by the opacity already
    bits : per sample, as stored; fewer than 8 are scaled up
    depth, alpha_depth : bits that colours and opacity really have, where more than 8 are stored
    palette : (N, 3) uint8, of the kind "palette"
    """

    kind: str
    colours: tuple[int, ...]
    alpha: int | None = None
    premultiplied: bool = False
    bits: int = 8
    depth: int = 8
    alpha_depth: int = 8
    palette: np.ndarray | None = None

    @property
    def is_colour(self) -> bool:
        return self.kind in ("rgb", "cmyk", "palette")

    @property
    def needs_depth(self) -> bool:
        return self.bits > 8 and self.kind != "palette"

    def to_rgb(self, stored: np.ndarray) -> np.ndarray:
        """(h, w, C) -> (h, w, 3) uint8; transparent parts become white."""
        rgb = self._colours(stored)
        if self.alpha is None:
            return rgb
        alpha = _to_8_bits(stored[..., self.alpha : self.alpha + 1], self.bits, self.alpha_depth)
        return on_white(rgb, alpha, self.premultiplied)

    def colours_of(self, stored: np.ndarray) -> np.ndarray:
        """(h, w, C) -> (h, w, n); not copied where the colours lie in their order."""
        first, end = self.colours[0], self.colours[0] + len(self.colours)
        return stored[..., first:end] if self.colours == tuple(range(first, end)) else stored[..., list(self.colours)]

    def _colours(self, stored: np.ndarray) -> np.ndarray:
        if self.palette is not None:
            return np.take(self.palette, stored[..., self.colours[0]], axis=0)  # of 1 bit, bool would be a mask
        values = _to_8_bits(self.colours_of(stored), self.bits, self.depth)
        if self.kind == "inverted":
            values = 255 - values
        if self.kind == "cmyk":
            ink = 255 - values.astype(np.uint16)
            values = ((ink[..., :3] * ink[..., 3:] + 127) // 255).astype(np.uint8)
        return np.repeat(values, 3, -1) if values.shape[-1] == 1 else np.ascontiguousarray(values)


def _to_8_bits(values: np.ndarray, bits: int, depth: int) -> np.ndarray:
    if bits < 8:
        return (values.astype(np.uint16) * 255 // (2**bits - 1)).astype(np.uint8)
    if values.dtype == np.uint8:
        return values
    return np.minimum(values >> (depth - 8), 255).astype(np.uint8)


def on_white(rgb: np.ndarray, alpha: np.ndarray, premultiplied: bool) -> np.ndarray:
    """Colours (h, w, 3) over white by their opacity (h, w, 1), all uint8."""
    opacity = alpha.astype(np.uint16)
    light = rgb if premultiplied else (rgb * opacity + 127) // 255
    return np.minimum(light + (255 - opacity), 255).astype(np.uint8)


def measured_depth(
    path: Path, samples: Samples, largest: tuple[int, int], stated: tuple[int, str] | None
) -> tuple[Samples, str]:
    """The samples with the depth that the whole image shows, and a note that names it.

    Parameters
    ----------
    largest : of the colours and of the opacity, over the whole image
    stated : bits that the file states, and where; where it does not, the smallest of DEPTHS that holds the largest
    """
    colour, alpha = largest
    depth, source = stated or (smallest_depth(colour), "")
    if stated is None and samples.kind in ("inverted", "cmyk"):
        raise ImageError(
            f"{path}: expected the depth of {samples.bits}-bit samples of which zero is white, found no MaxSampleValue "
            "or SignificantBits; convert it to 8-bit RGB"
        )
    if colour > 2**depth or (colour == 2**depth and source != "MaxSampleValue"):  # some write 4,096 for 12 bits
        raise ImageError(
            f"{path}: expected values below {2**depth:,} ({depth} bits by {source}), found {colour:,}; correct "
            f"{source}, or convert the image to 8-bit RGB"
        )
    depth = max(depth, 8)
    alpha_depth = depth if alpha < 2**depth and stated is not None else smallest_depth(alpha)
    by = f" by {source}" if source else ""
    note = f"{samples.bits} bits per channel read as {depth}{by} (largest value {colour:,})"
    return replace(samples, depth=depth, alpha_depth=alpha_depth), note


def smallest_depth(largest: int) -> int:
    """The fewest bits of a camera that hold a value."""
    return next(depth for depth in DEPTHS if largest < 2**depth)


def largest_values(blocks: Iterable[np.ndarray], samples: Samples) -> tuple[int, int]:
    """Largest colour and largest opacity of blocks (h, w, C)."""
    colour = alpha = 0
    for block in blocks:
        colour = max(colour, int(samples.colours_of(block).max(initial=0)))
        if samples.alpha is not None:
            alpha = max(alpha, int(block[..., samples.alpha].max(initial=0)))
    return colour, alpha
