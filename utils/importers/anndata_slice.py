"""One section of an AnnData as a slice: spots on their lattice, counts and names, images and sizes.

Shapes: S spots, G genes. Coordinates are full-resolution pixels of the H&E.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from utils.images.image import stated_um_per_px
from utils.importers import anndata_sections as sections
from utils.importers import pitch
from utils.importers.anndata_counts import read_counts
from utils.importers.images import to_rgb
from utils.importers.source import Source, lie_on, place_spots
from utils.slices.lattice import Lattice

ARRAY = ["array_row", "array_col"]
PIXEL_SIZES = {  # by the key that states it: its origin
    "pixel_size_um_estimated": "estimate",
    "pixel_size_um_embedded": "image file",
    "pixel_size_um": "pixel size",
    "pixel_size": "pixel size",
}
SMALL = {"hires": ("hires", "downscaled_fullres"), "lowres": ("lowres",)}  # the second name is HEST's
SPOT_FRACTION = {True: 0.55, False: 0.5}  # of the pitch that a spot measures: Visium (staggered), legacy ST (square)
SPOT_LIMITS = (0.2, 1.2)  # of the pitch: a stated diameter outside is of other spots or bins


def stated_array(obs: pd.DataFrame) -> np.ndarray | None:
    """Array rows and columns (S, 2) int of obs; None where they are missing, no whole numbers, or all the same."""
    if not set(ARRAY) <= set(obs):
        return None
    stated = obs[ARRAY].astype(object).apply(pd.to_numeric, errors="coerce").to_numpy(float)
    if not np.isfinite(stated).all() or (stated != np.rint(stated)).any() or (stated == stated[:1]).all():
        return None
    return stated.astype(int)


def in_tissue(where: str, obs: pd.DataFrame) -> np.ndarray:
    """Spots (S,) under tissue: those of obs['in_tissue'], all without it."""
    if "in_tissue" not in obs:
        return np.ones(len(obs), bool)
    texts = obs["in_tissue"].astype(str).str.lower().replace({"true": "1", "false": "0"})
    stated = pd.to_numeric(texts, errors="coerce").to_numpy(float)
    if not np.isin(stated, (0, 1)).all():
        found = obs["in_tissue"].iloc[int(np.argmin(np.isin(stated, (0, 1))))]
        raise ValueError(f"{where}: expected 0 or 1 in obs['in_tissue'], found {found}; fix or remove the column")
    if not stated.any():
        raise ValueError(f"{where}: expected spots in tissue, found none of {len(stated)}; fix obs['in_tissue']")
    return stated == 1


def from_anndata(
    adata: Any,
    name: str,
    origin: Path,
    xy_px: np.ndarray,
    image: Path | np.ndarray | None,
    pitch_um: float | None = None,
    metadata: dict[str, Any] | None = None,
    diameter_px: float | None = None,
    library_key: str | None = None,
) -> Source:
    """A slice of an AnnData whose spots have their centres at `xy_px` (S, 2) of the full-resolution image.

    Parameters
    ----------
    adata : AnnData of S spots
    name, origin : of the slice, and what messages name
    image : the H&E; None for an image in full resolution of uns['spatial'], or none
    pitch_um : distance between neighbouring spots where the user gives it
    metadata : what lies beside the file (HEST-1k)
    diameter_px : of a spot, where it is known
    library_key : column of obs that the section was split by

    Raises
    ------
    ValueError where several sections are joined, or where counts, places, pitch or images are not as expected.
    """
    where, metadata = str(origin), metadata or {}
    kept = in_tissue(where, adata.obs)
    left_out = {"not in tissue": int((~kept).sum())}
    adata, xy_px = (adata, xy_px) if kept.all() else (adata[kept], xy_px[kept])
    array, by_library = stated_array(adata.obs), sections.libraries(where, adata)
    sections.check_one_section(where, adata.obs, by_library, xy_px, array)
    spots, lattice, notes = place_spots(where, adata.obs_names, xy_px, array)
    counts = read_counts(where, adata)
    fitting = [key for key, entry in by_library.items() if _fits(entry, xy_px)]
    try:
        entry = sections.choose_library(where, by_library, adata.obs, fitting, library_key)
    except ValueError:
        if image is None:
            raise
        entry = {}  # the image is a file, which needs none
    factors = _factors(entry)
    if "bin_size_um" in factors:
        lattice = replace(lattice, mirrored=False)  # the array of Visium HD is a mirror image of the pixels by itself
    fullres, small, image_notes = _uns_images(where, entry, factors, image is None)
    image = fullres if image is None else image
    notes += image_notes
    stated = _stated(adata, metadata, factors, image, lattice.pitch_px)
    pitch_um = pitch.choose_pitch_um(where, lattice, pitch_um, stated)
    diameter_px = diameter_px or _diameter_px(factors, metadata, lattice, pitch_um)
    return Source(
        name=name,
        patient=sections.patient_of(adata.obs, metadata.get("patient"), name),
        origin=origin,
        counts=counts.counts,
        genes=counts.genes,
        gene_ids=counts.gene_ids,
        spots=spots,
        lattice=lattice,
        pitch_um=pitch_um,
        spot_diameter_px=diameter_px,
        image=image,
        small=small,
        scalefactors=_kept_factors(factors, small, lattice, pitch_um),
        stated_um_per_px=pitch.contradictions(stated),
        left_out=left_out,
        notes=[*counts.notes, *notes],
        warnings=[*counts.warnings, *_other_scale(factors, lattice)],
    )


def _fits(entry: dict[str, Any], xy_px: np.ndarray) -> bool:
    """Whether a library has an image that all but a few spots lie on."""
    factors = _factors(entry)
    for kind, pixels in _small_pixels(entry, SMALL).items():
        height, width = pixels.shape[-2:] if pixels.ndim == 3 and pixels.shape[2] > 4 else pixels.shape[:2]
        scale = factors.get(f"tissue_{kind}_scalef")
        if scale is not None and lie_on(xy_px * scale, (width, height)):
            return True
    return False


def _factors(entry: dict[str, Any]) -> dict[str, float]:
    """Scale factors of a library that are positive numbers."""
    stated = {key: pitch.positive(value) for key, value in entry.get("scalefactors", {}).items()}
    factors = {key: value for key, value in stated.items() if value is not None}
    if "tissue_downscaled_fullres_scalef" in factors:
        factors.setdefault("tissue_hires_scalef", factors.pop("tissue_downscaled_fullres_scalef"))
    return factors


def _small_pixels(entry: dict[str, Any], names: dict[str, tuple[str, ...]]) -> dict[str, np.ndarray]:
    """The small images of a library as they are kept, by Space Ranger's names of them."""
    images = entry.get("images", {})
    found = {kind: next((images[name] for name in known if name in images), None) for kind, known in names.items()}
    return {kind: np.asarray(pixels) for kind, pixels in found.items() if pixels is not None}


def _uns_images(
    where: str, entry: dict[str, Any], factors: dict[str, float], needed: bool
) -> tuple[np.ndarray | None, dict[str, Path | np.ndarray], list[str]]:
    """Images of a library: the one in full resolution, the small ones that have a scale; and notes on them.

    Where they are not `needed`, because the image is a file, Space Ranger's own small ones serve to check that file,
    as far as they can be read.
    """
    fullres = entry.get("images", {}).get("fullres")
    small: dict[str, np.ndarray] = {}
    notes = []
    names = {kind: known if needed else known[:1] for kind, known in SMALL.items()}
    found = {kind: pixels for kind, pixels in _small_pixels(entry, names).items() if f"tissue_{kind}_scalef" in factors}
    for kind, pixels in (found | ({"fullres": fullres} if fullres is not None and needed else {})).items():
        try:
            small[kind], note = to_rgb(f"{where}: {kind} of uns['spatial']", pixels)
        except ValueError:
            if needed:
                raise
            note = "of uns['spatial'] cannot be read"
        notes += [f"{kind}: {note}"] if note else []
    return small.pop("fullres", None), {**small}, notes


def _stated(
    adata: Any, metadata: dict[str, Any], factors: dict[str, float], image: Any, pitch_px: float
) -> list[pitch.Stated]:
    """All that is stated of the size of a pixel and of the distance between spots, the surest first."""
    stated = []
    for key, origin in PIXEL_SIZES.items():
        column = adata.obs[key].iloc[0] if key in adata.obs and len(adata.obs) else None
        for place, value in (("metadata", metadata.get(key)), ("uns", adata.uns.get(key)), ("obs", column)):
            stated += pitch.pixel_size(f"{key} ({place})", value, origin)
    where = "microns_per_pixel of the scale factors"
    stated += pitch.pixel_size(where, factors.get("microns_per_pixel"), "scale factors")
    if isinstance(image, Path):
        stated += pitch.pixel_size(image.name, stated_um_per_px(image), "image file")
    stated += pitch.distance("inter_spot_dist", metadata.get("inter_spot_dist"), pitch_px)
    return stated + pitch.distance("bin_size_um", factors.get("bin_size_um"), pitch_px)


def _diameter_px(factors: dict[str, float], metadata: dict[str, Any], lattice: Lattice, pitch_um: float) -> float:
    """Diameter of a spot: the first that is stated and fits the pitch, else the usual fraction of it."""
    spot_um = pitch.positive(metadata.get("spot_diameter"))
    stated = factors.get("spot_diameter_fullres"), spot_um and spot_um * lattice.pitch_px / pitch_um
    low, high = (limit * lattice.pitch_px for limit in SPOT_LIMITS)
    fitting = (px for px in stated if px and low <= px <= high)
    return next(fitting, SPOT_FRACTION[lattice.staggered] * lattice.pitch_px)


def _other_scale(factors: dict[str, float], lattice: Lattice) -> list[str]:
    """A line where the spots of the scale factors are far larger or smaller than those of the positions."""
    of_pitch = factors.get("spot_diameter_fullres", lattice.pitch_px) / lattice.pitch_px
    if SPOT_LIMITS[0] <= of_pitch <= SPOT_LIMITS[1]:
        return []
    return [
        f"spot_diameter_fullres of the scale factors is {of_pitch:.2g} times the distance between spots: are positions "
        "and scale factors in pixels of one image?"
    ]


def _kept_factors(
    factors: dict[str, float], small: dict[str, Any], lattice: Lattice, pitch_um: float
) -> dict[str, Any]:
    """Scale factors to write: those of small images that are written, and sizes that do not contradict the spots."""
    um_per_px = pitch_um / lattice.pitch_px
    sizes = {"bin_size_um": pitch_um, "microns_per_pixel": um_per_px}
    kept = {key: factors[key] for key, size in sizes.items() if key in factors and pitch.agree(factors[key], size)}
    kept |= {key: factors[key] for kind in small if (key := f"tissue_{kind}_scalef") in factors}
    fiducial = "fiducial_diameter_fullres"
    return kept | ({fiducial: factors[fiducial]} if fiducial in factors else {})
