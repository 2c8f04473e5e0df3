"""The card of a shared model: what it predicts, its training data, its validation figures, its limits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from utils.evaluation.metrics import PREDICTABLE_PCC, UNITS
from utils.training.shared_folder import LIBRARY
from utils.training.split import leaks_of_table

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
- The figures above are of the validation slices, by which the epoch was chosen: expect lower ones on new patients, and
  still lower ones on another tissue, stain, scanner or laboratory. Evaluate on your own slices before you rely on it.
- Images must have the scale of the tiles above."""
OF_PREDICTIONS = """\
- Features are standardised per slice, so a slice must be more than a small piece of tissue.
- A prediction is an expectation given the image: it varies less between spots than measured counts do."""


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
        "## Input and output\n\n" + "\n".join(_input_and_output(config)),
        "## Trained on\n\n" + "\n".join(_slices(config)),
        "## On its validation slices\n\n" + "\n".join(_figures(config, val_pcc)),
        "## Limits\n\n" + "\n".join([LIMITS] if kind == "stage_one" else [LIMITS, OF_PREDICTIONS]),
        f"## How to use it\n\nWith this folder downloaded as FOLDER, and tiles of the scale above:\n\n    {USES[kind]}",
        "## Licence\n\nWhoever shares these weights states their licence: add a line `license: ...` to the head of "
        f"this page. The image encoder was initialised from `{config['sizes']['image_encoder']}`, whose own licence, "
        "and the terms of the slices above, may bind it.",
        f"{_versions(config)} Nothing in these files is code: weights are safetensors, the rest is JSON.",
    ]
    return "\n\n".join(parts) + "\n"


def _input_and_output(config: dict[str, Any]) -> list[str]:
    side, um_per_px = config["tile_scale"]["side_px"], config["tile_scale"]["um_per_px"]
    scale = "scale not stated" if um_per_px is None else f"{um_per_px:g} um per px, {side * um_per_px:g} um of tissue"
    genes = config["genes"]
    named = f"{len(genes)} genes ({', '.join(genes[:5])}{', ...' if len(genes) > 5 else ''}; all in config.json)"
    if config["kind"] == "stage_two":
        unit, context = UNITS[config["target"]], config["sizes"]["context"]
        gives = f"- Predicts {named}, as {unit}; with up to {context} neighbours of each spot as context."
    else:
        gives = f"- Compares it with expression profiles of {named}."
    return [f"- Input: a tile per spot, {side} x {side} px, {scale}.", gives]


def _slices(config: dict[str, Any]) -> list[str]:
    rows = [row for row in config["table"] if row["part"] in ("train", "val")]
    lines = [f"- {row['part']}: {row['slice']} (patient {row['patient']})" for row in rows]
    lines += ["- a quarter of each train slice served as validation"] if config["settings"].get("val_strip") else []
    if leaks := leaks_of_table(config):
        lines.append(f"- leak: {', '.join(leaks)} in test and in another part: its evaluation does not hold for others")
    return lines


def _figures(config: dict[str, Any], val_pcc: Sequence[float] | None) -> list[str]:
    metrics = config["metrics"].items()
    lines = [f"- {name}: {value:.4g}" for name, value in metrics if name.startswith("val_") and value is not None]
    if val_pcc is None:
        return lines
    known = [i for i, value in enumerate(val_pcc) if math.isfinite(value)]  # the others no validation slice measured
    order = sorted(known, key=lambda i: -val_pcc[i])[:NAMED]
    best = ", ".join(f"{config['genes'][i]} {val_pcc[i]:.2f}" for i in order)
    below = sum(not value >= PREDICTABLE_PCC for value in val_pcc)
    return [
        *lines,
        f"- PCC per gene against Pearson residuals (0 is chance), the {len(order)} best: {best}",
        f"- {below} of {len(val_pcc)} genes are below {PREDICTABLE_PCC} or not known: do not rely on their predictions",
    ]


def _versions(config: dict[str, Any]) -> str:
    return "Written by " + ", ".join(f"{name} {version}" for name, version in config["versions"].items()) + "."
