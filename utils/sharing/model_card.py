"""The card of a shared model: what it is, what it was trained on, how well it did there, what it is not for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from utils.training.shared_folder import LIBRARY

PREDICTABLE = 0.1  # validation PCC below which a gene is greyed elsewhere, too
NAMED = 10  # genes
TITLES = {
    "stage_one": "Magic, stage one: which H&E image belongs to which expression profile",
    "stage_two": "Magic, stage two: expression of genes from an H&E image",
}
USES = {
    "stage_one": "python get_accuracy_image.py --encoder FOLDER\n    python train_decoder.py --encoder FOLDER",
    "stage_two": "python decoder_similarity.py --decoder FOLDER\n    python predict_slide.py SLIDE --decoder FOLDER",
}
LIMITS = """\
- For research. Not a medical device: no decision about a patient may rest on it.
- The figures above are of the validation slices, by which the epoch was chosen: expect less on new patients, and less
  again on another tissue, stain, scanner or laboratory. Evaluate on slices of your own before you rely on it.
- Images must have the scale of the tiles above."""
OF_PREDICTIONS = """\
- Features are standardised per slice, so a slice must be more than a small piece of tissue.
- A prediction is an expectation given the image: its spread is below that of measured counts."""
UNITS = {
    "lognorm": "log1p of counts per 10,000",
    "residuals": "analytic Pearson residuals",
    "counts": "counts per 10,000",
}


def model_card(config: dict[str, Any], val_pcc: Sequence[float] | None) -> str:
    """Text of README.md, with the head that a model hub reads.

    Parameters
    ----------
    config : what config.json holds
    val_pcc : of stage two, validation PCC of each gene against Pearson residuals, in the order of config["genes"]
    """
    kind = config["kind"]
    tags = ["spatial-transcriptomics", "histology", "gene-expression", "image-to-expression"]
    head = ["---", f"library_name: {LIBRARY}", "tags:", *(f"- {tag}" for tag in tags), "---"]
    parts = [
        "\n".join(head),
        f"# {TITLES[kind]}",
        "## What it takes and gives\n\n" + "\n".join(_what(config)),
        "## Trained on\n\n" + "\n".join(_slices(config)),
        "## On its validation slices\n\n" + "\n".join(_figures(config, val_pcc)),
        "## Limits\n\n" + "\n".join([LIMITS] if kind == "stage_one" else [LIMITS, OF_PREDICTIONS]),
        f"## How to use it\n\nWith this folder downloaded as FOLDER, and tiles of the scale above:\n\n    {USES[kind]}",
        "## Licence\n\nThe licence of these weights is for whoever shares them to state: add a line `license: ...` to "
        f"the head of this page. The encoder began as `{config['sizes']['image_encoder']}`, whose own licence, and the "
        "terms of the slices above, may bind it.",
        f"{_versions(config)} Nothing in these files is code: weights are safetensors, the rest is JSON.",
    ]
    return "\n\n".join(parts) + "\n"


def _what(config: dict[str, Any]) -> list[str]:
    side, um_per_px = config["tile_scale"]["side_px"], config["tile_scale"]["um_per_px"]
    scale = "scale not stated" if um_per_px is None else f"{um_per_px:g} um per px, {side * um_per_px:g} um of tissue"
    genes = config["genes"]
    named = f"{len(genes)} genes ({', '.join(genes[:5])}{', ...' if len(genes) > 5 else ''}; all in config.json)"
    if config["kind"] == "stage_two":
        around = config["sizes"]["context"]
        gives = f"- Gives {named}, as {UNITS[config['target']]}; each spot is seen with up to {around} around it."
    else:
        gives = f"- Compares it with profiles of {named}."
    return [f"- Takes a tile per spot, {side} x {side} px, {scale}.", gives]


def _slices(config: dict[str, Any]) -> list[str]:
    rows = [row for row in config["table"] if row["part"] in ("train", "val")]
    strip = config["settings"].get("val_strip")
    lines = [f"- {row['part']}: {row['slice']} (patient {row['patient']})" for row in rows]
    return [*lines, "- a quarter of each train slice served as validation"] if strip else lines


def _figures(config: dict[str, Any], val_pcc: Sequence[float] | None) -> list[str]:
    found = config["metrics"].items()
    lines = [f"- {name}: {value:.4g}" for name, value in found if name.startswith("val_") and value is not None]
    if val_pcc is None:
        return lines
    order = sorted(range(len(val_pcc)), key=lambda i: -val_pcc[i])[:NAMED]
    best = ", ".join(f"{config['genes'][i]} {val_pcc[i]:.2f}" for i in order)
    below = sum(value < PREDICTABLE for value in val_pcc)
    return [
        *lines,
        f"- PCC per gene against Pearson residuals (0 is chance), the {len(order)} best: {best}",
        f"- {below} of {len(val_pcc)} genes are below {PREDICTABLE}: leave them out of what you read off it",
    ]


def _versions(config: dict[str, Any]) -> str:
    return "Written by " + ", ".join(f"{name} {version}" for name, version in config["versions"].items()) + "."
