"""Where the spots of an unmeasured slide lie: on a grid over its tissue, or on the positions of a slice or a file.

Shapes: S spots. Coordinates are full-resolution pixels, those of the positions where there are any; the image itself
may be smaller (the hires image of a slice folder), `scale` of its pixels to one of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from utils.images import tissue
from utils.images.image import TissueImage
from utils.prediction.slides import Request
from utils.slices import checks, splits, visium
from utils.slices.folders import SPATIAL_FILES
from utils.slices.lattice import Lattice
from utils.slices.matrix import matrix_files
from utils.slices.visium import SourceImage
from utils.words import count_of

SPOT_DIAMETER = 0.55  # of a Visium spot, in pitches
OTHER_PITCH = 1.25  # a pitch that differs by more from the train slices' is warned of


@dataclass(frozen=True)
class Plan:
    """What is known of a slide before its image is opened.

    Attributes
    ----------
    request : Request
    source : SourceImage, the image that tiles are cut from
    slice_ : Slice or None, where the slide is a slice folder
    spots : DataFrame (S, 4) or None, the spots asked for, as Slice.spots; None for a grid
    lattice : Lattice or None, of the positions; None for a grid or a single position
    grid_pitch_um : of a grid for which no pitch is asked, that of the model
    """

    request: Request
    source: SourceImage
    slice_: visium.Slice | None
    spots: pd.DataFrame | None
    lattice: Lattice | None
    grid_pitch_um: float = visium.VISIUM_PITCH_UM

    @property
    def pitch_um(self) -> float | None:
        """Between neighbouring spots: as given, else of the array or the bin size; None where it is not known."""
        if self.request.spot_pitch_um is not None or self.spots is None:
            return self.request.spot_pitch_um or self.grid_pitch_um
        if self.lattice is not None and self.lattice.staggered:
            return visium.VISIUM_PITCH_UM
        return None if self.slice_ is None else self.slice_.scalefactors.get("bin_size_um")

    @property
    def um_per_fullres_px(self) -> float | None:
        """As given, else by the positions; None where it is read from the image."""
        if self.request.um_per_px is not None or self.lattice is None or self.pitch_um is None:
            return self.request.um_per_px
        return self.pitch_um / self.lattice.pitch_px

    @property
    def um_per_image_px(self) -> float | None:
        return None if self.um_per_fullres_px is None else self.um_per_fullres_px / self.source.scale

    @property
    def files(self) -> list[Path]:
        """All that the spots, their tiles and what was measured are read from."""
        found = [path for path in (self.source.path, self.request.positions, self.request.mask) if path is not None]
        if self.slice_ is not None:
            spatial = (self.slice_.root / "spatial" / name for name in SPATIAL_FILES)
            found += [path for path in spatial if path.exists()]
            found += matrix_files(self.slice_.matrix) if self.slice_.matrix else []
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
    image_scale: float  # pixels of the image per full-resolution pixel
    tissue_fraction: np.ndarray  # (S,) of the tile

    @property
    def xy_image_px(self) -> np.ndarray:
        return self.xy_fullres_px * self.image_scale


def plan(request: Request, grid_pitch_um: float | None = None) -> Plan:
    """Find image, positions and scale of a slide; `grid_pitch_um` is the model's (None: not known, that of Visium).

    A slices.csv beside a slice folder names its image and its pitch. Raises ValueError where they do not fit.
    """
    slice_, source = None, SourceImage("fullres", request.slide, 1.0)
    if request.slide.is_dir():
        slice_ = visium.open_slice(request.slide, request.name or None)
        row = splits.row_of(request.slide)
        source = slice_.source_image(named=None if row is None else row.image)
        if row is not None and request.spot_pitch_um is None and request.positions is None:
            request = replace(request, spot_pitch_um=row.spot_pitch_um)
    if request.positions is not None:
        spots, lattice = _given_spots(request.positions)
        return Plan(request, source, slice_, spots, lattice)
    if slice_ is not None:
        return Plan(request, source, slice_, slice_.spots, slice_.lattice)
    return Plan(request, source, None, None, None, grid_pitch_um or visium.VISIUM_PITCH_UM)


def _given_spots(path: Path) -> tuple[pd.DataFrame, Lattice | None]:
    """Spots in tissue of a positions table of any name, and the lattice of all its positions."""
    try:
        positions = visium.read_position_file(path)
        lattice = visium.fit_positions(path, positions)
    except ValueError as error:
        raise ValueError(f"--positions: {error}") from error
    spots = positions[positions["in_tissue"]].drop(columns="in_tissue")
    if not len(spots):
        raise ValueError(f"--positions: {path}: expected positions in tissue, found none; correct its column in_tissue")
    return spots, lattice


def place_spots(
    planned: Plan, image: TissueImage, thumbnail: np.ndarray, thumbnail_scale: float, kind: str, tile_um: float
) -> SlideSpots:
    """The spots of a slide whose image is open.

    Parameters
    ----------
    thumbnail : (height, width, 3) uint8, of `thumbnail_scale` of its pixels to one of the image
    kind : "hexagonal" or "square", of the grid where there are no positions
    tile_um : side of a tile
    """
    request, scale = planned.request, planned.source.scale
    um_per_px = _um_per_fullres_px(planned, image)
    if request.mask is None:
        mask = tissue.tissue_mask(thumbnail)
    else:
        mask = tissue.read_mask(request.mask, thumbnail.shape[:2])
    if planned.spots is None:
        barcodes, xy, array, pitch = _grid(planned, image, um_per_px, mask, thumbnail_scale, kind)
        diameter, kept = SPOT_DIAMETER * pitch, np.ones(len(xy), bool)
    else:
        barcodes = planned.spots.index.to_numpy(str)
        xy = planned.spots[list(visium.POSITIONS_PX)].to_numpy(float)
        array = planned.spots[list(visium.POSITIONS_ARRAY)].to_numpy(int)
        pitch = (planned.pitch_um or visium.VISIUM_PITCH_UM) / um_per_px
        pitch = pitch if planned.lattice is None else planned.lattice.pitch_px
        given = planned.slice_ is None or request.positions is not None
        diameter = SPOT_DIAMETER * pitch if given else planned.slice_.scalefactors["spot_diameter_fullres"]  # type: ignore[union-attr]
        kept = _spots_on_image(planned, image, xy * scale, diameter / 2 * scale, (thumbnail, thumbnail_scale))
        if request.mask is not None:
            kept &= tissue.on_tissue(xy * scale, mask, thumbnail_scale, diameter / 2 * scale)
    if not kept.any():
        raise ValueError(
            f"{request.slide}: expected spots on the image and its tissue, found none of {len(xy)}; give positions in "
            "pixels of this image"
        )
    fraction = tissue.tissue_fraction(xy[kept] * scale, mask, thumbnail_scale, tile_um / um_per_px * scale)
    return SlideSpots(request.name, barcodes[kept], xy[kept], array[kept], pitch, diameter, um_per_px, scale, fraction)


def warn_of_pitch(spots: SlideSpots, trained_um: float | None) -> None:
    """The model reads the spots around a spot: at another pitch it reads other tissue than in training."""
    pitch_um = spots.pitch_fullres_px * spots.um_per_fullres_px
    if trained_um and not 1 / OTHER_PITCH < pitch_um / trained_um < OTHER_PITCH:
        print(
            f"warning: {spots.name}: spots {pitch_um:.4g} um apart, the model was trained on spots {trained_um:.4g} um "
            "apart, whose neighbours it reads: expect worse predictions"
        )


def _um_per_fullres_px(planned: Plan, image: TissueImage) -> float:
    """By flags or positions, else the image's own; a contradiction is printed."""
    um_per_px, scale = planned.um_per_fullres_px, planned.source.scale
    if um_per_px is None:
        if not image.um_per_px:
            or_pitch = "" if planned.lattice is None else " or --spot_pitch_um (200 for legacy ST)"
            raise ValueError(
                f"{planned.source.path}: expected a scale (um per pixel) in the file, found none; give "
                f"--um_per_px{or_pitch}"
            )
        return image.um_per_px * scale
    in_file = image.metadata_um_per_px
    if in_file and planned.slice_ is None and abs(in_file * scale / um_per_px - 1) > visium.DISAGREE:
        print(
            f"warning: {planned.request.name}: {um_per_px / scale:.4g} um per px by flags or positions, {in_file:.4g} "
            "by the file; the former is used"
        )
    return um_per_px


def _spots_on_image(
    planned: Plan, image: TissueImage, xy_image_px: np.ndarray, radius_px: float, thumbnail: checks.Thumbnail
) -> np.ndarray:
    """Which spots (S,) lie on the image; a contradiction between image and positions is printed, or refused."""
    request, where = planned.request, str(planned.source.path)
    size = image.width, image.height
    if planned.slice_ is not None and request.positions is None:
        kept, warnings = checks.check_image(planned.slice_, planned.source, image, thumbnail)
        warnings = [*planned.slice_.warnings, *warnings]
    else:
        kept = checks.spots_on_image(where, xy_image_px, size)
        checks.check_not_blank(where, thumbnail)
        mirrored = planned.lattice is not None and planned.lattice.mirrored
        warnings = checks.check_axes(where, xy_image_px[kept], size, radius_px, thumbnail, mirrored)
    for warning in warnings:
        print(f"warning: {request.name}: {warning}")
    if not kept.all():
        print(f"{request.name}: {(~kept).sum()} of {count_of(len(kept), 'spot')} outside the image left out")
    return kept


def _grid(
    planned: Plan, image: TissueImage, um_per_px: float, mask: np.ndarray, thumbnail_scale: float, kind: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Places `<row>x<column>` of a grid over the tissue: names (S,), centres (S, 2), array (S, 2), pitch in pixels."""
    pitch = (planned.pitch_um or visium.VISIUM_PITCH_UM) / um_per_px
    xy, array = tissue.grid(image.width, image.height, pitch, kind)
    kept = tissue.on_tissue(xy, mask, thumbnail_scale, SPOT_DIAMETER / 2 * pitch)
    if not kept.any():
        remedy = "draw it and give it as --mask" if planned.request.mask is None else "check --mask"
        raise ValueError(
            f"{planned.request.slide}: expected tissue under a grid of {pitch:.1f} px, found none under its {len(xy)} "
            f"spots; {remedy}"
        )
    return np.array([f"{row}x{column}" for row, column in array[kept]]), xy[kept], array[kept], pitch
