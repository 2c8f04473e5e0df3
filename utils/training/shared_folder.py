"""Reading the folder that a trained model is shared by: model.safetensors and config.json give a checkpoint's state."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from utils.files import hashing
from utils.files import tensors as tensor_files

LIBRARY = "magic-st"
WEIGHTS, CONFIG = "model.safetensors", "config.json"
CARD = "README.md"
AGAIN = "fix: export or download the folder again"
FILES = (WEIGHTS, CARD, CONFIG)
# What config.json adds to the checkpoint, and what it must hold of it
ADDED = ("library_name", "versions", "normalisation", "training_table_sha256", "tensors", "weights_sha256")
OF_BOTH = {"sizes": dict, "genes": list, "tile_scale": dict, "table": list, "counts_hashes": dict, "settings": dict}
OF_BOTH |= {"metrics": dict, "tensors": dict, "weights_sha256": str}
OF_KIND = {
    "stage_one": OF_BOTH,
    "stage_two": OF_BOTH | {"target": str, "encoder_hash": str, "encoder_settings": dict, "encoder_table": list},
}


def described(tensor: Any) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def read_config(folder: Path, flag: str) -> dict[str, Any]:
    """config.json of a folder. Raises ValueError where there is none, or it is not one of ours."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{flag}: {path}: expected JSON, found {error}; {AGAIN}") from error
    if not isinstance(config, dict) or config.get("library_name") != LIBRARY:
        raise ValueError(f"{flag}: {path}: expected what --export wrote, found the config of something else; {AGAIN}")
    return config


def state_of(config: dict[str, Any], folder: Path, flag: str) -> dict[str, Any]:
    """The checkpoint's state that was exported to a folder, from its config and its weights.

    Raises ValueError where they do not hold what they should, or do not belong together.
    """
    needed = OF_KIND[config["kind"]]
    wrong = [f"{key} ({kind.__name__})" for key, kind in needed.items() if not isinstance(config.get(key), kind)]
    wrong += [] if wrong or set(config["tile_scale"]) == {"side_px", "um_per_px"} else ["side_px of tile_scale"]
    if wrong:
        raise ValueError(f"{flag}: {folder / CONFIG}: expected {', '.join(wrong)}, found none; {AGAIN}")
    tensors = tensor_files.read_tensors(folder / WEIGHTS, flag)
    check_tensors(tensors, config, folder, flag)
    state = {key: value for key, value in config.items() if key not in (*ADDED, "metrics")}
    state["tile_scale"] = [config["tile_scale"][key] for key in ("side_px", "um_per_px")]
    state |= {"row": config["metrics"]} if config.get("metrics") else {}
    for name in config["tensors"]:
        key, dot, rest = name.partition(".")
        if dot:
            state.setdefault(key, {})[rest] = tensors[name]
        else:
            state[key] = tensors[name]
    return state


def check_tensors(tensors: dict[str, Any], config: dict[str, Any], folder: Path, flag: str) -> None:
    """The weights must be those that the config was written with."""
    listed, path = config["tensors"], folder / WEIGHTS
    for name in sorted({*listed, *tensors}):
        wanted, found = listed.get(name, "none"), described(tensors[name]) if name in tensors else "none"
        if wanted != found:
            raise ValueError(f"{flag}: {path}: expected {wanted} for {name}, found {found}; {AGAIN}")
    if hashing.file_hash(path) != config["weights_sha256"]:
        raise ValueError(f"{flag}: {path}: expected the sha256 of {CONFIG}, found another; {AGAIN}")
