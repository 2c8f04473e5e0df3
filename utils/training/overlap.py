"""What a trained model and the slices it is evaluated on must have in common: genes, by name, and the tiles' scale."""

from __future__ import annotations

from pathlib import Path

from utils.genes import panels as gene_panels

LEAST_TARGETS = 10  # genes: a mean over fewer says little of the model
LEAST_INPUTS = 0.5  # share: of a profile with more zeros than genes the gene encoder has learnt nothing


def check(panel: gene_panels.Panel, role: str, name: str, flag: str) -> None:
    """Says how many of a model's genes a slice has, where it lacks some; `panel` is in the model's genes (Panel.onto).

    Raises ValueError where too few are left: of the targets 10 (all, where the model has fewer), of the inputs half.
    """
    n, shared = len(panel.genes), int(panel.measured.sum())
    least = min(LEAST_TARGETS, n) if role == "target" else LEAST_INPUTS * n
    if shared < least:
        raise ValueError(
            f"{flag}: trained on {n} {role} genes, of which {panel.path} has {shared}, expected at least {least:.0f}; "
            f"make its panel with --{role}_genes, or train on genes that this slice has"
        )
    if shared < n and role == "target":
        print(f"{name}: evaluated on {shared} of the model's {n} genes; the slice's panel lacks {n - shared}")
    elif shared < n:
        print(f"{name}: has {shared} of the model's {n} input genes; the {n - shared} it lacks are read as zero")


def check_same(panel: gene_panels.Panel, role: str, wanted: list[str], flag: str) -> None:
    """The slices that a model was trained on are read with its own panel: the cheap rows learn from them."""
    if panel.genes != wanted:
        shared = len(set(panel.genes) & set(wanted))
        raise ValueError(
            f"{flag}: trained on {len(wanted)} {role} genes, of which {panel.path} has {shared} among its "
            f"{len(panel.genes)}; make its panel with --{role}_genes, or use the panels it was trained on"
        )


def check_tiles(folder: Path, found: tuple[int, float | None], wanted: tuple, flag: str) -> None:
    """Tiles must be of the side in pixels and the micrometres per pixel that a model was trained on."""
    if found != wanted:
        raise ValueError(
            f"{flag}: trained on tiles of {wanted} (px, um per px), those of {folder} are of {found}; "
            "cut tiles of that scale with image_tilling.py"
        )
