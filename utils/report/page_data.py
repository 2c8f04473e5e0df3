"""Values and images as the text that report.html holds.

Shapes: S spots, G genes.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from typing import Any

import numpy as np


def quantise(values: np.ndarray, bits: int) -> tuple[str, list[float], list[float]]:
    """Whole numbers for each gene between its lowest and its highest value, as base64 text.

    Parameters
    ----------
    values : (S, G)
        What is not finite gets the highest number, 2**bits - 1; a value is off by half a step at most, of which there
        are 2**bits - 2.

    Returns
    -------
    text : G pieces of equal length, S little-endian numbers each, filled up to whole groups of three bytes
    low, high : (G,) the values of number 0 and 2**bits - 2; 0 where nothing is finite
    """
    known = np.isfinite(values)
    low = np.where(known, values, np.inf).min(axis=0, initial=np.inf)
    high = np.where(known, values, -np.inf).max(axis=0, initial=-np.inf)
    low, high = (np.where(known.any(axis=0), edge, 0.0).astype(np.float64) for edge in (low, high))
    steps = 2**bits - 2
    position = (np.where(known, values, 0.0) - low) / np.where(high > low, high - low, 1.0)
    whole = np.where(known, np.rint(position * steps), steps + 1).astype("<u2" if bits == 16 else "u1")
    rows = np.ascontiguousarray(whole.T).view(np.uint8).reshape(values.shape[1], -1)
    rows = np.pad(rows, ((0, 0), (0, -rows.shape[1] % 3)))
    return base64.b64encode(rows.tobytes()).decode(), low.tolist(), high.tolist()


def colour_range(maps: Iterable[np.ndarray]) -> tuple[list[float], list[float]]:
    """First and 99th percentile of each gene over all maps (S, G) together: (G,), (G,); 0 where nothing is known."""
    both = np.concatenate([np.where(np.isfinite(values), values, np.nan) for values in maps])
    edges = np.zeros((2, both.shape[1]))
    known = np.isfinite(both).any(axis=0)
    edges[:, known] = np.nanpercentile(both[:, known], [1, 99], axis=0)
    return edges[0].tolist(), edges[1].tolist()


def jpeg(pixels: np.ndarray, longest_px: int, quality: int = 80) -> str:
    """An image (h, w, 3) uint8, reduced to `longest_px` where it is larger, as a data address."""
    from PIL import Image

    image, data = Image.fromarray(np.ascontiguousarray(pixels[..., :3])), io.BytesIO()
    image.thumbnail((longest_px, longest_px), Image.Resampling.LANCZOS)
    image.save(data, "JPEG", quality=quality, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()


def numbers(values: np.ndarray) -> list[Any]:
    return [cell(value) for value in np.asarray(values).tolist()]


def cell(value: Any) -> str | float | int | None:
    """As JSON can hold it: NaN and infinity are None, other numbers have six digits."""
    if isinstance(value, float | np.floating):
        return float(f"{value:.6g}") if np.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value


def shown(value: str | float | int | None) -> str:
    """A cell as the page shows it: three digits after the point, one from 10 on, thousands apart, a dash for None."""
    if value is None or isinstance(value, str):
        return value or "–"
    if value == int(value):
        return f"{int(value):,}".replace("-", "−")
    return f"{value:.{1 if abs(value) >= 10 else 3}f}".replace("-", "−")
