"""SpatialData: a .zarr with a table of counts that annotates circles, points or squares, and an H&E image.

Shapes: S spots.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from utils.importers.base import Source
from utils.importers.files import size_of
from utils.importers.h5ad import from_anndata
from utils.slices.matrix import reading


def _open(source: Path) -> Any:
    try:
        import spatialdata
    except ImportError as error:
        raise ValueError(
            f"{source}: SpatialData needs `pip install 'spatialdata>=0.5'`, found no such package"
        ) from error
    if not source.is_dir():
        raise ValueError(
            f"{source}: expected the folder of a SpatialData zarr, found {'a file' if source.exists() else 'nothing'}"
        )
    with reading(source, "a SpatialData zarr"):
        return spatialdata.read_zarr(source)


def choose_table(source: Path, data: Any, bin_um: int | None) -> Any:
    """The one table with counts, or the one whose name ends with the bin size (square_016um)."""
    names = [name for name in data.tables if bin_um is None or name.endswith(f"_{bin_um:03d}um")]
    if len(names) != 1:
        wanted = "one table" if bin_um is None else f"one table that ends with _{bin_um:03d}um"
        raise ValueError(
            f"{source}: expected {wanted}, found {', '.join(data.tables) or 'none'}; choose one with --bin"
        )
    return data.tables[names[0]]


def choose_image(source: Path, data: Any) -> tuple[Any, np.ndarray] | None:
    """The largest image with three or four channels of 8 bits, and its pixels (height, width, 3) uint8."""
    import spatialdata

    found = []
    for element in data.images.values():
        whole = element if hasattr(element, "transpose") else spatialdata.get_pyramid_levels(element, n=0)
        if whole.sizes["c"] in (3, 4) and whole.dtype == np.uint8:
            found.append((whole.sizes["x"] * whole.sizes["y"], element, whole))
    found.sort(key=lambda one: -one[0])
    if len(found) > 1 and found[0][0] == found[1][0]:
        names = ", ".join(data.images)
        raise ValueError(
            f"{source}: expected one H&E image, found several of one size ({names}); save it without the rest"
        )
    if not found:
        return None
    _, element, whole = found[0]
    pixels = whole.transpose("y", "x", "c").isel(c=slice(3)).to_numpy()
    return element, np.ascontiguousarray(pixels)


def _centres(source: Path, data: Any, table: Any) -> tuple[Any, np.ndarray, float | None]:
    """The element that a table annotates, centres (S, 2) of its rows in the element's own units, mean diameter."""
    region, key = (table.uns.get("spatialdata_attrs", {}).get(name) for name in ("region", "instance_key"))
    regions = [region] if isinstance(region, str) else list(region or [])
    elements = [name for name in regions if name in data.shapes or name in data.points]
    if len(regions) != 1 or not elements:
        found = ", ".join(map(str, regions)) or "no region"
        raise ValueError(f"{source}: expected a table that annotates one element of circles or points, found {found}")
    diameter = None
    if elements[0] in data.shapes:
        element = data.shapes[elements[0]]
        centres = np.column_stack([element.geometry.centroid.x, element.geometry.centroid.y])
        diameter = 2 * float(element["radius"].mean()) if "radius" in element else None
        index = element.index
    else:
        element = data.points[elements[0]]
        frame = element[["x", "y"]].compute()
        centres, index = frame.to_numpy(float), frame.index
    place = index.get_indexer(table.obs[key])
    if (place < 0).any() or not index.is_unique:
        missing = table.obs[key][place < 0].tolist()[:1] or ["repeated names"]
        raise ValueError(f"{source}: expected every row of the table in {elements[0]}, found {missing[0]} that is not")
    return element, centres[place], diameter


def read_spatialdata(
    source: Path, image: Path | None = None, pitch_um: float | None = None, bin_um: int | None = None
) -> Iterator[Source]:
    """The slice of a SpatialData zarr, named after its folder.

    Parameters
    ----------
    source : the .zarr
    image : the same picture as a file, with the same pixels: it is copied in place of the image in the zarr
    pitch_um : distance between neighbouring spots; default 100 on a staggered array, else the bin size of --bin
    bin_um : which table, where there is one per bin size of Visium HD
    """
    data = _open(source)
    table = choose_table(source, data, bin_um)
    element, centres, diameter = _centres(source, data, table)
    chosen = choose_image(source, data)
    scale = 1.0
    if chosen is not None:
        from spatialdata.transformations import get_transformation_between_coordinate_systems

        with reading(source, "spots and image in one coordinate system"):
            between = get_transformation_between_coordinate_systems(data, element, chosen[0])
        affine = between.to_affine_matrix(("x", "y"), ("x", "y"))
        centres = centres @ affine[:2, :2].T + affine[:2, 2]
        scale = float(np.sqrt(abs(np.linalg.det(affine[:2, :2]))))
        if image is not None and size_of(image) != size_of(chosen[1]):
            wanted, found = (" x ".join(map(str, size_of(one))) for one in (chosen[1], image))
            raise ValueError(f"--image {image}: expected {wanted} px, as the image in {source}, found {found} px")
    picture = image if image is not None or chosen is None else chosen[1]
    name = source.absolute().name.removesuffix(".zarr")
    diameter_px = None if diameter is None else diameter * scale
    yield from_anndata(table, name, source, centres, picture, pitch_um or bin_um, diameter_px=diameter_px)
