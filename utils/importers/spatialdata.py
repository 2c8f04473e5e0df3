"""SpatialData: a .zarr with a table of counts that annotates circles, points or squares, and an H&E image.

Shapes: S spots. Spots and images lie in coordinate systems of their own; spots are moved into the pixels of the H&E.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from utils.importers import anndata_sections as sections
from utils.importers.anndata_slice import from_anndata
from utils.importers.images import image_size, make_thumbnail, to_rgb
from utils.importers.source import Source, found_in, lie_on
from utils.slices import checks
from utils.slices.matrix import reading

OF_COUNTS = re.compile(r"(X|raw/X|layers/[^/]+)/(data|indices)")  # of a table
BIN = re.compile(r"_(\d{3})um$")
# Words in the names of images that are not the H&E, and of those that are
OTHERS = {"cytassist", "lowres", "thumbnail", "dapi", "if", "fluorescence", "hoechst", "alignment"}
OTHERS |= {"fiducials", "detected", "label", "macro", "mask", "overview"}
REDUCED, HISTOLOGY = {"hires", "downscaled"}, {"he", "hne", "full", "fullres", "histology", "brightfield"}
NUMBERED = re.compile(r"(c|ch|channel)?[\W_]*\d+([\W_]\d+)*", re.IGNORECASE)  # channels without a name
SAME_SCALE = 0.01  # scales that differ by less are one
SAME_RATIO = 0.005  # of width and height, of two versions of one image


def _open(source: Path) -> Any:
    try:
        import spatialdata
    except ImportError as error:
        raise ValueError(
            f"{source}: expected the package spatialdata, which reads it, found none; pip install 'spatialdata>=0.5'"
        ) from error
    if not source.is_dir():
        raise ValueError(
            f"{source}: expected the folder of a SpatialData zarr, found {found_in(source)}; correct SOURCE"
        )
    with reading(source, "a SpatialData zarr"):
        return spatialdata.read_zarr(source)


def choose_table(source: Path, data: Any, bin_um: int | None) -> str:
    """Name of the one table of spots or bins, or of the one whose name ends with the bin size (square_016um)."""
    names = list(data.tables)
    if bin_um is not None:
        wanted = f"one table that ends with _{bin_um:03d}um"
        names = [name for name in names if name.endswith(f"_{bin_um:03d}um")]
    else:
        wanted = "one table of spots"
        located = {*data.shapes, *data.points}
        names = [name for name in names if len(names) == 1 or located & set(_regions(data.tables[name]))]
    if len(names) != 1:
        how = "choose one with --bin" if any(map(BIN.search, data.tables)) else "keep that of the spots"
        raise ValueError(f"{source}: expected {wanted}, found {', '.join(data.tables) or 'none'}; {how}")
    return names[0]


def check_chunks(source: Path, table_name: str) -> None:
    """Raises ValueError where chunks of sparse counts are missing, which zarr reads as zeros: other genes, no counts.

    Writers leave out chunks of zeros, which other arrays may have.
    """
    import zarr

    with reading(source, "a SpatialData zarr"):
        table: Any = zarr.open_group(source, mode="r")[f"tables/{table_name}"]
        arrays = [array for name, array in table.members(max_depth=None) if OF_COUNTS.fullmatch(name)]
        chunks = [(array.path, array.nchunks, array.nchunks_initialized) for array in arrays]
    for name, expected, found in chunks:
        if found < expected:
            raise ValueError(f"{source}: expected {expected} chunks of {name}, found {found}; copy the zarr again")


def _regions(table: Any) -> list[str]:
    """Elements that a table annotates."""
    region = table.uns.get("spatialdata_attrs", {}).get("region")
    return [region] if isinstance(region, str) else [str(name) for name in region] if region is not None else []


def _parts(source: Path, table: Any, library_key: str | None, name: str) -> list[tuple[str, np.ndarray]]:
    """Name and rows (S,) bool of each slice: all, or those of each value of a column."""
    if library_key is not None:
        return sections.split(str(source), table, library_key, name)
    key = table.uns.get("spatialdata_attrs", {}).get("region_key")
    regions = _regions(table) if key not in table.obs else list(dict.fromkeys(table.obs[key].astype(str)))
    if len(regions) > 1:
        found = ", ".join(regions)
        raise ValueError(
            f"{source}: expected a table of one section, found {found}; split them with --library_key {key}"
        )
    return [(name, np.ones(table.n_obs, bool))]


def _centres(source: Path, data: Any, table: Any) -> tuple[str, np.ndarray, float | None]:
    """Name of the element that a table annotates, centres (S, 2) of its rows in its own units, mean diameter."""
    attrs = table.uns.get("spatialdata_attrs", {})
    region_key, key = attrs.get("region_key"), attrs.get("instance_key")
    regions = list(dict.fromkeys(table.obs[region_key].astype(str))) if region_key in table.obs else _regions(table)
    elements = [name for name in regions if name in data.shapes or name in data.points]
    if len(regions) != 1 or not elements:
        found = ", ".join(map(str, regions)) or "no region"
        raise ValueError(
            f"{source}: expected a table that annotates one element of circles or points, found {found}; write its "
            "region into uns['spatialdata_attrs']"
        )
    diameter = None
    if elements[0] in data.shapes:
        element = data.shapes[elements[0]]
        centres = np.column_stack([element.geometry.centroid.x, element.geometry.centroid.y])
        sides = 2 * element["radius"] if "radius" in element else np.sqrt(element.geometry.area)
        diameter, index = float(sides.mean()) or None, element.index
    else:
        element = data.points[elements[0]]
        frame = element[["x", "y"]].compute()
        centres, index = frame.to_numpy(float), frame.index
    place = index.get_indexer(table.obs[key])
    if (place < 0).any() or not index.is_unique:
        missing = table.obs[key][place < 0].tolist()[:1] or ["repeated names"]
        raise ValueError(
            f"{source}: expected every row of the table in {elements[0]}, found {missing[0]} that is not; subset the "
            "table to that element"
        )
    return elements[0], centres[place], diameter


@dataclass(frozen=True)
class Candidate:
    """An RGB image that spots lie on.

    Attributes
    ----------
    name : str
    pixels : DataArray, its finest level
    affine : ndarray (3, 3), from the units of the spots to its pixels
    """

    name: str
    pixels: Any
    affine: np.ndarray

    @property
    def words(self) -> set[str]:
        return {word for word in re.split(r"[\W_]+", self.name.lower()) if word}

    @property
    def size(self) -> tuple[int, int]:
        return int(self.pixels.sizes["x"]), int(self.pixels.sizes["y"])

    @property
    def scale(self) -> float:
        """Its pixels per unit of the spots."""
        return float(np.sqrt(abs(np.linalg.det(self.affine[:2, :2]))))

    def read(self, step: int = 1) -> tuple[np.ndarray, str | None]:
        """Every `step`-th pixel of both axes as RGB (h, w, 3) uint8, and a note where their depth was measured."""
        channels = self.pixels.transpose("y", "x", "c")[::step, ::step].to_numpy()
        return to_rgb(self.name, channels[..., _rgb_order(self.pixels)])


def find_candidates(data: Any, element: Any, centres: np.ndarray) -> list[Candidate]:
    """The images of red, green and blue in a coordinate system with the spots that all but a few spots lie on."""
    import spatialdata
    from spatialdata.transformations import get_transformation_between_coordinate_systems as between

    candidates = []
    for name, image in data.images.items():
        pixels = image if hasattr(image, "transpose") else spatialdata.get_pyramid_levels(image, n=0)
        if _rgb_order(pixels) is None:
            continue
        try:
            affine = between(data, element, image).to_affine_matrix(("x", "y"), ("x", "y"))
        except (ValueError, RuntimeError, KeyError):  # in no system with the spots
            continue
        candidate = Candidate(name, pixels, np.asarray(affine, float))
        if lie_on(moved(centres, candidate.affine), candidate.size):
            candidates.append(candidate)
    return candidates


def moved(xy: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Points (S, 2) by a matrix (3, 3)."""
    return xy @ affine[:2, :2].T + affine[:2, 2]


def _rgb_order(pixels: Any) -> list[int] | None:
    """Channels in the order red, green, blue (, alpha); None where they are others."""
    names = [str(name).strip().lower() for name in pixels.coords["c"].to_numpy()] if "c" in pixels.coords else []
    n_channels = pixels.sizes["c"]
    if n_channels not in (3, 4):
        return None
    if not names or all(NUMBERED.fullmatch(name) for name in names):
        return list(range(n_channels))
    order = [next((i for i, name in enumerate(names) if name in (c[0], c)), -1) for c in ("red", "green", "blue")]
    alpha = [i for i, name in enumerate(names) if name in ("a", "alpha")]
    return order + alpha if -1 not in order else None


def choose_image(source: Path, candidates: list[Candidate], region: str) -> Candidate | None:
    """The H&E in full resolution: not one that its name calls otherwise, and of the spots' scale or the finest.

    Where the sections of a file lie on each other, an image is of the `region` that its name begins with. Raises
    ValueError where several are left.
    """
    left = [image for image in candidates if not image.words & OTHERS]
    left = [image for image in left if image.name.startswith(region)] or left
    left = [image for image in left if not image.words & REDUCED] or left
    if not left:
        return None
    finest = max(image.scale for image in left)
    for scale in (1.0, finest):
        alike = [image for image in left if abs(image.scale - scale) <= SAME_SCALE * scale]
        named = [image for image in alike if image.words & HISTOLOGY]
        if len(alike) == 1 or len(named) == 1:
            return (named if len(named) == 1 else alike)[0]
        if alike:
            break
    names = ", ".join(image.name for image in candidates)
    raise ValueError(f"{source}: expected one H&E image that the spots lie on, found {names}; save it without the rest")


def image_of_file(source: Path, image: Path, candidates: list[Candidate]) -> Candidate:
    """The image of the zarr that a file is, in its size or a larger one; its `affine` is to the pixels of the file.

    Raises ValueError where there is none, or where the file shows something else.
    """
    width, height = image_size(image)
    left = [shown for shown in candidates if not shown.words & OTHERS] or candidates
    for shown in sorted(left, key=lambda shown: (shown.size != (width, height), -shown.scale)):
        ratio = width / height * shown.size[1] / shown.size[0]
        if shown.size == (width, height) or (width > shown.size[0] and abs(ratio - 1) <= SAME_RATIO):
            to_file = np.diag([width / shown.size[0], height / shown.size[1], 1.0])
            return replace(shown, affine=to_file @ shown.affine)
    wanted = " or ".join(f"{shown.size[0]} x {shown.size[1]}" for shown in left)
    raise ValueError(
        f"--image {image}: expected {wanted} px, as in {source}, or larger in that ratio, found {width} x {height} px; "
        "give the image of that section"
    )


def _check_content(image: Path, shown: Candidate) -> list[str]:
    """Warnings where a file differs from the image of the zarr. Raises ValueError where it shows something else."""
    step = max(1, max(shown.size) // checks.THUMBNAIL_PX)
    pixels = make_thumbnail(image, checks.THUMBNAIL_PX).pixels
    return checks.check_content(image, pixels, shown.read(step)[0], shown.name)


def read_part(
    source: Path, data: Any, table: Any, name: str, image: Path | None, pitch_um: float | None, is_hd: bool
) -> Source:
    """The slice of the rows of a table that annotate one element.

    Parameters
    ----------
    source, data : the zarr, and what it holds
    table, name : AnnData of the rows (S, ...), and the name of the slice
    image : a file in place of the image in the zarr
    pitch_um : distance between neighbouring spots, where it is given
    is_hd : whether the spots are bins of Visium HD
    """
    region, centres, diameter = _centres(source, data, table)
    with reading(source, "images of SpatialData"):
        candidates = find_candidates(data, data[region], centres)
    pixels: Path | np.ndarray | None = image
    affine, notes, warnings = np.eye(3), [], []
    if image is not None and candidates:
        shown = image_of_file(source, image, candidates)
        affine, warnings = shown.affine, _check_content(image, shown)
    elif image is None and data.images:
        chosen = choose_image(source, candidates, region)
        if chosen is None:
            found = ", ".join(data.images)
            raise ValueError(f"{source}: expected an H&E that the spots lie on, found {found}; name it with --image")
        affine = chosen.affine
        notes += [f"H&E: {chosen.name}"] if len(data.images) > 1 else []
        with reading(source, "images of SpatialData"):
            pixels, note = chosen.read()
        notes += [note] if note else []
    scale = float(np.sqrt(abs(np.linalg.det(affine[:2, :2]))))
    diameter_px = None if diameter is None else diameter * scale
    slice_ = from_anndata(table, name, source, moved(centres, affine), pixels, pitch_um, diameter_px=diameter_px)
    slice_.notes += notes
    slice_.warnings += warnings
    if is_hd:
        slice_.lattice = replace(slice_.lattice, mirrored=False)  # that array is a mirror image of the pixels by itself
    return slice_


def read_spatialdata(
    source: Path,
    image: Path | None = None,
    pitch_um: float | None = None,
    bin_um: int | None = None,
    library_key: str | None = None,
) -> Iterator[Source]:
    """The slices of a SpatialData zarr, named after its folder or after the values of `library_key`.

    Parameters
    ----------
    source : the .zarr
    image : the H&E as a file: it is copied in place of the image in the zarr, of which it has the sides or their ratio
    pitch_um : distance between neighbouring spots; default 100 on a staggered array, else the bin size of the table
    bin_um : which table, where there is one per bin size of Visium HD
    library_key : column of the table's obs with the section of each spot, where it annotates several
    """
    data = _open(source)
    table_name = choose_table(source, data, bin_um)
    check_chunks(source, table_name)
    table, of_bins = data.tables[table_name], BIN.search(table_name)
    pitch_um = pitch_um or (float(of_bins[1]) if of_bins else None)
    name = source.absolute().name.removesuffix(".zarr")
    parts = _parts(source, table, library_key, name)
    if image is not None and len(parts) > 1:
        found = f"{len(parts)} in obs['{library_key}']"
        raise ValueError(f"--image {image}: expected the image of one section, found {found}; import without --image")
    for part_name, rows in parts:  # one after the other: each holds its image
        part = table if rows.all() else table[rows]
        yield read_part(source, data, part, part_name, image, pitch_um, of_bins is not None)
