"""Share a trained model: a folder with its weights, what they mean, and a card; upload and download of that folder.

    python -m utils.sharing decoder_model/best_epoch_weights.pth shared/
    python -m utils.sharing shared/ --push owner/name
    python -m utils.sharing --pull owner/name shared/

The folder holds model.safetensors (every tensor of the checkpoint), config.json (everything else) and README.md (the
card). Scripts take it wherever they take a checkpoint, and read the same values, to the last bit; only paths are cut to
file names, so that nothing of the machine is published. Nothing in the folder is code.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from utils import settings
from utils.sharing.export import export
from utils.sharing.hub import SharedMagic, hub_errors
from utils.training import checkpoint
from utils.training.shared_folder import FILES


@dataclass(kw_only=True)
class Settings:
    paths: list[Path]
    push: str | None
    pull: str | None
    public: bool
    debug: bool


def parse_args(argv: list[str] | None = None) -> Settings:
    parser = settings.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", type=Path, nargs="+", help="CHECKPOINT and DIR, with --push or --pull one of the two")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--push", metavar="OWNER/NAME", help="upload CHECKPOINT, a file or a folder, to the hub")
    what.add_argument("--pull", metavar="OWNER/NAME", help="download from the hub to DIR")
    parser.add_argument("--public", action="store_true", help="make the repository of --push public")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = Settings(**vars(parser.parse_args(argv)))
    wanted = "CHECKPOINT" if args.push else "DIR" if args.pull else "CHECKPOINT DIR"
    if len(args.paths) != len(wanted.split()):
        parser.error(f"expected {wanted}, found {' '.join(map(str, args.paths))}")
    return args


def main(args: Settings) -> None:
    path, folder = args.paths[0], args.paths[-1]
    if args.push:
        checkpoint.require_checkpoint(path, "CHECKPOINT", "train first, or export")
        shared = SharedMagic(path)
        with hub_errors("--push", args.push):
            print(shared.push_to_hub(args.push, private=not args.public))
        return
    if args.pull:
        settings.require_new_folder(folder, "DIR")
        with hub_errors("--pull", args.pull):
            SharedMagic.from_pretrained(args.pull).save_pretrained(folder)
    else:
        checkpoint.require_checkpoint(path, "CHECKPOINT", "train first")
        export(path, folder, "DIR")
    print(f"{folder}: {', '.join(FILES)}")


if __name__ == "__main__":
    settings.run(main, parse_args())
