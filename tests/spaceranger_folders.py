"""Small Space Ranger folders, written by hand for the tests of the readers."""

import gzip
import json

import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.io
import scipy.sparse as sp

COUNTS = np.array([[0, 3, 1, 0], [2, 0, 0, 5], [0, 0, 0, 7], [1, 1, 1, 1]], dtype=np.int32)  # spots x genes
BARCODES = [f"{letter * 16}-1" for letter in "ACGT"]
GENES = ["EPCAM", "TP53", "GAPDH", "TP53"]
IDS = [f"ENSG{i}" for i in range(4)]
SCALES = {"tissue_hires_scalef": 0.2, "tissue_lowres_scalef": 0.06, "spot_diameter_fullres": 65.0, "note": "text"}
HEADER = "barcode,in_tissue,array_row,array_col,pxl_row_in_fullres,pxl_col_in_fullres"


def position_lines(barcodes=BARCODES, in_tissue=(1, 1, 1, 1)):
    """A square of four spots, 100 px apart: array (0, 0), (0, 1), (1, 0), (1, 1)."""
    places = [(0, 0), (0, 1), (1, 0), (1, 1)]
    rows = zip(barcodes, in_tissue, places, strict=True)
    return [f"{b},{t},{r},{c},{1000 + 100 * r},{2000 + 100 * c}" for b, t, (r, c) in rows]


def write_spatial(root, lines=None, form="list", scales=SCALES):
    spatial = root / "spatial"
    spatial.mkdir(parents=True, exist_ok=True)
    lines = position_lines() if lines is None else lines
    if form == "parquet":
        table = pd.DataFrame([line.split(",") for line in lines], columns=HEADER.split(","))
        table = table.astype(dict.fromkeys(table.columns[1:4], "int32") | dict.fromkeys(table.columns[4:], "float64"))
        table.to_parquet(spatial / "tissue_positions.parquet", index=False)
    elif form == "header":
        (spatial / "tissue_positions.csv").write_text("\n".join([HEADER, *lines]) + "\n")
    else:
        (spatial / "tissue_positions_list.csv").write_text("\n".join(lines) + "\n")
    (spatial / "scalefactors_json.json").write_text(json.dumps(scales))
    return spatial


def write_h5(path, counts=COUNTS, barcodes=BARCODES, kinds=None, dtype=None, group="matrix"):
    """The 10x v3 schema: genes x barcodes, by column."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = sp.csc_matrix(np.asarray(counts).T)
    with h5py.File(path, "w") as file:
        matrix = file.create_group(group)
        matrix["data"] = columns.data.astype(dtype or columns.data.dtype)
        matrix["indices"], matrix["indptr"], matrix["shape"] = columns.indices, columns.indptr, columns.shape
        matrix["barcodes"] = np.array(barcodes, dtype="S")
        features = {"name": GENES, "id": IDS, "feature_type": kinds or ["Gene Expression"] * len(GENES)}
        for key, values in features.items():
            matrix[f"features/{key}"] = np.array(values, dtype="S")
    return path


def write_folder(folder, zipped, columns=3, barcodes=BARCODES):
    folder.mkdir(parents=True)
    features = [IDS, GENES, ["Gene Expression"] * 4][:columns] if columns > 1 else [GENES]
    texts = {
        "features.tsv": "".join("\t".join(line) + "\n" for line in zip(*features, strict=True)),
        "barcodes.tsv": "".join(f"{barcode}\n" for barcode in barcodes),
    }
    scipy.io.mmwrite(folder / "matrix.mtx", sp.coo_matrix(COUNTS.T))
    texts["matrix.mtx"] = (folder / "matrix.mtx").read_text()
    for name, text in texts.items():
        if zipped:
            (folder / name).unlink(missing_ok=True)
            (folder / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
        else:
            (folder / name).write_text(text)
    return folder


def refused(match, function, *args, **kwargs):
    """The error is one line and says what it should."""
    with pytest.raises(ValueError, match=match) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)
