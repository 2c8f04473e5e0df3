"""Writes one simulated slice as Space Ranger would, and the truth beside it.

Shapes: S spots; G genes; K programmes.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image
from scipy.sparse import csr_matrix

from utils.files.atomic import write_record
from utils.simulation.counts import PROGRAMMES, Genes
from utils.simulation.image import Scene
from utils.slices.matrix import CountMatrix, write_matrix
from utils.slices.spatial_files import POSITION_COLUMNS

SPOT_UM, FIDUCIAL_UM = 65.0, 105.0  # the diameters that Space Ranger writes, whatever the spots' real size
CEILING = (
    "ceiling_lognorm and ceiling_residuals: per gene, over the spots of this slice, the Pearson correlation between "
    "the measured value and its best prediction from the image, which is the mean over {redraws} redraws of the "
    "counts from the distribution that the image determines (random depth redrawn too; 64 redraws leave the ceiling "
    "about 2 % too low). lognorm is log1p of counts per 10,000 of the spot; residuals are analytic Pearson residuals "
    "over all genes of the slice (theta 100, clipped at the root of the number of spots). NaN: a gene not seen here."
)


def write_counts(path: Path, counts: np.ndarray, barcodes: pd.Index, names: list[str], about: dict[str, Any]) -> None:
    """Counts (S, G) as Space Ranger's `filtered_feature_bc_matrix.h5`; `about`: attributes of the file."""
    # Numbers that Ensembl has not given out: the names may be real, the genes are not.
    ids = np.array([f"ENSG9{g:010d}" for g in range(1, len(names) + 1)])
    matrix = CountMatrix(csr_matrix(counts), barcodes.to_numpy(), np.array(names), ids)
    write_matrix(path, matrix, {"chemistry_description": "Spatial 3' v1"} | about, genome="GRCh38")


def write_spatial(folder: Path, grid: pd.DataFrame, scene: Scene, header: bool) -> None:
    """The `spatial/` folder: positions (Space Ranger 2 has a header, 1 none), scale factors, the two small images."""
    folder.mkdir()
    name = "tissue_positions.csv" if header else "tissue_positions_list.csv"
    grid[list(POSITION_COLUMNS)].to_csv(folder / name, index=False, header=header)
    image = Image.fromarray(scene.image)
    scales = {}
    for kind, longest in (("hires", 2000), ("lowres", 600)):
        scales[kind] = min(1.0, longest / max(image.size))
        small = image.resize([round(side * scales[kind]) for side in image.size], Image.Resampling.LANCZOS)
        small.save(folder / f"tissue_{kind}_image.png", compress_level=1)
    factors = {
        f"{what}_diameter_fullres": um / scene.um_per_px for what, um in (("spot", SPOT_UM), ("fiducial", FIDUCIAL_UM))
    }
    factors |= {f"tissue_{kind}_scalef": scale for kind, scale in scales.items()}
    write_record(folder / "scalefactors_json.json", factors)


def write_truth(
    path: Path,
    fractions: np.ndarray,
    spots: pd.DataFrame,
    activity: np.ndarray,
    genes: Genes,
    columns: dict[str, np.ndarray],
    redraws: int,
) -> None:
    """What drove the counts, as AnnData: X expected fractions (S, G), obs morphology and depth, var loadings and more.

    `spots` has the barcodes as its index and the columns that go into obs; `activity` (S, K) goes into obsm, and
    `columns`, (G,) each, into var.
    """
    import anndata  # a second to import: not before it is needed

    var = pd.DataFrame(genes.loadings.T, index=genes.names, columns=[f"loading_{name}" for name in PROGRAMMES])
    var = var.assign(**columns)
    truth = anndata.AnnData(fractions.astype(np.float32), obs=spots, var=var)
    truth.obsm["programmes"] = activity.astype(np.float32)
    truth.obsm["spatial"] = spots[["pxl_col_in_fullres", "pxl_row_in_fullres"]].to_numpy(float)
    about = {"what": "simulated slice: X is each gene's expected fraction of the spot's counts (obs['depth'] UMIs)"}
    truth.uns["magic"] = about | {"ceiling": CEILING.format(redraws=redraws), "programmes": list(PROGRAMMES)}
    truth.write_h5ad(path)
