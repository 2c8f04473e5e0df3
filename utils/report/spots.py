"""Spots of one slice and the small image that they are drawn on.

Shapes: S spots, (h, w) pixels of the small image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from utils.features import dataset
from utils.images.image import open_image
from utils.slices import visium

DISC = 0.4  # radius of a drawn spot in pitches


@dataclass(frozen=True, kw_only=True)
class SpotsOnImage:
    """Where the spots of a slice are drawn.

    image : (h, w, 3) uint8 or None, the H&E; `image_scale` is its pixels per full-resolution pixel
    xy_fullres_px : (S, 2)
    spot_diameter_px : of a drawn spot, in full-resolution pixels
    um_per_fullres_px : for the scale bar; None where it is not known
    scalefactors : of uns["spatial"], by the names that Space Ranger uses
    """

    name: str
    image: np.ndarray | None
    image_scale: float
    xy_fullres_px: np.ndarray
    spot_diameter_px: float
    barcodes: Sequence[str]
    um_per_fullres_px: float | None = None
    scalefactors: dict[str, float] = field(default_factory=dict)


def spots_on_image(slice_: dataset.SliceData, rows: np.ndarray) -> SpotsOnImage:
    """Rows (S,) of a slice on its hires image, else on its lowres one, else on none."""
    factors = visium.read_scalefactors(slice_.root)
    image, scale = None, 1.0
    for kind, name in (("lowres", visium.LOWRES), ("hires", visium.HIRES)):
        path = slice_.root / "spatial" / name
        if path.exists():
            with open_image(path) as opened:
                image, scale = opened.crop(0, 0, opened.width, opened.height), factors[f"tissue_{kind}_scalef"]
    return SpotsOnImage(
        name=slice_.name,
        image=image,
        image_scale=scale,
        xy_fullres_px=slice_.xy_fullres_px[rows],
        spot_diameter_px=2 * DISC * slice_.pitch_fullres_px,
        barcodes=slice_.barcodes[rows].tolist(),
        um_per_fullres_px=dataset.um_per_fullres_px(slice_),
        scalefactors=factors if image is None else factors | {"tissue_hires_scalef": scale},
    )
