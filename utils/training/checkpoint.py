"""Checkpoints: plain tensors and values, written beside the old file and renamed over it, read with weights_only."""

from __future__ import annotations

import argparse
import hashlib
import os
import re
from pathlib import Path
from typing import Any

from utils.training import distributed

FORMAT = 4
FIRST_READ = {"stage_one": 2, "stage_two": 4}  # what came with 3 has values that say the same of a file of 2
NEW_IN_3: dict[str, Any] = {"pretrain_hashes": {}, "step": 0, "sums": {}}
SCRIPTS = {"stage_one": "train_mymodel.py", "stage_two": "train_decoder.py"}  # by the kind of what they write
BEST, LAST = "best_epoch_weights.pth", "last_epoch_weights.pth"
WEIGHTS, CONFIG = "model.safetensors", "config.json"  # of a folder that a model is shared by
PREVIOUS, TORN = "previous_epoch_weights.pth", "torn_epoch_weights.pth"  # before the last one; a last one of no use


def plain(value: Any) -> Any:
    """Paths become text, tuples lists: what `weights_only` reads back."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def save(path: Path, kind: str, **state: Any) -> None:
    """Write a checkpoint of a stage ("stage_one", "stage_two"); an interrupted save leaves the old file whole."""
    _write_part(path, {"format": FORMAT, "kind": kind, **state}).replace(path)


def save_last(out: Path, kind: str, **state: Any) -> None:
    """Write the last checkpoint; the one that was the last becomes the previous one."""
    part = _write_part(out / LAST, {"format": FORMAT, "kind": kind, **state})
    if (out / LAST).exists():
        (out / LAST).replace(out / PREVIOUS)
    part.replace(out / LAST)


def _write_part(path: Path, state: dict[str, Any]) -> Path:
    """The file beside `path` that is to be renamed. Raises ValueError where the disk has no room for it."""
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
        reason = " ".join(str(error).split())[:160]
        raise ValueError(
            f"{path}: expected room for a checkpoint, it could not be written ({reason}); what was saved before is "
            "whole: make room, and go on with --resume"
        ) from error
    return part


def read_tensors(path: Path, flag: str) -> Any:
    """What a .pth, .pt, .bin or .safetensors file holds, on the CPU; code in it is refused, never run.

    Beside tensors and plain values it may hold flags (argparse.Namespace), as the checkpoints of timm, DINO and MAE do.
    """
    import torch

    if not path.is_file():
        raise ValueError(f"{flag}: expected the file {path}, found none")
    if not path.stat().st_size:
        raise ValueError(f"{flag}: {path} is torn: it is empty; copy or download it again")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a torn file makes the unpickler stumble over
        reason = " ".join(str(error).split()).split("WeightsUnpickler error: ")[-1]  # before that torch gives advice
        code = re.search(r"GLOBAL ([\w.]+)", reason)
        if code:
            raise ValueError(
                f"{flag}: {path} holds more than tensors and plain values ({code[1]}); code in a file is never run: "
                "save the tensors alone: torch.save(model.state_dict(), FILE)"
            ) from error
        raise ValueError(f"{flag}: {path} is torn, or no file of weights ({reason[:160]}); get it again") from error


def load(path: Path, kind: str | None, flag: str) -> dict[str, Any]:
    """A checkpoint of ours, from its file or from the folder that it is shared by; `kind` None: of either stage.

    Raises ValueError where it is torn, another stage's, or of another format.
    """
    if path.is_dir():
        from utils.training import sharing

        config = sharing.read_config(path, flag)
        check_made_by(config, kind, path, flag)
        state = sharing.state_of(config, path, flag)
    else:
        state = read_tensors(path, flag)
        check_made_by(state, kind, path, flag)
    return NEW_IN_3 | state if state["format"] < 3 else state


def check_made_by(state: Any, kind: str | None, path: Path, flag: str) -> None:
    """A file of either stage says which, and by which format it was written. Models of before the first format that is
    read start from something else than this version's do."""
    found = state.get("kind") if isinstance(state, dict) else None
    if found not in ([kind] if kind else list(SCRIPTS)):
        wanted = (
            f"a {kind} checkpoint of {SCRIPTS[kind]}" if kind else f"a checkpoint of {' or '.join(SCRIPTS.values())}"
        )
        raise ValueError(f"{flag}: expected {wanted}, found {found or 'another file'} in {path}")
    number, read = state.get("format"), range(FIRST_READ[found], FORMAT + 1)
    if number not in read:
        newer = isinstance(number, int) and number > FORMAT
        remedy = "a newer Magic made it: update this one" if newer else f"train it again with {SCRIPTS[found]}"
        raise ValueError(f"{flag}: {path} has format {number}, this version reads {list(read)}; {remedy}")


def fit(model: Any, tensors: dict[str, Any], path: Path, flag: str) -> None:
    """Load weights strictly. Raises ValueError, in one line, where they are not this model's."""
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"{flag}: the weights in {path} do not fit this version ({reason}); train it again") from error


def read_resumed(out: Path, kind: str, about: dict[str, Any]) -> dict[str, Any]:
    """The last checkpoint of --out, or where that is torn or another's, which is said, the one before it.

    Raises ValueError where neither is of the sizes, genes, slices, target and encoder that `about` says.
    """
    errors: list[ValueError] = []
    for path in (out / LAST, out / PREVIOUS):
        try:
            state = load(path, kind, "--resume")
            for key in ("sizes", "genes", "tile_scale", "counts_hashes", "target", "encoder_hash"):  # two of stage two
                if state.get(key) != about.get(key):
                    raise ValueError(
                        f"--resume: {path} was trained with other {key}; use the same data and flags, or another --out"
                    )
        except ValueError as error:
            errors.append(error)
            continue
        if errors:  # set aside, so that the next save does not put it over the good one
            print(f"warning: {errors[0]}; going on from the one before it")
            if distributed.is_main():
                if (out / LAST).exists():
                    (out / LAST).replace(out / TORN)
                path.replace(out / LAST)
        return state
    raise errors[0]


class Tensors(dict[str, Any]):
    """What a file holds by name, and the file."""

    source: str = ""


def read_weights(path: Path, flag: str) -> Tensors:
    """The tensors of a foreign weights file, at the top or under model, state_dict, teacher, model_state_dict."""
    import torch

    state = read_tensors(path, flag)
    for key in ("model", "state_dict", "teacher", "model_state_dict"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    tensors = {k: v for k, v in state.items() if isinstance(v, torch.Tensor)} if isinstance(state, dict) else {}
    if not tensors:
        raise ValueError(f"{flag}: expected named tensors in {path}, found none")
    found = Tensors({k.removeprefix("module."): v for k, v in tensors.items()})
    found.source = str(path)
    return found


def file_hash(path: Path) -> str:
    """sha256 of a file; of a folder that a model is shared by, of its weights and config together."""
    if path.is_dir():
        hashes = [file_hash(path / name) for name in (WEIGHTS, CONFIG)]
        return hashlib.sha256("".join(hashes).encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
