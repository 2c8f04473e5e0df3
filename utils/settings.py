"""Settings of the scripts: flags that several share, their checks, and how a script ends with an error."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeVar

from utils import arguments, distributed, memory, words

PARTS = ("train", "val", "test")
# flags of places, machine and time, which do not change what a script computes
WHERE = (
    "data tiles panels slices out logs export encoder decoder image_weights device workers debug memory resume "
    "save_every max_minutes compile"
).split()


@dataclass(kw_only=True)
class SharedSettings:
    """The flags of `shared`, which every published script has."""

    data: Path
    tiles: Path
    panels: Path | None
    slices: Path | None
    val_strip: bool
    allow_leak: bool
    device: str
    seed: int
    workers: int | None
    debug: bool


@dataclass(kw_only=True)
class OptimizerSettings:
    """What AdamW and its schedule take."""

    Init_lr: float
    Min_lr: float
    momentum: float
    weight_decay: float
    lr_decay_type: str


@dataclass(kw_only=True)
class TrainingSettings(SharedSettings, OptimizerSettings):
    """The flags of `shared`, `add_training` and `add_memory`, which both training scripts have."""

    out: Path
    logs: Path
    batch_size: int
    Init_Epoch: int
    Epoch: int
    precision: str
    compile: bool
    export: Path | None
    resume: bool
    save_every: int
    max_minutes: float | None
    memory: float


@dataclass(kw_only=True)
class StageOneSettings(TrainingSettings):
    """The flags of train_mymodel.py."""

    image_encoder: str
    image_size: int
    crop_scales: list[float]
    image_weights: str
    image_tokens: int
    tune: str
    layer_decay: float
    gene_depth: int
    gene_width: int
    gene_heads: int
    gene_tokens: int
    downsample_counts: int | None
    pretrain_genes: bool
    pretrain_epochs: int
    pretrain_lr: float
    pretrain_data: Path | None
    gene_weights: Path | None
    gene2vec: Path | None
    gene_vocab: Path | None
    gene_aliases: Path | None
    tune_block: int
    width: int
    fusion_blocks: int
    queue_size: int
    alpha: float
    expression_weight: float
    components: int
    matching_weight: float
    batch_neighbours: int
    accumulate: int


@dataclass(kw_only=True)
class StageTwoSettings(TrainingSettings):
    """The flags of train_decoder.py."""

    encoder: Path
    target: str
    context: int
    decoder_layers: int
    decoder_width: int
    tta: int
    cross_validate: bool


@dataclass(kw_only=True)
class EvaluationSettings(SharedSettings):
    """The flags of `shared`, `add_evaluation` and `add_memory`, which both evaluation scripts have."""

    part: str
    image_weights: str | None
    batch_size: int
    precision: str
    out: Path
    memory: float


class HasDebug(Protocol):
    """Settings of any program of ours."""

    @property
    def debug(self) -> bool: ...


S = TypeVar("S", bound=HasDebug)


def shared(description: str | None, part: str | None = None, unused: Collection[str] = ()) -> arguments.Parser:
    """A parser with the flags of every script.

    Parameters
    ----------
    part : default of --part, None where the script has no such flag
    unused : names of flags that the script accepts and has no use for
    """
    parser = arguments.Parser(description)
    group = parser.add_argument_group("data")
    group.add_argument("--data", type=Path, default=Path("data/Breast_cancer"), help="folder of slices")
    tiles = arguments.UNUSED if "tiles" in unused else "folder of tiles, a folder per slice in it"
    group.add_argument("--tiles", type=Path, default=Path("data/Breast_cancer_image_process"), help=tiles)
    panels = (
        arguments.UNUSED
        if "panels" in unused
        else "folder of gene files, a folder per slice in it (default: inside --data)"
    )
    group.add_argument("--panels", type=Path, help=panels)
    group.add_argument("--slices", type=Path, help="table of slices (default: slices.csv in --data, if there)")
    if part is not None:
        group.add_argument("--part", choices=[*PARTS, "all"], default=part, help="slices to use")
    add_split(group)
    group = parser.add_argument_group("machine")
    device = arguments.UNUSED if "device" in unused else "auto: CUDA if there is a device, else the CPU"
    group.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help=device)
    seed = arguments.UNUSED if "seed" in unused else "of all random draws"
    group.add_argument("--seed", type=arguments.count_or_zero, default=0, help=seed)
    workers = "processes that read tiles, or threads that cut them (default: up to 4; none to read without a GPU)"
    group.add_argument(
        "--workers", type=arguments.count_or_zero, help=arguments.UNUSED if "workers" in unused else workers
    )
    group.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def add_split(group: argparse._ArgumentGroup) -> None:
    """How slices are split into parts, beside slices.csv."""
    group.add_argument(
        "--val_strip",
        action="store_true",
        help="validate on a contiguous quarter of each train slice; give it to every script",
    )
    group.add_argument(
        "--allow_leak",
        action="store_true",
        help="continue although a patient is in test and in another part; recorded in metrics.json and the reports",
    )


def add_training(parser: arguments.Parser, out: str) -> None:
    """The published hyperparameters of both training scripts, names and defaults kept."""
    group = parser.add_argument_group("training")
    group.add_argument("--out", type=Path, default=Path(out), help="folder of the checkpoints")
    group.add_argument(
        "--logs", type=Path, default=Path("logs"), help="folder of the logs: log.jsonl, loss curves, TensorBoard events"
    )
    group.add_argument(
        "--batch_size",
        type=arguments.count,
        default=32,
        help="spots of a step, over all processes; the candidates of stage one",
    )
    group.add_argument("--Init_Epoch", type=arguments.count_or_zero, default=0, help="number of the first epoch")
    group.add_argument(
        "--Epoch",
        type=arguments.count,
        default=100,
        help="number of epochs; with --Init_Epoch the number to stop before",
    )
    group.add_argument(
        "--Init_lr", type=arguments.positive, default=1e-4, help="highest learning rate, not scaled with --batch_size"
    )
    group.add_argument("--Min_lr", type=arguments.not_negative, help="last learning rate (default: Init_lr * 0.01)")
    group.add_argument("--momentum", type=arguments.fraction, default=0.9, help="first beta of AdamW")
    group.add_argument(
        "--weight_decay", type=arguments.not_negative, default=1e-2, help="of AdamW; not applied to norms and biases"
    )
    group.add_argument(
        "--lr_decay_type",
        choices=["cos", "step"],
        default="cos",
        help="cosine, or step decay in ten steps; both after a warm-up over 3 %% of the steps",
    )
    group.add_argument(
        "--precision",
        choices=["auto", "fp32", "bf16", "fp16"],
        default="auto",
        help="auto: bf16 where the hardware multiplies in it, else fp32",
    )
    group.add_argument(
        "--compile",
        action="store_true",
        help="torch.compile the model first, which takes minutes; steps may then be faster",
    )
    group.add_argument("--export", type=Path, help="new folder, to which the best epoch is written for sharing")
    group = parser.add_argument_group("interruptions")
    group.add_argument(
        "--resume", action="store_true", help="continue from last_epoch_weights.pth in --out, to the same end"
    )
    group.add_argument(
        "--save_every",
        type=arguments.count_or_zero,
        default=1000,
        help="steps between two saves; 0: only after an epoch",
    )
    group.add_argument(
        "--max_minutes", type=arguments.positive, help="save and stop after so long, for queues with a time limit"
    )


def add_encoders(parser: arguments.Parser) -> argparse._ArgumentGroup:
    """Both encoders of stage one; returns the group of the image encoder, for the script's own."""
    images = group = parser.add_argument_group("image encoder")
    group.add_argument(
        "--image_encoder",
        default="deit_base_patch16_224.fb_in1k",
        metavar="NAME",
        help="a timm model, or hf-hub:OWNER/MODEL (docs/encoders.md)",
    )
    group.add_argument("--image_size", type=arguments.count, default=224, help="side of the encoder's input, pixels")
    group.add_argument(
        "--crop_scales",
        type=arguments.fraction_above_zero,
        nargs="+",
        default=[1.0],
        help="centred squares that the encoder sees, fractions of the tile's side; 1 0.5: the tile and its middle",
    )
    group.add_argument(
        "--image_weights",
        default="timm",
        metavar="WEIGHTS",
        help="timm (downloads), none (random), or a file: .pth, .safetensors",
    )
    group.add_argument(
        "--image_tokens", type=arguments.count, default=50, help="image tokens that the fusion module reads, at most"
    )
    group = parser.add_argument_group("gene encoder")
    group.add_argument("--gene_depth", type=arguments.count, default=6, help="Performer blocks")
    group.add_argument("--gene_width", type=arguments.count, default=200, help="width of the Performer")
    group.add_argument(
        "--gene_heads", type=arguments.count, default=10, help="attention heads of the Performer, each of width 64"
    )
    group.add_argument("--gene_tokens", type=arguments.count, default=64, help="tokens that the genes are pooled into")
    group.add_argument(
        "--downsample_counts", type=arguments.count, help="counts that each spot is downsampled to before binning"
    )
    group.add_argument(
        "--pretrain_genes", action="store_true", help="pretrain the gene encoder by masked-bin prediction"
    )
    group.add_argument(
        "--pretrain_epochs",
        type=arguments.count,
        default=20,
        help="epochs of pretraining; the best by held-out cross entropy is kept",
    )
    group.add_argument(
        "--pretrain_lr", type=arguments.positive, default=1e-3, help="highest learning rate of pretraining"
    )
    group.add_argument("--pretrain_data", type=Path, help="folder of .h5ad files with raw counts, without images")
    return images


def add_evaluation(parser: arguments.Parser, out: str) -> argparse._ArgumentGroup:
    """The flags of both evaluation scripts; returns their group, for the script's own."""
    group = parser.add_argument_group("evaluation")
    group.add_argument(
        "--image_weights", metavar="WEIGHTS", help="of the baselines' pretrained encoder (default: as stage one)"
    )
    group.add_argument("--batch_size", type=arguments.count, default=32, help="spots encoded at a time")
    group.add_argument(
        "--precision",
        choices=["auto", "fp32", "bf16", "fp16"],
        default="auto",
        help="auto: bf16 where the hardware multiplies in it, else fp32",
    )
    group.add_argument("--out", type=Path, default=Path(out), help="folder of the results")
    return group


def add_memory(parser: arguments.Parser) -> None:
    group = parser.add_argument_group("memory")
    group.add_argument(
        "--memory",
        type=arguments.positive,
        default=4.0,
        metavar="GIB",
        help="GiB of memory for arrays that grow with the number of spots; beyond it they are on disk",
    )


def parse_training(parser: arguments.Parser, argv: list[str] | None) -> dict[str, Any]:
    """Values of the flags by name; --Min_lr has its default, which depends on --Init_lr."""
    flags = vars(parser.parse_args(argv))
    lowest = flags["Init_lr"] * 0.01 if flags["Min_lr"] is None else flags["Min_lr"]
    return flags | {"Min_lr": lowest}


def check_training(flags: TrainingSettings) -> None:
    """Checks between flags, before anything heavy is imported."""
    if flags.Min_lr > flags.Init_lr:
        raise ValueError(f"--Min_lr: expected at most --Init_lr {flags.Init_lr:g}, found {flags.Min_lr:g}; lower it")
    if flags.Init_Epoch >= flags.Epoch:
        raise ValueError(f"--Init_Epoch: expected less than --Epoch {flags.Epoch}, found {flags.Init_Epoch}; lower it")
    distributed.check_batch_size(flags.batch_size)
    if flags.batch_size < 2:
        raise ValueError(f"--batch_size: expected at least 2 spots, found {flags.batch_size}; raise it")
    saved = [flags.out / name for name in ("last_epoch_weights.pth", "previous_epoch_weights.pth")]
    if flags.resume and not any(path.is_file() for path in saved):
        raise ValueError(f"--resume: expected the file {saved[0]}, found none; run without --resume first")
    if flags.export is not None:
        require_new_folder(flags.export, "--export")


def check_encoders(flags: StageOneSettings) -> None:
    """Files and flags of add_encoders."""
    if flags.image_weights not in ("timm", "none"):
        require_file(Path(flags.image_weights), "--image_weights", "or use timm or none")
    if flags.pretrain_data and not flags.pretrain_genes:
        raise ValueError("--pretrain_data: expected --pretrain_genes, which alone reads it, found none; give both")
    if flags.pretrain_genes and flags.gene_weights:
        raise ValueError(
            "--pretrain_genes: expected no --gene_weights, which freezes the blocks, found both; leave one of them out"
        )


def require_file(path: Path, flag: str, remedy: str) -> Path:
    if not path.is_file():
        raise ValueError(f"{flag}: expected the file {path}, found none; {remedy}")
    return path


def require_new_folder(path: Path, flag: str) -> Path:
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"{flag}: expected a new or an empty folder, found {path} with something in it; name another")
    return path


def warn(warnings: list[str]) -> None:
    for warning in warnings:
        print(f"warning: {warning}")


def line_of(error: BaseException) -> str | None:
    """An error of files, flags or memory as one line; None for any other error, which keeps its traceback."""
    text = " ".join(str(error).split())
    if memory.is_out_of_memory(error):
        return (
            f"expected memory for the work, found too little ({words.cut(text)}); fix: lower --batch_size, --workers "
            "or --memory, or take a machine with more"
        )
    return text if isinstance(error, (ValueError, OSError)) else None


def program() -> str:
    """Name of the running script, or of the module after `python -m`."""
    path = Path(sys.argv[0])
    return f"utils.{path.parent.name}" if path.name == "__main__.py" else path.name


def run(main: Callable[[S], object], args: S) -> NoReturn:
    """Call main(args); an error of files, flags or memory ends in one line on stderr and exit code 2. Of several
    processes the first one prints."""
    if int(os.environ.get("RANK", 0)) > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123 (as long as the process)
    code = 0
    try:
        main(args)
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        line = line_of(error)
        if args.debug or line is None:
            raise
        print(f"{program()}: {line}", file=sys.stderr)
        code = 2
    raise SystemExit(code)  # out here, where nothing that the error refers to is left
