"""Share a trained model: a folder with its weights, what they mean, and a card; upload and download of that folder.

    python -m utils.training.sharing decoder_model/best_epoch_weights.pth shared/
    python -m utils.training.sharing shared/ --push owner/name
    python -m utils.training.sharing --pull owner/name shared/

The folder holds model.safetensors (every tensor of the checkpoint), config.json (everything else) and README.md (the
card). Scripts take it wherever they take a checkpoint, and find there what the checkpoint held, to the last bit; only
paths are cut to file names, because they tell of the machine. Nothing in the folder is code.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import tempfile
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path, PureWindowsPath
from typing import Any

from huggingface_hub import ModelHubMixin, snapshot_download

from utils.files.atomic import write_record, write_whole
from utils.slices import splits
from utils.training import arguments, checkpoint
from utils.training.checkpoint import CONFIG, WEIGHTS
from utils.training.model_card import LIBRARY, model_card

CARD = "README.md"
FILES = (WEIGHTS, CARD, CONFIG)
PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"
# What config.json adds to the checkpoint, and what it must hold of it
ADDED = ("library_name", "versions", "normalisation", "training_table_sha256", "tensors", "weights_sha256")
OF_BOTH = {"sizes": dict, "genes": list, "tile_scale": dict, "table": list, "counts_hashes": dict, "settings": dict}
OF_BOTH |= {"metrics": dict, "tensors": dict, "weights_sha256": str}
OF_KIND = {
    "stage_one": OF_BOTH,
    "stage_two": OF_BOTH | {"target": str, "encoder_hash": str, "encoder_settings": dict, "encoder_table": list},
}


def export(path: Path, folder: Path, flag: str = "--export") -> None:
    """Write the checkpoint at `path` (a file of either stage) to a new folder.

    Raises ValueError where the folder holds something, or the file is no checkpoint, or one to resume from.
    """
    arguments.require_new_folder(folder, flag)
    state = checkpoint.load(path, None, flag)
    if "next_epoch" in state:
        raise ValueError(f"{flag}: {path} is there to resume from; expected {checkpoint.BEST} beside it")
    write(state, folder)


def write(state: dict[str, Any], folder: Path) -> None:
    """The three files of a checkpoint's state; config.json comes last, so that a folder which has it is whole."""
    from safetensors.torch import save_file

    tensors, rest = split(state)
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / (WEIGHTS + ".part")
    save_file(tensors, part, metadata={"format": "pt"})
    part.replace(folder / WEIGHTS)
    config = describe(rest, tensors) | {"weights_sha256": checkpoint.file_hash(folder / WEIGHTS)}
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
        elif isinstance(value, dict) and any(isinstance(one, torch.Tensor) for one in value.values()):
            tensors |= {f"{key}.{name}": one for name, one in value.items()}
        else:
            rest[key] = plain(value)
    # twins share what is frozen, and safetensors takes no tensor twice
    return {name: one.detach().contiguous().clone() for name, one in tensors.items()}, rest


def plain(value: Any) -> Any:
    """The same as JSON has it: NaN and infinity become null, paths that tell of a machine their last part."""
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, str):
        path = PureWindowsPath(value)  # knows both kinds of slashes
        return path.name if path.root or ".." in path.parts or value.startswith("~") else value
    return value


def describe(rest: dict[str, Any], tensors: dict[str, Any]) -> dict[str, Any]:
    """config.json without the hash of the weights: the plain part of a state, and what tells a reader more."""
    mean, std = (tensors[f"model.image_encoder.{name}"].flatten().tolist() for name in ("mean", "std"))
    size_px, um_per_px = rest["tile_scale"]
    versions = {name: metadata.version(name) for name in ("torch", "timm", "safetensors")}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "slices.csv"
        splits.write_table([splits.SliceRow(**row) for row in rest["table"]], path)
        table_hash = checkpoint.file_hash(path)
    return {
        "library_name": LIBRARY,
        "versions": {"magic": tomllib.loads(PYPROJECT.read_text())["project"]["version"], **versions},
        "format": rest["format"],
        "kind": rest["kind"],
        "metrics": rest.get("row", {}),
        "tile_scale": {"side_px": size_px, "um_per_px": um_per_px},
        "normalisation": {"channels": "RGB from 0 to 1", "mean": mean, "std": std},
        "training_table_sha256": table_hash,
        **{key: value for key, value in rest.items() if key not in ("row", "tile_scale")},
        "tensors": {name: said(one) for name, one in tensors.items()},
    }


def said(tensor: Any) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def read_config(folder: Path, flag: str) -> dict[str, Any]:
    """config.json of a folder. Raises ValueError where there is none, or it is not one of ours."""
    path = arguments.require_checkpoint(folder, flag, "") / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{flag}: {path}: expected JSON, found {error}; export or download the folder anew") from error
    if not isinstance(config, dict) or config.get("library_name") != LIBRARY:
        raise ValueError(f"{flag}: {path}: expected what --export wrote, found the config of something else")
    return config


def state_of(config: dict[str, Any], folder: Path, flag: str) -> dict[str, Any]:
    """The checkpoint's state that was exported to a folder, from its config and its weights.

    Raises ValueError where they do not hold what they should, or do not belong together.
    """
    needed = OF_KIND[config["kind"]]
    wrong = [f"{key} ({kind.__name__})" for key, kind in needed.items() if not isinstance(config.get(key), kind)]
    wrong += [] if wrong or set(config["tile_scale"]) == {"side_px", "um_per_px"} else ["side_px of tile_scale"]
    if wrong:
        raise ValueError(f"{flag}: {folder / CONFIG} lacks {', '.join(wrong)}; export or download the folder anew")
    tensors = checkpoint.read_tensors(folder / WEIGHTS, flag)
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
        wanted, found = listed.get(name, "none"), said(tensors[name]) if name in tensors else "none"
        if wanted != found:
            raise ValueError(
                f"{flag}: {path} is not the one of {CONFIG}: expected {wanted} for {name}, found {found}; "
                "export or download the folder anew"
            )
    if checkpoint.file_hash(path) != config["weights_sha256"]:
        raise ValueError(
            f"{flag}: {path} is not the one of {CONFIG}: expected another sha256; export or download the folder anew"
        )


class SharedMagic(ModelHubMixin):
    """A trained model as huggingface_hub saves, uploads and downloads it.

    `path` is a checkpoint file or a folder of the three files; `state` is what it holds, as checkpoint.load gives it.
    `save_pretrained(folder)`, `push_to_hub("owner/name")` and `from_pretrained(folder or "owner/name")` come from the
    mixin.
    """

    def __init__(self, path: Path):
        self.path = path
        self.state = checkpoint.load(path, None, "SharedMagic")

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> str | None:
        arguments.require_new_folder(Path(save_directory), "save_directory")  # the mixin removes a config.json there
        return super().save_pretrained(save_directory, **options)

    def _save_pretrained(self, save_directory: Path) -> None:
        if self.path.is_dir():
            for name in FILES:
                shutil.copyfile(self.path / name, save_directory / name)
        else:
            export(self.path, save_directory, "SharedMagic")

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **download: Any) -> SharedMagic:
        folder = Path(model_id)
        return cls(
            folder if folder.is_dir() else Path(snapshot_download(model_id, allow_patterns=list(FILES), **download))
        )


@contextmanager
def talking_to_hub(flag: str, name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of whichever HTTP library the hub's client has come with
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{flag} {name}: {reason}; see that the name is right, and `hf auth login`") from error


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = arguments.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", type=Path, nargs="+", help="CHECKPOINT and DIR, with --push or --pull one of the two")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--push", metavar="OWNER/NAME", help="upload CHECKPOINT, a file or a folder, to the hub")
    what.add_argument("--pull", metavar="OWNER/NAME", help="download from the hub to DIR")
    parser.add_argument("--public", action="store_true", help="a repository that --push makes is seen by everyone")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    wanted = "CHECKPOINT" if args.push else "DIR" if args.pull else "CHECKPOINT DIR"
    if len(args.paths) != len(wanted.split()):
        parser.error(f"expected {wanted}, found {' '.join(map(str, args.paths))}")
    return args


def main(args: argparse.Namespace) -> None:
    path, folder = args.paths[0], args.paths[-1]
    if args.push:
        arguments.require_checkpoint(path, "CHECKPOINT", "train first, or export")
        shared = SharedMagic(path)
        with talking_to_hub("--push", args.push):
            print(shared.push_to_hub(args.push, private=not args.public))
        return
    if args.pull:
        arguments.require_new_folder(folder, "DIR")
        with talking_to_hub("--pull", args.pull):
            SharedMagic.from_pretrained(args.pull).save_pretrained(folder)
    else:
        arguments.require_checkpoint(path, "CHECKPOINT", "train first")
        export(path, folder, "DIR")
    print(f"{folder}: {', '.join(FILES)}")


if __name__ == "__main__":
    arguments.run(main, parse_args())
