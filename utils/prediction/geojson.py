"""Spots as GeoJSON objects that QuPath imports: File > Import objects from file, or drag and drop.

QuPath 0.4 and later read a FeatureCollection whose features carry `properties.objectType` and `measurements` as an
object of numbers (earlier ones wrote a list; both are read), and a polygon marked `isEllipse` as the ellipse in its
bounding box: qupath.lib.io.QuPathTypeAdapters and ROITypeAdapters. Letters: S spots, G genes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from utils.files.atomic import whole_file

CORNERS = 12  # a multiple of four: the bounding box of the polygon is that of the circle


def circle(x: float, y: float, diameter: float) -> list[list[float]]:
    """A closed ring of corners on the circle, in pixels, two digits."""
    angles = [2 * math.pi * i / CORNERS for i in range(CORNERS)]
    ring = [[round(x + diameter / 2 * math.cos(a), 2), round(y + diameter / 2 * math.sin(a), 2)] for a in angles]
    return [*ring, ring[0]]


def feature(name: str, x: float, y: float, diameter: float, measurements: dict[str, float]) -> dict[str, Any]:
    """One spot as a QuPath detection. What is not a finite number is left out: JSON has no word for it."""
    known = {key: float(f"{value:.5g}") for key, value in measurements.items() if math.isfinite(value)}
    return {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": [circle(x, y, diameter)], "isEllipse": True},
        "properties": {"objectType": "detection", "name": name, "measurements": known},
    }


def features(
    names: Sequence[str], xy_px: np.ndarray, diameter_px: float, columns: Sequence[str], values: np.ndarray
) -> Iterator[dict[str, Any]]:
    for name, (x, y), row in zip(names, xy_px.tolist(), values, strict=True):
        yield feature(str(name), x, y, diameter_px, dict(zip(columns, row.tolist(), strict=True)))


def write_geojson(
    path: Path, names: Sequence[str], xy_px: np.ndarray, diameter_px: float, columns: Sequence[str], values: np.ndarray
) -> None:
    """Write a spot after the other, so that memory does not grow with them.

    Parameters
    ----------
    names : (S,)
    xy_px : (S, 2) in pixels of the image that QuPath opens
    columns : (G,) names of the measurements
    values : (S, G)
    """
    with whole_file(path) as part, part.open("w", encoding="utf-8") as file:
        file.write('{"type": "FeatureCollection", "features": [')
        for number, spot in enumerate(features(names, xy_px, diameter_px, columns, values)):
            file.write((",\n" if number else "\n") + json.dumps(spot, allow_nan=False))
        file.write("\n]}\n")
