"""Simulated slices: Space Ranger folders of which everything is known, for the demo, the tests and the benchmarks.

A piece of tumour is drawn in haematoxylin and eosin (`tissue`, `image`); what a tile shows drives the genes of its spot
(`counts`). Beside the files of Space Ranger, `truth.h5ad` holds what no experiment measures: the expected fractions,
the morphology, the gene programmes and how well each gene can be predicted at all.

Shapes: S spots; G genes; K programmes.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from utils.files.atomic import write_whole
from utils.simulation import counts as counting
from utils.simulation.files import write_counts, write_spatial, write_truth
from utils.simulation.image import measure_tiles, paint
from utils.simulation.tissue import Recipe, at, grow_tissue

PITCH_UM = 100.0  # between the centres of neighbouring spots
TISSUE_FRACTION = 0.62  # of the spots on the grid
REDRAWS = 64
UMIS_PER_GENE = (2.5, 12.0)  # median of a spot, of the patient with the poorest and with the richest slices


@dataclass
class Plan:
    """One slice that is to be written: whose it is, what it is made of, and its own stream of random numbers.

    `median_umis` per spot; `offset` (G,) the patient's log offset of each gene; `header`: positions as Space Ranger 2
    writes them (else as version 1 does).
    """

    name: str
    patient: str
    part: str
    recipe: Recipe
    median_umis: float
    offset: np.ndarray
    header: bool
    rng: np.random.Generator


def visium_grid(n_spots: int) -> tuple[pd.DataFrame, tuple[float, float]]:
    """Staggered grid with room for `n_spots` under tissue, and the height and width in um of an image that holds it.

    Columns: `barcode`, `array_row`, `array_col` (their sum is even), `x_um`, `y_um`. As on real slides a place on the
    grid has the same barcode in every slice.
    """
    n_columns = max(round(np.sqrt(n_spots / TISSUE_FRACTION * 0.866)), 4)
    n_rows = int(np.ceil(n_spots / TISSUE_FRACTION / n_columns))
    row, column = (axis.ravel() for axis in np.meshgrid(np.arange(n_rows), np.arange(n_columns), indexing="ij"))
    grid = pd.DataFrame({"array_row": row, "array_col": 2 * column + row % 2})
    grid["x_um"] = PITCH_UM + grid["array_col"] * PITCH_UM / 2
    grid["y_um"] = PITCH_UM + grid["array_row"] * PITCH_UM * np.sqrt(3) / 2
    rng = np.random.default_rng(10)
    words = rng.permutation(np.unique(rng.integers(0, 4**16, 2 * len(grid))))[: len(grid)]
    letters = np.array(list("ACGT"))[(words[:, None] >> (2 * np.arange(16))) & 3]
    grid.insert(0, "barcode", ["".join(word) + "-1" for word in letters])
    return grid, (grid["y_um"].max() + PITCH_UM, grid["x_um"].max() + PITCH_UM)


def draw_recipe(patient: np.random.Generator, section: np.random.Generator) -> Recipe:
    """Composition from the patient's generator; stain from the slice's, as no two slides take the dyes alike."""
    tumour, lymphoid, fat = patient.uniform([0.30, 0.06, 0.06], [0.50, 0.14, 0.16])
    haematoxylin = np.array([1.25, 1.2, 0.55]) * section.uniform(0.8, 1.15) * np.exp(section.normal(0, 0.05, 3))
    eosin = np.array([0.28, 0.92, 0.48]) * section.uniform(0.65, 1.2) * np.exp(section.normal(0, 0.08, 3))
    background = np.array([232, 222, 232]) * section.uniform(0.93, 1.05) + section.normal(0, 4, 3)
    nuclear_scale = float(np.exp(patient.normal(0, 0.06)))
    return Recipe(tumour, lymphoid, fat, nuclear_scale, haematoxylin, eosin, np.clip(background, 190, 250))


def restain(recipe: Recipe, rng: np.random.Generator, batch_effects: float) -> Recipe:
    """The same tissue stained in another laboratory, the further off the more `batch_effects` exceeds 1."""
    shift = [np.exp(rng.normal(0, 0.15 * (batch_effects - 1), 3)) for _ in range(2)]
    return replace(recipe, haematoxylin=recipe.haematoxylin * shift[0], eosin=recipe.eosin * shift[1])


def plan_slices(
    n_patients: int, slices_per_patient: int, n_genes: int, seed: int, batch_effects: float = 1.0
) -> list[Plan]:
    """The slices to write: patients differ in composition, depth and each gene's level, slices in stain."""
    depths = np.geomspace(*UMIS_PER_GENE, max(n_patients, 2))[:n_patients]
    depths = np.random.default_rng([seed, 1]).permutation(depths) * n_genes
    parts = ["train"] * (n_patients - 2) + ["val", "test"] if n_patients >= 3 else [""] * n_patients
    plans: list[Plan] = []
    for p in range(n_patients):
        name = f"P{p + 1:02d}"
        for s in range(slices_per_patient):
            patient, section = np.random.default_rng([seed, 2, p]), np.random.default_rng([seed, 3, p, s])
            recipe, offset = draw_recipe(patient, section), patient.normal(0, 0.25 * batch_effects, n_genes)
            if batch_effects > 1:
                recipe = restain(recipe, np.random.default_rng([seed, 4, p]), batch_effects)
            umis = depths[p] * np.exp(section.normal(0, 0.1))
            plans.append(Plan(f"{name}_{s + 1}", name, parts[p], recipe, umis, offset, len(plans) != 1, section))
    return plans


def write_slice(out: Path, plan: Plan, genes: counting.Genes, n_spots: int, um_per_px: float) -> Path:
    """Draw, measure and write one slice into `out`; its folder gets its name only when it is complete."""
    rng = plan.rng
    grid, size_um = visium_grid(n_spots)
    tissue = grow_tissue(rng, size_um, grid[["x_um", "y_um"]].to_numpy(), n_spots, plan.recipe)
    scene = paint(rng, tissue, um_per_px)
    grid["in_tissue"] = (at(tissue.maps["level"], grid[["x_um", "y_um"]].to_numpy()) > 0).astype(int)
    for axis, um in (("row", "y_um"), ("col", "x_um")):
        grid[f"pxl_{axis}_in_fullres"] = (grid[um] / um_per_px).round().astype(int)
    # Space Ranger's matrix is in the order of the barcodes, its positions in that of the grid.
    spots = grid[grid["in_tissue"] == 1].sort_values("barcode").set_index("barcode")
    factors = measure_tiles(scene, spots[["x_um", "y_um"]].to_numpy()).set_index(spots.index)
    activity = counting.programme_activity(factors)
    fractions = counting.expected_fractions(activity, genes, plan.offset)
    seen_depth = counting.image_depth(factors, plan.median_umis)
    depth = counting.draw_depth(rng, seen_depth)
    counts = counting.draw_counts(rng, depth[:, None] * fractions, genes.dispersion)
    best = counting.ceilings(rng, counts, fractions, seen_depth, genes.dispersion, REDRAWS)

    part = out / f"{plan.name}.part"
    part.mkdir(parents=True)
    software = "spaceranger-2.1.0 (simulated)" if plan.header else "spaceranger-1.3.0 (simulated)"
    about = {"library_ids": np.array([plan.name], "S"), "software_version": software}
    write_counts(part / "filtered_feature_bc_matrix.h5", counts, spots.index, genes.names, about)
    write_spatial(part / "spatial", grid, scene, plan.header)
    Image.fromarray(scene.image).save(part / f"{plan.name}_he.jpg", quality=90)
    spots = spots.join(factors).assign(depth=depth, depth_from_image=seen_depth)
    columns = {"dispersion": genes.dispersion, "total_counts": counts.sum(axis=0)}
    columns |= {f"ceiling_{scale}": values for scale, values in best.items()}
    write_truth(part / "truth.h5ad", fractions, spots, activity, genes, columns, REDRAWS)
    return part.rename(out / plan.name)


def describe(folder: Path, top: int = 300) -> str:
    """One line about a written slice: size, depth, and the mean ceilings of its `top` most expressed genes."""
    import anndata

    truth = anndata.read_h5ad(folder / "truth.h5ad")
    genes = truth.var.nlargest(top, "total_counts")
    means = ", ".join(f"{genes[f'ceiling_{scale}'].mean():.3f} {scale}" for scale in ("residuals", "lognorm"))
    size = f"{truth.n_obs} spots, {truth.n_vars} genes, median depth {truth.obs['depth'].median():.0f} UMIs"
    return f"{size}, mean ceiling of the top {len(genes)} genes: {means}"


def check(out: Path, n_patients: int, slices_per_patient: int, n_spots: int, n_genes: int, um_per_px: float) -> None:
    """Refuse in one line what cannot be simulated, and a folder that holds anything."""
    least = {
        "patients": (n_patients, 1),
        "slices_per_patient": (slices_per_patient, 1),
        "spots": (n_spots, 20),
        "genes": (n_genes, 2),
    }
    for flag, (found, needed) in least.items():
        if found < needed:
            raise ValueError(f"--{flag}: expected at least {needed}, found {found}; raise it")
    if not 0.25 <= um_per_px <= 4:
        raise ValueError(f"--um_per_px: expected 0.25 to 4 (nuclei measure 6 to 12 um), found {um_per_px:g}; change it")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: expected a new or an empty folder, found something in it; name another")


def write_slices(
    out: Path,
    n_patients: int = 6,
    slices_per_patient: int = 1,
    n_spots: int = 300,
    n_genes: int = 600,
    seed: int = 0,
    um_per_px: float = 1.0,
    verbose: bool = False,
    batch_effects: float = 1.0,
) -> list[Path]:
    """Write simulated slices and their table `slices.csv` into a new or empty folder.

    Parameters
    ----------
    n_spots
        Spots under tissue of each slice; the grid around has more.
    seed
        Fixes pixels and counts; a slice depends on the numbers of patients, spots and genes too.
    um_per_px
        Pixel size of the full-resolution image.
    verbose
        Print a line per slice.
    batch_effects
        Factor of each gene's log offset between patients; above 1 their stains differ too.

    Returns
    -------
    The slice folders. With three patients or more the last is test, the one before validation, the rest train.
    """
    out = Path(out)
    check(out, n_patients, slices_per_patient, n_spots, n_genes, um_per_px)
    genes = counting.draw_genes(np.random.default_rng([seed, 0]), n_genes)
    plans = plan_slices(n_patients, slices_per_patient, n_genes, seed, batch_effects)
    folders = []
    for plan in plans:
        folders.append(write_slice(out, plan, genes, n_spots, um_per_px))
        if verbose:
            print(f"{plan.name}  {plan.part or '-':5s}  {describe(folders[-1])}", flush=True)
    table = pd.DataFrame({"slice": [p.name for p in plans], "patient": [p.patient for p in plans]})
    table["part"], table["spot_pitch_um"] = [p.part for p in plans], f"{PITCH_UM:g}"
    table["image"] = table["slice"] + "_he.jpg"
    write_whole(out / "slices.csv", table.to_csv(index=False).encode())
    return folders
