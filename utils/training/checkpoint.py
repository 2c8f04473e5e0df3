"""Checkpoints: plain tensors and values, written beside the old file and renamed over it, read with weights_only."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils import distributed, settings, words
from utils.files import hashing, tensors
from utils.training import shared_folder
from utils.training.shared_folder import CONFIG, WEIGHTS

if TYPE_CHECKING:
    from torch import Tensor, nn

FORMAT = 6
SCRIPTS = {"stage_one": "train_mymodel.py", "stage_two": "train_decoder.py"}  # by the kind of what they write
BEST, LAST = "best_epoch_weights.pth", "last_epoch_weights.pth"
PREVIOUS = "previous_epoch_weights.pth"  # the last one before LAST
CORRUPT = "corrupt_epoch_weights.pth"  # a LAST that could not be read


def save(path: Path, kind: str, **state: Any) -> None:
    """Write a checkpoint of a stage, "stage_one" or "stage_two"; an interrupted save leaves the old file whole."""
    _write_part(path, {"format": FORMAT, "kind": kind, **state}).replace(path)


def save_last(out: Path, kind: str, **state: Any) -> None:
    """Write the last checkpoint; the one that was the last becomes the previous one."""
    part = _write_part(out / LAST, {"format": FORMAT, "kind": kind, **state})
    if (out / LAST).exists():
        (out / LAST).replace(out / PREVIOUS)
    part.replace(out / LAST)


def _write_part(path: Path, state: dict[str, Any]) -> Path:
    """Write the file beside `path` that is to be renamed. Raises ValueError where the disk has no room for it."""
    import torch

    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # torch makes a RuntimeError of a full disk
        part.unlink(missing_ok=True)
        reason = words.cut(error)
        raise ValueError(
            f"{path}: expected room for a checkpoint, found that it cannot be written ({reason}); make room, and go on "
            "with --resume: what was saved before is whole"
        ) from error
    return part


def load(path: Path, kind: str | None, flag: str) -> dict[str, Any]:
    """Read a checkpoint, from its file or from the folder that it is shared by.

    Raises ValueError where it is corrupt, another stage's, or of another format.

    Parameters
    ----------
    kind : "stage_one" or "stage_two", None for either
    flag : that named the path, for errors
    """
    if path.is_dir():
        config = shared_folder.read_config(path, flag)
        check_made_by(config, kind, path, flag)
        return shared_folder.state_of(config, path, flag)
    state = tensors.read_tensors(path, flag)
    check_made_by(state, kind, path, flag)
    return state


def require_checkpoint(path: Path, flag: str, remedy: str) -> Path:
    """A checkpoint file, or a folder that a trained model is shared by."""
    if not path.is_dir():
        return settings.require_file(path, flag, remedy)
    missing = [name for name in (WEIGHTS, CONFIG) if not (path / name).is_file()]
    if missing:
        raise ValueError(
            f"{flag}: expected {WEIGHTS} and {CONFIG} in the folder {path}, found no "
            f"{' and no '.join(missing)}; give a folder that --export wrote, or a file such as {BEST}"
        )
    return path


def check_made_by(state: object, kind: str | None, path: Path, flag: str) -> None:
    """A file must be of the stage that is asked for, or of either, and of this format."""
    found = state.get("kind") if isinstance(state, dict) else None
    if not isinstance(state, dict) or found not in ([kind] if kind else list(SCRIPTS)):
        wanted = (
            f"a {kind} checkpoint of {SCRIPTS[kind]}" if kind else f"a checkpoint of {' or '.join(SCRIPTS.values())}"
        )
        raise ValueError(f"{flag}: expected {wanted}, found {found or 'another file'} in {path}; give another file")
    number = state.get("format")
    if number != FORMAT:
        newer = isinstance(number, int) and number > FORMAT
        remedy = "update this Magic, a newer one made it" if newer else f"train it again with {SCRIPTS[str(found)]}"
        raise ValueError(
            f"{flag}: {path}: expected format {FORMAT}, which this version reads, found {number}; {remedy}"
        )


def fit(model: nn.Module, weights: dict[str, Tensor], path: Path, flag: str) -> None:
    """Load weights strictly. Raises ValueError, in one line, where they are not this model's."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(
            f"{flag}: {path}: expected weights that fit this version, found others ({words.cut(error)}); train it again"
        ) from error


def read_resumed(out: Path, kind: str, about: dict[str, Any]) -> dict[str, Any]:
    """The last checkpoint of --out, or the previous one where the last is corrupt or another run's, with a warning.

    Raises ValueError where neither has the sizes, genes, slices, target and encoder of `about`.
    """
    errors: list[ValueError] = []
    for path in (out / LAST, out / PREVIOUS):
        try:
            state = load(path, kind, "--resume")
            check_same_run(state, about, path)
        except ValueError as error:
            errors.append(error)
            continue
        if errors:
            print(f"warning: {errors[0]}; going on from the one before it")
            distributed.wait()  # until every process has read them
            if distributed.is_main():  # set the last one aside, so that the next save does not put it over the good one
                if (out / LAST).exists():
                    (out / LAST).replace(out / CORRUPT)
                path.replace(out / LAST)
        return state
    raise errors[0]


def check_same_run(state: dict[str, Any], about: dict[str, Any], path: Path) -> None:
    keys = ("sizes", "genes", "tile_scale", "counts_hashes", "target", "encoder_hash")  # the last two of stage two
    same = {key: state.get(key) == about.get(key) for key in keys} | {"split": _split(state) == _split(about)}
    for key, is_same in same.items():
        if not is_same:
            raise ValueError(
                f"--resume: {path}: expected the {key} of this run, found others; use the same data and flags, or "
                "another --out"
            )


def _split(state: dict[str, Any]) -> tuple[dict[str, str], bool]:
    """Part of each slice that training reads, and whether strips of train slices are for validation."""
    parts = {row["slice"]: row["part"] for row in state["table"] if row["part"] in ("train", "val")}
    return parts, state["settings"]["val_strip"]


def model_hash(path: Path) -> str:
    """sha256 of a file; of a folder that a model is shared by, of its weights and config together."""
    if path.is_dir():
        hashes = [hashing.file_hash(path / name) for name in (WEIGHTS, CONFIG)]
        return hashlib.sha256("".join(hashes).encode()).hexdigest()
    return hashing.file_hash(path)
