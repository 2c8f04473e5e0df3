"""Where the spots of an unmeasured slide lie: on a grid over its tissue, or on the positions of a slice or a file.

Letters: S spots. Coordinates are full-resolution pixels, those of the positions where there are any; the picture itself
may be smaller (the hires image of a slice folder), `picture_scale` of its pixels to one of them.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from utils.images import tiles, tissue
from utils.images.image import image_size
from utils.prediction.slides import Request
from utils.slices import splits, visium
from utils.slices.matrix import slice_matrix

SPOT_SHARE = 0.55  # diameter of a Visium spot in pitches
SCALE_APART = 0.05  # two statements of um per px that differ by more are worth a warning


@dataclass(frozen=True)
class Plan:
    """What is known of a slide before its picture is opened; `spots` are those under tissue, as reader gives them."""

    request: Request
    picture: Path
    picture_scale: float
    root: Path | None
    spots: pd.DataFrame | None
    um_per_fullres_px: float | None
    pitch_um: float | None
    diameter_fullres_px: float | None

    @property
    def um_per_picture_px(self) -> float | None:
        return None if self.um_per_fullres_px is None else self.um_per_fullres_px / self.picture_scale

    @property
    def files(self) -> list[Path]:
        """All that the spots, their tiles and what was measured are read from."""
        found = [path for path in (self.picture, self.request.positions, self.request.mask) if path is not None]
        if self.root is not None:
            counts = slice_matrix(self.root)
            places = [self.root / "spatial", *([counts] if counts else [])]
            for place in places:
                found += [place] if place.is_file() else sorted(p for p in place.iterdir() if p.is_file())
        return found


@dataclass(frozen=True)
class SlideSpots:
    """The spots of one slide, in the order of its results."""

    name: str
    barcodes: np.ndarray  # (S,) str
    xy_fullres_px: np.ndarray  # (S, 2)
    array: np.ndarray  # (S, 2) row and column of the array
    pitch_fullres_px: float
    diameter_fullres_px: float
    um_per_fullres_px: float
    picture_scale: float

    @property
    def xy_picture_px(self) -> np.ndarray:
        return self.xy_fullres_px * self.picture_scale


def read_position_file(path: Path) -> pd.DataFrame:
    """A positions table of any name, as visium.read_positions gives it; by its content and .parquet or not."""
    kind = ".parquet" if path.suffix.lower() == ".parquet" else ".csv"
    with tempfile.TemporaryDirectory() as folder:
        stand_in = Path(folder) / "spatial" / f"tissue_positions{kind}"
        stand_in.parent.mkdir()
        stand_in.symlink_to(path.absolute())
        try:
            return visium.read_positions(folder)
        except ValueError as error:
            raise ValueError(f"--positions: {str(error).replace(str(stand_in), str(path))}") from error


def _folder_picture(folder: Path, root: Path, hires_scale: float) -> tuple[Path, float]:
    """The picture that the tiles come from, full-resolution or else hires, and its pixels per full-resolution pixel."""
    folder = folder.resolve()
    fullres = splits.image_file(folder.parent, splits.SliceRow(folder.name, folder.name, "", None, None))
    if fullres is not None:
        tiles.check_scale(image_size(fullres), fullres, root, hires_scale)
        return fullres, 1.0
    hires = root / "spatial" / "tissue_hires_image.png"
    if not hires.exists():
        raise ValueError(f"{root}: expected a full-resolution picture or {hires.name}, found none; put it there")
    return hires, hires_scale


def _pitch_um(root: Path | None, positions: pd.DataFrame, given: float | None) -> float | None:
    """None where neither flag, array nor bin size tell."""
    if given is not None or visium.is_staggered(positions):
        return given or visium.VISIUM_PITCH_UM
    return None if root is None else visium.read_scalefactors(root).get("bin_size_um")


def plan(request: Request) -> Plan:
    """Find picture, positions and scale of a slide. Raises ValueError where they do not fit."""
    root, picture, scale, diameter = None, request.slide, 1.0, None
    if request.slide.is_dir():
        root = visium.find_root(request.slide)
        factors = visium.read_scalefactors(root)
        picture, scale = _folder_picture(request.slide, root, factors["tissue_hires_scalef"])
        diameter = factors["spot_diameter_fullres"]
    positions = None
    if request.positions is not None:
        positions = read_position_file(request.positions)
        spots = positions[positions["in_tissue"]].drop(columns="in_tissue")
        if not len(spots):
            raise ValueError(f"--positions: {request.positions} has no position in tissue; mend its column in_tissue")
    elif root is not None:
        positions, spots = visium.read_positions(root), visium.tissue_spots(root)[0]
    um_per_px = request.um_per_px
    if positions is None:
        pitch_um = request.pitch_um or visium.VISIUM_PITCH_UM
        return Plan(request, picture, scale, root, None, um_per_px, pitch_um, diameter)
    known_um = _pitch_um(root, positions, request.pitch_um)
    if um_per_px is None and known_um is not None:
        um_per_px = known_um / visium.pitch_fullres_px(positions)
    return Plan(request, picture, scale, root, spots, um_per_px, known_um, diameter)


def lay(planned: Plan, slide: Any, thumbnail: np.ndarray, thumbnail_scale: float, kind: str) -> SlideSpots:
    """The spots of a slide whose picture is open.

    Parameters
    ----------
    slide : image.TissueImage, or anything with width, height, um_per_px and metadata_um_per_px
    thumbnail : (height, width, 3) uint8, of `thumbnail_scale` of its pixels to one of the picture
    kind : "hexagonal" or "square", of the grid where there are no positions
    """
    request, scale = planned.request, planned.picture_scale
    um_per_px = planned.um_per_fullres_px
    if um_per_px is None:
        if not slide.um_per_px:
            or_pitch = "" if planned.spots is None else " or --pitch_um (200 for legacy ST)"
            raise ValueError(f"{planned.picture}: its scale is not known (um per pixel); give --um_per_px{or_pitch}")
        um_per_px = slide.um_per_px * scale
    elif slide.metadata_um_per_px and abs(slide.metadata_um_per_px * scale / um_per_px - 1) > SCALE_APART:
        found = f"{um_per_px / scale:.4g} um per px, the file says {slide.metadata_um_per_px:.4g}"
        print(f"warning: {request.name}: flags or positions say {found}; the former is used")
    size = np.array([slide.width, slide.height]) / scale
    if planned.spots is None:
        barcodes, xy, array, pitch = _grid(planned, slide, um_per_px, thumbnail, thumbnail_scale, kind)
    else:
        barcodes = planned.spots.index.to_numpy(str)
        xy = planned.spots[["x_fullres_px", "y_fullres_px"]].to_numpy(float)
        array = planned.spots[["array_row", "array_col"]].to_numpy(int)
        pitch = _context_pitch(planned, um_per_px)
    diameter = planned.diameter_fullres_px or SPOT_SHARE * pitch
    kept = ((xy >= 0) & (xy < size)).all(1)
    if not kept.all():
        print(f"{request.name}: {(~kept).sum()} of {len(kept)} spots lie outside the picture and are left out")
    if planned.spots is not None and request.mask is not None:
        mask = tissue.read_mask(request.mask, thumbnail.shape[:2])
        kept &= tissue.on_tissue(xy * scale, mask, thumbnail_scale, diameter / 2 * scale)
    if not kept.any():
        raise ValueError(f"{request.slide}: no spot on picture and tissue; are its positions those of this picture?")
    return SlideSpots(request.name, barcodes[kept], xy[kept], array[kept], pitch, diameter, um_per_px, scale)


def _context_pitch(planned: Plan, um_per_px: float) -> float:
    """Pixels between neighbours, by which the model's context is measured, as its panels state it."""
    if planned.spots is not None and len(planned.spots) > 1:
        return visium.pitch_fullres_px(planned.spots)
    return (planned.pitch_um or visium.VISIUM_PITCH_UM) / um_per_px


def _grid(planned: Plan, slide: Any, um_per_px: float, thumbnail: np.ndarray, thumbnail_scale: float, kind: str):
    """Places `<row>x<column>` of a grid over the tissue: names (S,), centres (S, 2), array (S, 2), pitch in pixels."""
    pitch = (planned.pitch_um or visium.VISIUM_PITCH_UM) / um_per_px
    xy, array = tissue.grid(slide.width, slide.height, pitch, kind)
    if planned.request.mask is None:
        mask, remedy = tissue.tissue_mask(thumbnail), "draw it and give it as --mask"
    else:
        mask, remedy = tissue.read_mask(planned.request.mask, thumbnail.shape[:2]), "check --mask"
    kept = tissue.on_tissue(xy, mask, thumbnail_scale, SPOT_SHARE / 2 * pitch)
    if not kept.any():
        raise ValueError(f"{planned.request.slide}: no tissue found under a grid of {pitch:.1f} px; {remedy}")
    return np.array([f"{row}x{column}" for row, column in array[kept]]), xy[kept], array[kept], pitch
