"""What accuracy.py runs: folds of slices, the flags of every script, and the counts shuffled against the tiles.

A fold assigns slices to training, validation (which chooses the epoch) and test; it is written as its own slices.csv.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from utils.genes import panels as gene_panels
from utils.report.anndata_files import write_anndata
from utils.slices import splits
from utils.slices.splits import SliceRow

RULES = 7  # raised whenever a method or figure is computed differently, so that earlier runs are repeated
LAST_CHANGE = "tiles have no JPEG loss, and stage one has other batches, negatives and losses"  # what raised it last
# flags of each script; those of a later table follow those of an earlier one and win
FULL = {
    "image_tilling": "--tile_um 310",
    "make_decoder_data": "--n_input_genes 500",
    "train_mymodel": "--crop_scales 1 0.5 --gene_depth 2 --gene_heads 4 --gene_tokens 32 --fusion_blocks 1 --alpha 0 "
    "--queue_size 0 --Init_lr 2e-4 --Epoch 8",
    "train_decoder": "--tta 8 --context 20 --decoder_layers 2 --Init_lr 5e-4 --Epoch 4",
}
SMALL = {"train_mymodel": "--Epoch 3", "train_decoder": "--Epoch 2"}
ABLATIONS: dict[str, dict[str, str]] = {
    "default": {},
    "distillation": {"train_mymodel": "--alpha 0.4"},
    "queue": {"train_mymodel": "--queue_size 4096"},
    "distillation_queue": {"train_mymodel": "--alpha 0.4 --queue_size 4096"},
    "fusion_pooled": {"train_mymodel": "--gene_tokens 1 --image_tokens 1"},
    "no_matching": {"train_mymodel": "--matching_weight 0"},
    "no_expression": {"train_mymodel": "--expression_weight 0"},
    "pretrained_genes": {"train_mymodel": "--pretrain_genes"},
    "hires": {"image_tilling": "--source hires"},
    "counts": {"train_decoder": "--target counts"},
    "lognorm": {"train_decoder": "--target lognorm"},
    "no_context": {"train_decoder": "--context 0"},
}
SEEDS, SMALL_SEEDS = (0, 1, 2), (0,)
ABLATION_FOLD, ABLATION_SEED = "C_to_B", 0
DEFAULT_ENCODER, DEFAULT_PX = "tf_efficientnet_lite0", 224


@dataclass(frozen=True)
class Fold:
    """Slices with their parts, and the flags that the scripts need on them."""

    name: str
    rows: tuple[SliceRow, ...]
    flags: tuple[str, ...] = ()

    def write(self, path: Path) -> Path:
        """Write it as a slices.csv and return the path."""
        path.parent.mkdir(parents=True, exist_ok=True)
        splits.write_table(self.rows, path)
        return path


DEFAULT_FOLDS = {
    "C_to_B": ({"train": ("C2", "C3", "C4"), "val": ("C5",), "test": ("B4",)}, ()),
    "B_to_C": ({"train": ("B4",), "test": ("C2", "C3", "C4", "C5")}, ("--val_strip",)),
    "within_C": ({"train": ("C2", "C3"), "val": ("C4",), "test": ("C5",)}, ("--allow_leak",)),
}


def default_folds(rows: Sequence[SliceRow]) -> list[Fold]:
    """The folds of the sections of two patients, by the slices' names; within_C shares its patient on purpose."""
    by_name = {row.slice: row for row in rows}
    wanted = {name for parts, _ in DEFAULT_FOLDS.values() for names in parts.values() for name in names}
    missing = sorted(wanted - set(by_name))
    if missing:
        raise ValueError(
            f"--protocol default: expected the slices {', '.join(sorted(wanted))}, {', '.join(missing)} not found; "
            "for a folder of your own use --protocol patients"
        )
    return [
        Fold(
            name, tuple(replace(by_name[slice_], part=part) for part, names in parts.items() for slice_ in names), flags
        )
        for name, (parts, flags) in DEFAULT_FOLDS.items()
    ]


def patient_folds(rows: Sequence[SliceRow]) -> list[Fold]:
    """Each patient is tested once; the next one (cyclic), or a strip where there are only two, is the validation."""
    patients = sorted({row.patient for row in rows})
    if len(patients) < 2:
        raise ValueError(f"--protocol patients: expected two patients or more, found {', '.join(patients)}")
    folds = []
    for i, patient in enumerate(patients):
        part = dict.fromkeys(patients, "train") | {patient: "test"}
        if len(patients) > 2:
            part[patients[(i + 1) % len(patients)]] = "val"
        flags = () if len(patients) > 2 else ("--val_strip",)
        folds.append(Fold(patient.replace("/", "_"), tuple(replace(r, part=part[r.patient]) for r in rows), flags))
    return folds


def given_folds(rows: Sequence[SliceRow]) -> list[Fold]:
    """The split of slices.csv; without a validation slice, a strip of the train slices is the validation."""
    held_out = any(row.part == "val" for row in rows) or not any(row.part for row in rows)
    split = splits.of_part(splits.default_split(rows), *splits.PARTS)
    return [Fold("given", tuple(split), () if held_out else ("--val_strip",))]


PROTOCOLS = {"default": default_folds, "patients": patient_folds, "given": given_folds}


def script_flags(script: str, ablation: str, small: bool) -> list[str]:
    """Flags that set what a script computes, as opposed to where it reads and writes."""
    tables = [FULL, *([SMALL] if small else []), ABLATIONS[ablation]]
    return [flag for flags in tables for flag in flags.get(script, "").split()]


def shuffle_panels(panels: Path, names: Sequence[str], fraction: float = 1.0) -> None:
    """Permute the counts of each slice's panel files, with their totals, over a fraction of the spots of the slice.

    One permutation per slice, drawn from its name, serves both files. Barcodes, positions and the rest stay.
    """
    import anndata

    for name in names:
        for role in gene_panels.FILES:
            path = gene_panels.panel_path(panels, None, name, role)
            adata = anndata.read_h5ad(path)
            rng = np.random.default_rng(zlib.crc32(name.encode()))
            order, drawn = np.arange(adata.n_obs), rng.permutation(adata.n_obs)
            drawn = drawn[: round(fraction * adata.n_obs)]
            order[np.sort(drawn)] = drawn
            adata.X = adata.X[order]
            adata.obs["total_counts"] = adata.obs["total_counts"].to_numpy()[order]
            write_anndata(path, adata)
