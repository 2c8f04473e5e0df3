"""What a prediction may be trusted for: verdict on the slide, genes that were predictable on other patients.

Shapes: S spots, G genes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from utils.evaluation.metrics import PREDICTABLE_PCC
from utils.prediction.members import Member

BARE = 0.1  # a tile with less tissue is bare glass
MOST_FLAGGED = 0.05  # fraction of the spots from which a slide is warned of


def out_of_domain(domain_score: np.ndarray, tissue_fraction: np.ndarray) -> np.ndarray:
    """Spots (S,) that are unlike the train spots, or on bare glass."""
    return (domain_score > 1) | (tissue_fraction < BARE)


def domain_of(
    domain_score: np.ndarray, slide_score: float, tissue_fraction: np.ndarray, states: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Plain values about a slide: fraction of its spots that are flagged, its scores, how they were calibrated, and a
    verdict in words."""
    flagged = float(out_of_domain(domain_score, tissue_fraction).mean())
    bare = int((tissue_fraction < BARE).sum())
    warned = flagged > MOST_FLAGGED or slide_score > 1
    glass = f", {bare} of them on bare glass" if bare else ""
    verdict = (
        f"{'unlike' if warned else 'like'} the slides that the model was trained on: {flagged:.0%} of the spots are "
        f"out of domain{glass} (expected about 1 %), the score of the slide is {slide_score:.2f} (limit 1)"
    )
    return {
        "flagged": flagged,
        "bare_glass": bare,
        "median_score": float(np.median(domain_score)),
        "slide_score": slide_score,
        "calibrated_on": " and ".join(sorted({state["domain_calibration"] for state in states})),
        "warned": warned,
        "verdict": verdict + ("; do not rely on its prediction" if warned else ""),
    }


def shared_patients(state: dict[str, Any]) -> list[str]:
    """Patients of a checkpoint that are in its training, or its encoder's, and in its validation."""
    train = {row["patient"] for row in (*state["table"], *state["encoder_table"]) if row["part"] == "train"}
    val = {row["patient"] for row in state["table"] if row["part"] == "val"}
    return sorted(train if state["settings"]["val_strip"] else train & val)


def genes_of(states: Sequence[dict[str, Any]]) -> dict[str, str]:
    """What `var['val_pcc_above_0.1']` means, or why it is not known."""
    shared = sorted({patient for state in states for patient in shared_patients(state)})
    if shared:
        reason = (
            f"not known: validation shares {', '.join(shared)} with training, so val_pcc holds for patients that the "
            "model was trained on, and is too high for others"
        )
    else:
        reason = "validation PCC of at least 0.1, on patients that the model was not trained on"
    return {f"val_pcc_above_{PREDICTABLE_PCC}": reason}


def predictable(val_pcc: np.ndarray, known: bool) -> pd.arrays.BooleanArray:
    """Which genes (G,) were predicted on other patients; all missing where validation does not tell."""
    return pd.arrays.BooleanArray(val_pcc >= PREDICTABLE_PCC, ~np.isfinite(val_pcc) | (not known))


def left_out_pcc(members: Sequence[Member]) -> np.ndarray | None:
    """PCC per gene on left-out patients (G,), mean over the members; None unless all were trained with it."""
    found = [member.state["left_out_pcc"].numpy() for member in members if "left_out_pcc" in member.state]
    return np.mean(found, axis=0) if len(found) == len(members) else None
