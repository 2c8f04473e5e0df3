"""Which folder of Space Ranger's is a slice, and what others are in its place.

A slice folder is the one that holds spatial/, its parent's outs/, or one bin size of Visium HD.
"""

from __future__ import annotations

from pathlib import Path

from utils.slices.matrix import MATRICES, first_of, listing

POSITION_FILES = ("tissue_positions.csv", "tissue_positions.parquet", "tissue_positions_list.csv")
SCALEFACTORS = "scalefactors_json.json"
HIRES, LOWRES = "tissue_hires_image.png", "tissue_lowres_image.png"
SPATIAL_FILES = (*POSITION_FILES, SCALEFACTORS, HIRES, LOWRES)


def _roots(folder: Path) -> list[Path]:
    """Folders that may be meant; more than one where Visium HD was binned at several sizes."""
    for base in (folder, folder / "outs"):
        bins = sorted(p.parent for p in base.glob("binned_outputs/square_*um/spatial") if p.is_dir())
        # Visium HD writes a spatial/ without positions above its bins: that one is not meant.
        if (base / "spatial").is_dir() and (not bins or first_of(base / "spatial", POSITION_FILES)):
            return [base]
        if bins:
            return bins
    return []


def find_root(folder: str | Path) -> Path:
    """Find the folder that holds spatial/: the folder itself, its outs/ or its only binned_outputs/square_*um."""
    folder = Path(folder)
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing"
        raise ValueError(f"{folder}: expected a slice folder, found {found}; correct the path")
    roots = _roots(folder)
    if len(roots) > 1:
        bins = ", ".join(f"{folder.name}/{root.relative_to(folder).as_posix()}" for root in roots)
        raise ValueError(f"{folder}: expected one bin size, found {bins}; put one into the slice column of slices.csv")
    if not roots or first_of(roots[0] / "spatial", POSITION_FILES) is None:
        reason = why_no_slice(folder)
        if reason is not None:
            raise ValueError(f"{folder}: {reason}")
    if not roots:
        wanted = "spatial/ (here, in outs/ or in binned_outputs/square_*um): a matrix without positions is no slice"
        raise ValueError(f"{folder}: expected {wanted}; found {listing(folder)}; add the spatial folder")
    return roots[0]


def is_slice(folder: str | Path) -> bool:
    """Whether a folder looks like a slice; one with several bin sizes does, and find_root then names them."""
    return bool(_roots(Path(folder)))


def why_no_slice(folder: Path) -> str | None:
    """What a folder holds in place of a slice, and what to do; None where it looks like nothing that is known."""
    places = [place for place in (folder, folder / "outs", folder / "spatial") if place.is_dir()]
    names = [path.name for place in places for path in sorted(place.iterdir())]
    if any(
        name in ("segmented_outputs", "cell_segmentations.geojson") or "feature_cell_matrix" in name for name in names
    ):
        return (
            "expected spots or bins, found segmented cells (segmented_outputs of Space Ranger 4) without spots; use a "
            "run with binned_outputs/ and give one bin size, such as binned_outputs/square_016um"
        )
    if {"aggregation.csv", "aggregation_csv.csv", "aggr_tissue_positions.csv"} & set(names):
        return (
            "expected one section, found several joined by spaceranger aggr; give the outs/ of each section's own "
            "spaceranger count run"
        )
    kept = [path.name for place in places for path in sorted(place.iterdir()) if _is_as_geo_keeps_it(path)]
    if kept:
        return (
            f"expected spatial/ with {POSITION_FILES[0]}, {SCALEFACTORS} and {HIRES}, unpacked, found "
            f"{', '.join(kept[:3])} as in a GEO download (.gz, prefixes, no folders); gunzip them, cut "
            "their names back to Space Ranger's and move those of the image and the positions into spatial/"
        )
    return None


def _is_as_geo_keeps_it(path: Path) -> bool:
    """Whether a path is an archive, or one of Space Ranger's with a prefix, packed, or of spatial/ and not in it."""
    if path.name.lower().endswith((".tar.gz", ".tgz", ".tar", ".zip")):
        return True
    published, inside = _published_name(path.name), path.parent.name == "spatial"
    if published not in SPATIAL_FILES:  # none of ours, or a matrix, whose own name may be a good one
        return published is not None and published != path.name and not inside
    return published != path.name or not inside


def _published_name(name: str) -> str | None:
    """Space Ranger's name for spatial/, a file of it or a matrix that has a prefix or is packed."""
    plain = name.removesuffix(".gz")
    known = (*SPATIAL_FILES, *MATRICES, "spatial", "matrix.mtx", "features.tsv", "barcodes.tsv")
    return next((file for file in known if plain == file or plain.endswith(("_" + file, "-" + file, "." + file))), None)
