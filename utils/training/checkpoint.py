"""Checkpoints: plain tensors and values, written beside the old file and renamed over it, read with weights_only."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

FORMAT = 2
BEST, LAST = "best_epoch_weights.pth", "last_epoch_weights.pth"


def plain(value: Any) -> Any:
    """Paths become text, tuples lists: what `weights_only` reads back."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def save(path: Path, kind: str, **state: Any) -> None:
    """Write a checkpoint of a stage ("stage_one", "stage_two"); an interrupted save leaves the old file whole."""
    import torch

    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    torch.save({"format": FORMAT, "kind": kind, **state}, part)
    part.replace(path)


def read_tensors(path: Path, flag: str) -> Any:
    """What a .pth, .pt, .bin or .safetensors file holds, on the CPU; code in it is refused, never run."""
    import torch

    if not path.is_file():
        raise ValueError(f"{flag}: expected the file {path}, found none")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a torn file makes the unpickler stumble over
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"{flag}: {path} is torn, or holds more than tensors and plain values ({reason})") from error


def load(path: Path, kind: str, flag: str) -> dict[str, Any]:
    """A checkpoint of ours. Raises ValueError where it is torn, another stage's, or of another format."""
    state = read_tensors(path, flag)
    found = state.get("kind") if isinstance(state, dict) else None
    if found != kind:
        script = "train_mymodel.py" if kind == "stage_one" else "train_decoder.py"
        raise ValueError(f"{flag}: expected a {kind} checkpoint of {script}, found {found or 'another file'} in {path}")
    if state.get("format") != FORMAT:
        raise ValueError(
            f"{flag}: {path} has format {state.get('format')}, this version reads {FORMAT}; train it again"
        )
    return state


def save_epoch(
    out: Path, kind: str, epoch: int, score: float, best: float, optimizer: Any, schedule: Any, state: dict[str, Any]
) -> float:
    """Write the last epoch's checkpoint, and the best one's where the score is above `best`; returns the best score."""
    if score > best:
        save(out / BEST, kind, **state)
    best = max(score, best)
    progress = {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(), "best": best}
    save(out / LAST, kind, next_epoch=epoch + 1, **progress, **state)
    return best


def fit(model: Any, tensors: dict[str, Any], path: Path, flag: str) -> None:
    """Load weights strictly. Raises ValueError, in one line, where they are not this model's."""
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"{flag}: the weights in {path} do not fit this version ({reason}); train it again") from error


def resume(
    path: Path, kind: str, model: Any, optimizer: Any, schedule: Any, about: dict[str, Any]
) -> tuple[int, float]:
    """Put the last epoch's state back; returns the next epoch and the best score so far.

    Raises ValueError where the file was written for other sizes, genes, slices, target or encoder than `about` says.
    """
    state = load(path, kind, "--resume")
    for key in ("sizes", "genes", "tile_scale", "counts_hashes", "target", "encoder_hash"):  # the last two: stage two
        if state.get(key) != about.get(key):
            raise ValueError(
                f"--resume: {path} was trained with other {key}; use the same data and flags, or another --out"
            )
    fit(model, state["model"], path, "--resume")
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    return state["next_epoch"], state["best"]


def read_weights(path: Path, flag: str) -> dict[str, Any]:
    """The tensors of a foreign weights file, at the top or under model, state_dict, teacher, model_state_dict."""
    import torch

    state = read_tensors(path, flag)
    for key in ("model", "state_dict", "teacher", "model_state_dict"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    tensors = {k: v for k, v in state.items() if isinstance(v, torch.Tensor)} if isinstance(state, dict) else {}
    if not tensors:
        raise ValueError(f"{flag}: expected named tensors in {path}, found none")
    return {k.removeprefix("module."): v for k, v in tensors.items()}


def file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
