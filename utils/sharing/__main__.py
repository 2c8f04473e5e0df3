"""Write the folder that a trained model is shared by: its weights, what they mean, and a card.

    python -m utils.sharing decoder_model/best_epoch_weights.pth shared/

The folder holds model.safetensors (every tensor of the checkpoint), config.json (everything else) and README.md (the
card). Scripts take it wherever they take a checkpoint, and read the same values, to the last bit; only paths are cut to
file names, so that nothing of the machine is published. Nothing in the folder is code. `hf upload` publishes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from utils import arguments, settings
from utils.sharing.export import export
from utils.training import checkpoint
from utils.training.shared_folder import FILES


@dataclass(kw_only=True)
class Settings:
    checkpoint: Path
    folder: Path
    debug: bool


def parse_args(argv: list[str] | None = None) -> Settings:
    parser = arguments.Parser(__doc__, prog="python -m utils.sharing")
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a trained model of either stage")
    parser.add_argument("folder", type=Path, metavar="DIR", help="a new or an empty folder")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return Settings(**vars(parser.parse_args(argv)))


def main(args: Settings) -> None:
    checkpoint.require_checkpoint(args.checkpoint, "CHECKPOINT", "train first")
    export(args.checkpoint, args.folder, "DIR")
    print(f"{args.folder}: {', '.join(FILES)}")


if __name__ == "__main__":
    settings.run(main, parse_args())
