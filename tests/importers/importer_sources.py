"""Simulated slices rewritten in the formats that import_slices.py reads, for the tests of the importers."""

import json
import shutil
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from PIL import Image

from utils.importers.legacy_st import read_counts, read_spots
from utils.slices import visium

PIXELS = ["pixel_x", "pixel_y"]


def image_of(folder: Path) -> Path:
    return next(folder.glob("*_he.jpg"))


def at_places(spots: pd.DataFrame, others: pd.DataFrame) -> np.ndarray:
    """Pixels (n, 2) of other places, by the map from places to pixels that the spots tell."""
    places, wanted = (np.column_stack([table[["x", "y"]], np.ones(len(table))]) for table in (spots, others))
    return wanted @ np.linalg.lstsq(places, spots[PIXELS].to_numpy(float), rcond=None)[0]


def write_legacy(folder: Path, sections: dict[str, Path], unselected=True, gene_header="") -> Path:
    """Slice folders as sections of the her2st form; a spot without counts and unselected ones are added to each."""
    for name in ("ST-cnts", "ST-spotfiles"):
        (folder / name).mkdir(parents=True)
    for name, root in sections.items():
        found = visium.read_slice(root)
        counts = pd.DataFrame(found.counts.toarray(), columns=found.genes)
        counts.index = found.spots["array_col"].astype(str) + "x" + found.spots["array_row"].astype(str)
        spots = found.spots.rename(columns={"array_col": "x", "array_row": "y"})
        spots = spots.rename(columns={"x_fullres_px": "pixel_x", "y_fullres_px": "pixel_y"})
        spots = spots.assign(new_x=spots["x"] + 0.01, new_y=spots["y"] - 0.01, selected=1)
        spots["pixel_x"] += np.resize([0.25, -0.25], len(spots))  # rounded away
        if unselected:
            row = int(spots["y"].max()) + 2
            extra = spots.iloc[[0, 1, 2]].assign(y=row, x=np.array([2, 4, 6]) + row % 2, selected=[0, 0, 1])
            extra[PIXELS] = at_places(spots, extra)
            spots = pd.concat([spots.iloc[::-1], extra])  # another order than the counts; the selected one has none
            line = counts.iloc[[0]].set_axis([f"{2 + row % 2}x{row}"])
            counts = pd.concat([line, counts, line.set_axis(["99x99"])])
        columns = ["x", "y", "new_x", "new_y", "pixel_x", "pixel_y", "selected"]
        spots[columns].to_csv(folder / "ST-spotfiles" / f"{name}_selection.tsv", sep="\t", index=False)
        counts.to_csv(folder / "ST-cnts" / f"{name}.tsv.gz", sep="\t", index_label=gene_header)
        (folder / "ST-imgs" / name[0] / name).mkdir(parents=True)
        shutil.copy(image_of(root), folder / "ST-imgs" / name[0] / name)
    return folder


def write_square_legacy(folder: Path, place_px=29.0, staggered=False, selected=True) -> Path:
    """A plain folder: 6 x 5 spots of 200 um (or the denser staggered array), four genes, one name twice."""
    folder.mkdir(parents=True)
    x, y = (axis.ravel() + 3 for axis in np.meshgrid(np.arange(6), np.arange(5)))
    if staggered:
        x, y = (axis[(x + y) % 2 == 0] for axis in (x, y))
    counts = np.random.default_rng(0).poisson(2, (len(x), 4))
    lines = [f"{a}x{b}\t" + "\t".join(map(str, row)) for a, b, row in zip(x, y, counts, strict=True)]
    (folder / "counts.tsv").write_text("\n".join(["\tA\tB\tA\tC", *lines]) + "\n")
    lines = [f"{a}\t{b}\t{a * place_px:.2f}\t{b * place_px:.2f}" for a, b in zip(x, y, strict=True)]
    (folder / "spots.tsv").write_text("\n".join(["x\ty\tpixel_x\tpixel_y", *lines]) + "\n")
    Image.effect_noise((300, 280), 50).convert("RGB").save(folder / "image.jpg")
    return folder


def legacy_counts(folder: Path, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of the her2st form as they stand: names, genes, counts."""
    names, genes, counts = read_counts(folder / "ST-cnts" / f"{name}.tsv.gz")
    assert set(read_spots(folder / "ST-spotfiles" / f"{name}_selection.tsv").columns) >= {"pixel_x", "selected"}
    return names, genes, counts.toarray()


def write_hd(folder: Path, root: Path, sizes=(8, 16), images=("hires", "lowres")) -> Path:
    """A Visium HD run: a simulated slice's spots as bins on a square array, parquet positions of fractions of a px."""
    found = visium.read_slice(root)
    n = int(np.ceil(np.sqrt(len(found.spots))))
    place = np.arange(len(found.spots))
    factors = visium.read_scalefactors(root)
    for size in sizes:
        square = folder / "binned_outputs" / f"square_{size:03d}um"
        (square / "spatial").mkdir(parents=True)
        shutil.copy(root / "filtered_feature_bc_matrix.h5", square)
        columns = {"barcode": found.spots.index, "in_tissue": (place > 2).astype("int32")}
        columns |= {"array_row": place // n, "array_col": place % n}
        columns |= {f"pxl_{a}_in_fullres": columns[f"array_{a}"] * size / 0.3 + 500 + 1 / 3 for a in ("row", "col")}
        pd.DataFrame(columns).to_parquet(square / "spatial" / "tissue_positions.parquet", index=False)
        content = factors | {"bin_size_um": float(size), "microns_per_pixel": 0.3, "spot_diameter_fullres": size / 0.3}
        (square / "spatial" / "scalefactors_json.json").write_text(json.dumps(content | {"note": "kept"}))
        for kind in images:
            shutil.copy(root / "spatial" / f"tissue_{kind}_image.png", square / "spatial")
    return folder


def to_anndata(root: Path, places=True) -> anndata.AnnData:
    """A simulated slice as scanpy would hold it, counts as float32."""
    found = visium.read_slice(root)
    obs = found.spots[["array_row", "array_col"]].copy() if places else pd.DataFrame(index=found.spots.index)
    var = pd.DataFrame({"gene_ids": found.gene_ids}, index=found.genes)
    adata = anndata.AnnData(found.counts.astype(np.float32), obs=obs, var=var)
    adata.obsm["spatial"] = found.spots[["x_fullres_px", "y_fullres_px"]].to_numpy()
    return adata


def write_hest(folder: Path, samples: dict[str, Path], um_per_px=1.0) -> Path:
    """Slice folders in the layout of HEST-1k: st, wsis (TIFF with its pixel size), metadata, patches."""
    import h5py

    for name in ("st", "wsis", "metadata", "patches"):
        (folder / name).mkdir(parents=True)
    for name, root in samples.items():
        adata = to_anndata(root, places=False)
        adata.write_h5ad(folder / "st" / f"{name}.h5ad")
        write_tiff(folder / "wsis" / f"{name}.tif", image_of(root), um_per_px)
        metadata = {"id": name, "patient": f"Patient {name}", "inter_spot_dist": 100.0, "spot_diameter": 55.0}
        metadata |= {"pixel_size_um_estimated": um_per_px, "pixel_size_um_embedded": None}
        (folder / "metadata" / f"{name}.json").write_text(json.dumps(metadata))
        with h5py.File(folder / "patches" / f"{name}.h5", "w") as file:
            file["barcode"] = np.array([[b.encode()] for b in adata.obs_names[:50]])
    return folder


def write_tiff(path: Path, image: Path, um_per_px: float) -> Path:
    """An image as plain TIFF that states the size of its pixels."""
    dots = 10000 / um_per_px
    Image.open(image).convert("RGB").save(path, resolution_unit=3, x_resolution=dots, y_resolution=dots)
    return path


def write_zarr(path: Path, root: Path, element="circles", scale=2.0, n_images=1) -> Path:
    """A simulated slice as SpatialData: spots in um at `scale` um per px, the image under the same scale."""
    from spatialdata.transformations import Scale

    pixels = np.asarray(Image.open(image_of(root)).convert("RGB"))
    to_um, small = (Scale([factor, factor], axes=("x", "y")) for factor in (scale, scale * 4))
    images = {f"he{i}": (pixels, {"global": to_um}, {"scale_factors": [2]}) for i in range(n_images)}
    images |= {"small": (pixels[::4, ::4], {"global": small}, {})} if n_images else {}
    return write_spatialdata(path, {"spots": root}, images, element, scale)


def write_spatialdata(
    path: Path, roots: dict[str, Path], images, element="circles", scale=1.0, tables=("table",)
) -> Path:
    """Simulated slices by region, spots at `scale` units per px, as one table or the same table several times.

    `images`: name -> pixels (h, w, C), transformations, further arguments of the image model.
    """
    import spatialdata
    from spatialdata.models import Image2DModel, PointsModel, ShapesModel, TableModel
    from spatialdata.transformations import Identity

    shapes, points, parts = {}, {}, []
    for region, root in roots.items():
        adata = to_anndata(root)
        xy = adata.obsm.pop("spatial") * scale
        keys = np.arange(len(xy))[::-1] + 5  # neither the order of the table nor its names
        adata.obs["region"], adata.obs["key"] = region, keys
        frame = pd.DataFrame(xy, columns=["x", "y"], index=keys).sort_index()
        place = {"transformations": {"global": Identity()}}
        if element == "circles":
            xy_sorted = frame.to_numpy()
            shapes[region] = ShapesModel.parse(xy_sorted, geometry=0, radius=27.5, index=frame.index, **place)
        else:
            points[region] = PointsModel.parse(frame, **place)
        parts.append(adata)
    joined = parts[0] if len(parts) == 1 else anndata.concat(parts, index_unique="-", merge="same")
    joined.obs["region"] = joined.obs["region"].astype("category")
    table = TableModel.parse(joined, region=list(roots), region_key="region", instance_key="key")
    models = {
        name: Image2DModel.parse(pixels, dims=("y", "x", "c"), transformations=to, **more)
        for name, (pixels, to, more) in images.items()
    }
    tables = dict.fromkeys(tables, table)
    spatialdata.SpatialData(images=models, shapes=shapes, points=points, tables=tables).write(path)
    return path


def assert_same_slice(out: Path, root: Path, barcodes=None, ids=True) -> visium.Slice:
    """A written slice holds the counts, genes, places and pixels of the slice that it was made from."""
    found, source = visium.read_slice(out), visium.read_slice(root)
    assert (found.counts != source.counts).nnz == 0 and found.counts.dtype == source.counts.dtype
    np.testing.assert_array_equal(found.genes, source.genes)
    np.testing.assert_array_equal(found.gene_ids, source.gene_ids if ids else source.genes)
    np.testing.assert_array_equal(found.spots.index, source.spots.index if barcodes is None else barcodes)
    np.testing.assert_array_equal(found.spots.to_numpy(), source.spots.to_numpy())
    assert not any(found.unmatched.values())
    return found
