"""The flags of `python -m utils.doctor`; torch and pandas are not imported before they are checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from utils import arguments, settings

DATA = Path("data/Breast_cancer")
OUTPUTS = [Path(name) for name in ("encoder_model", "decoder_model", "logs", "results")]
DESCRIPTION = """Check what is installed, the machine, and a folder of slices.

    python -m utils.doctor                                     # the machine, and data/Breast_cancer if there
    python -m utils.doctor --data data/mine --tiles data/mine_tiles

Each problem is one line of the list at the end, `found ...; fix: ...`; a damaged slice does not hide those behind it.
Nothing is written and nothing is downloaded. The exit code is 0 where there is no problem and 1 where there is one.
"""


@dataclass(kw_only=True, frozen=True)
class Settings:
    data: Path
    data_given: bool
    tiles: Path
    panels: Path | None
    slices: Path | None
    val_strip: bool
    allow_leak: bool
    out: list[Path]
    memory: float


def parse_args(argv: list[str] | None = None) -> Settings:
    parser = arguments.Parser(DESCRIPTION, prog="python -m utils.doctor")
    group = parser.add_argument_group("data")
    group.add_argument("--data", type=Path, help=f"folder of slices (default: {DATA}, where it is there)")
    group.add_argument(
        "--tiles", type=Path, default=Path("data/Breast_cancer_image_process"), help="tiles, a folder per slice"
    )
    group.add_argument("--panels", type=Path, help="gene files, a folder per slice (default: inside --data)")
    group.add_argument("--slices", type=Path, help="table of slices (default: slices.csv in --data, if there)")
    settings.add_split(group)
    group = parser.add_argument_group("machine")
    group.add_argument("--out", type=Path, nargs="+", default=OUTPUTS, help="output folders, whose disk is checked")
    settings.add_memory(parser)
    given = vars(parser.parse_args(argv))
    return Settings(**given | {"data": given["data"] or DATA, "data_given": given["data"] is not None})
