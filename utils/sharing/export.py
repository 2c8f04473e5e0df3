"""Write the folder that a trained model is shared by: weights, what they mean, and a card."""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from utils import distributed, settings
from utils.files import hashing
from utils.files.atomic import publishable, whole_file, write_record, write_whole
from utils.settings import TrainingSettings
from utils.sharing.model_card import model_card
from utils.slices import splits
from utils.training import checkpoint
from utils.training.shared_folder import CARD, CONFIG, LIBRARY, WEIGHTS, described

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


def export_best(flags: TrainingSettings) -> None:
    """--export of a training: its best epoch; of several processes the first writes it."""
    if flags.export is not None and distributed.is_main():
        export(flags.out / checkpoint.BEST, flags.export)
        print(f"{flags.export}: to share")


def export(path: Path, folder: Path, flag: str = "--export") -> None:
    """Write the checkpoint at `path` (a file of either stage) to a new folder.

    Raises ValueError where the folder holds something, or the file is no checkpoint, or one to resume from.
    """
    settings.require_new_folder(folder, flag)
    state = checkpoint.load(path, None, flag)
    if "next_epoch" in state:
        raise ValueError(
            f"{flag}: {path}: expected the weights of the best epoch, found those to resume from; give "
            f"{checkpoint.BEST} beside it"
        )
    write(state, folder)


def write(state: dict[str, Any], folder: Path) -> None:
    """The three files of a checkpoint's state; config.json comes last, so that a folder which has it is whole."""
    from safetensors.torch import save_file

    tensors, rest = split(state)
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(folder / WEIGHTS) as part:
        save_file(tensors, part, metadata={"format": "pt"})
    config = describe(rest, tensors) | {"weights_sha256": hashing.file_hash(folder / WEIGHTS)}
    val_pcc = tensors["val_pcc"].tolist() if "val_pcc" in tensors else None
    write_whole(folder / CARD, model_card(config, val_pcc).encode())
    write_record(folder / CONFIG, config)


def split(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tensors of a state by name (a.b for the tensor b of the dict a), and all else as JSON has it."""
    import torch

    tensors, rest = {}, {}
    for key, value in state.items():
        if isinstance(value, torch.Tensor):
            tensors[key] = value
        elif isinstance(value, dict) and any(isinstance(v, torch.Tensor) for v in value.values()):
            tensors |= {f"{key}.{name}": tensor for name, tensor in value.items()}
        else:
            rest[key] = publishable(value)
    # momentum encoders share what is frozen, and safetensors takes no tensor twice
    return {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}, rest


def describe(rest: dict[str, Any], tensors: dict[str, Any]) -> dict[str, Any]:
    """config.json without the hash of the weights: the values of a state, and what explains them."""
    mean, std = (tensors[f"model.image_encoder.{name}"].flatten().tolist() for name in ("mean", "std"))
    size_px, um_per_px = rest["tile_scale"]
    versions = {name: metadata.version(name) for name in ("torch", "timm", "safetensors")}
    table = splits.table_bytes(splits.SliceRow(**row) for row in rest["table"])
    return {
        "library_name": LIBRARY,
        "versions": {"magic": tomllib.loads(PYPROJECT.read_text())["project"]["version"], **versions},
        "format": rest["format"],
        "kind": rest["kind"],
        "metrics": rest.get("row", {}),
        "tile_scale": {"side_px": size_px, "um_per_px": um_per_px},
        "normalisation": {"channels": "RGB from 0 to 1", "mean": mean, "std": std},
        "training_table_sha256": hashlib.sha256(table).hexdigest(),
        **{key: value for key, value in rest.items() if key not in ("row", "tile_scale")},
        "tensors": {name: described(tensor) for name, tensor in tensors.items()},
    }
