"""Does the gene encoder learn from masked bins what no marginal tells, and does stage one gain by it?

    python benchmarks/pretrain_genes.py --data data/Breast_cancer
    python benchmarks/pretrain_genes.py --data data/Breast_cancer --stage_one --image_weights weights.pth

The fold within_C of benchmarks/accuracy.py (C2 and C3 teach, C4 is held out), 500 genes, two blocks. Makes the panels
below --out, pretrains for each seed, and writes pretrain_genes.json and a table there; --stage_one cuts tiles too, and
trains stage one with the flags of accuracy.py, once from pretrained and once from untrained blocks for each seed.
"""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import redirect_stdout
from dataclasses import dataclass
from datetime import date
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import accuracy_folds as folds
from benchmarks.speed import machine_name
from utils import settings
from utils.files.atomic import write_record
from utils.genes import panels as gene_panels
from utils.slices import splits

FOLD = "within_C"
DEPTH, HEADS, WIDTH = 2, 4, 200  # blocks, heads of 64: those of accuracy_folds.FULL
COMPONENTS = 10
NEAREST, PRIOR = 40, 10.0  # spots of like depth, and what the slice's marginal weighs beside them; best of those tried
FIGURES = ("val_R@5", "test_R@5_image_to_gene", "test_R@5_gene_to_image", "test_random10")


def parse_args(argv=None) -> argparse.Namespace:
    parser = settings.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the sections of patient C")
    parser.add_argument("--out", type=Path, default=Path("results/pretrain_genes"), help="panels, models, results")
    parser.add_argument("--seeds", type=settings.count_or_zero, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=settings.count, default=20, help="of pretraining")
    parser.add_argument("--lr", type=settings.positive, default=1e-3, help="highest learning rate of pretraining")
    parser.add_argument("--stage_one", action="store_true", help="train stage one with and without pretraining")
    parser.add_argument("--image_weights", default="timm", help="of EfficientNet-Lite0, for --stage_one")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


@dataclass(frozen=True)
class Section:
    """A slice as pretraining sees it, without images."""

    name: str
    part: str
    total_counts: np.ndarray  # (S,)
    panels: dict[str, gene_panels.Panel]

    def rows_of(self, part: str) -> np.ndarray:
        return np.arange(len(self.total_counts) if part in (self.part, "all") else 0)


def prepare(args) -> list[splits.SliceRow]:
    """The split and the panels below --out; returns the rows of the split."""
    import make_decoder_data

    given, _ = splits.read_table(args.data, split=False)
    fold = next(fold for fold in folds.default_folds(given) if fold.name == FOLD)
    fold.write(args.out / "slices.csv")
    flags = [*data_flags(args), *fold.flags, *folds.FULL["make_decoder_data"].split()]
    with redirect_stdout(StringIO()):
        make_decoder_data.main(make_decoder_data.parse_args(flags))
    return list(fold.rows)


def data_flags(args) -> list[str]:
    places = {"data": args.data, "slices": args.out / "slices.csv", "panels": args.out / "panels"}
    return [str(word) for flag, path in places.items() for word in (f"--{flag}", Path(path).resolve())]


def load(rows: list[splits.SliceRow], args) -> list[Section]:
    found = []
    for row in splits.of_part(rows, "train", "val"):
        panels = {
            role: gene_panels.read_panel(gene_panels.panel_path(args.data, args.out / "panels", row.slice, role))
            for role in gene_panels.FILES
        }
        found.append(Section(row.slice, row.part, panels["input"].total_counts, panels))
    return found


def like_depth(one: Section, bins: np.ndarray) -> float:
    """Cross entropy of each gene's bins among other spots of the slice that have about as many counts: how far depth
    alone leads. NEAREST and PRIOR were chosen on the very spots that are scored, which flatters it."""
    from utils.training import pretrain

    slice_wide = np.exp(pretrain.marginal_without_self(bins, pretrain.numbers_of_bins(bins)))
    log_depth, total = np.log(one.total_counts), 0.0
    for spot in range(len(bins)):
        order = np.argsort(np.abs(log_depth - log_depth[spot]), kind="stable")
        nearest = bins[order[order != spot][:NEAREST]]
        shares = (pretrain.numbers_of_bins(nearest) + PRIOR * slice_wide[spot]) / (len(nearest) + PRIOR)
        total -= np.log(np.take_along_axis(shares, bins[spot][:, None].astype(int), axis=1)).mean()
    return total / len(bins)


def pooled(encoder, bins: np.ndarray) -> np.ndarray:
    """What the trunk makes of profiles, a mean over genes: (S, G) -> (S, W)."""
    import torch

    with torch.no_grad():
        hidden = encoder.embed(torch.from_numpy(bins).to(encoder.norm.weight.device))
        for block in encoder.blocks:
            hidden = block(hidden)
        return encoder.norm(hidden).mean(1).float().cpu().numpy()


def probe(features: list[np.ndarray], sections: list[Section]) -> float:
    """Correlation of components of expression that ridge reads off features (S, P) of each section, on validation."""
    from utils.evaluation.ridge import fit_ridge
    from utils.training import targets

    of = targets.components(sections, COMPONENTS)
    train = np.concatenate([x for x, one in zip(features, sections, strict=True) if one.part == "train"])
    mean, sd = train.mean(0), np.maximum(train.std(0), 1e-3)
    x, y = ({part: [] for part in ("train", "val")} for _ in range(2))
    for own, one in zip(features, sections, strict=True):
        x[one.part].append((own - mean) / sd)
        y[one.part].append(of.scores(targets.residuals(one)))
    return fit_ridge(x["train"], y["train"], x["val"], y["val"]).val_pcc


def run(sections: list[Section], bins: list[np.ndarray], seed: int, args) -> dict[str, Any]:
    """One pretraining: figures of its best epoch on all places of the held-out spots, and the probes."""
    from model.gene_encoder import GeneEncoder
    from model.masked_bins import MaskedBins
    from utils import distributed
    from utils.training import loop, pretrain

    flags = {
        "seed": seed,
        "pretrain_epochs": args.epochs,
        "pretrain_lr": args.lr,
        "batch_size": 32,
        "precision": "auto",
    }
    settings = argparse.Namespace(**flags, Init_lr=2e-4, momentum=0.9, weight_decay=1e-2, lr_decay_type="cos")
    settings.Min_lr = settings.Init_lr * 0.01
    accelerator = distributed.start(args.device, "auto")
    loop.seed_everything(seed)
    encoder = GeneEncoder(bins[0].shape[1], DEPTH, WIDTH, HEADS).to(accelerator.device)
    masked = MaskedBins(encoder).to(accelerator.device)
    before, start = probe([pooled(encoder, own) for own in bins], sections), time.perf_counter()
    log = pretrain.pretrain(masked, sections, bins, [], accelerator, settings)
    seconds = time.perf_counter() - start
    held_out = pretrain.spots_of(sections, bins, "val")
    return {
        "seed": seed,
        **pretrain.score(masked, held_out, pretrain.ROUNDS, accelerator, settings),
        "epoch": min(log, key=lambda row: row["model"])["epoch"],
        "probe_untrained": before,
        "probe_pretrained": probe([pooled(encoder, own) for own in bins], sections),
        "seconds": round(seconds, 1),
        "log": log,
    }


def stage_one(seed: int, pretrained: bool, args) -> dict[str, Any]:
    """Stage one as accuracy.py trains it on this fold, and its retrieval on the test section."""
    import json

    from benchmarks.accuracy_run import BEST, Step
    from utils.training import checkpoint

    home = (args.out / f"seed_{seed}_{'pretrained' if pretrained else 'untrained'}").resolve()
    tiles = (args.out / "tiles").resolve()
    tiling = ("--data", str(args.data.resolve()), "--tiles", str(tiles), *folds.FULL["image_tilling"].split())
    shared = (*data_flags(args), "--tiles", str(tiles), "--allow_leak", "--seed", str(seed), "--device", args.device)
    encoder = home / "encoder_model" / BEST
    named = args.image_weights in ("timm", "none")
    weights = args.image_weights if named else str(Path(args.image_weights).resolve())
    training = (*shared, "--image_encoder", folds.DEFAULT_ENCODER, "--image_weights", weights)
    training += ("--out", str(encoder.parent), "--logs", str(home / "logs"), *folds.FULL["train_mymodel"].split())
    if pretrained:
        training += ("--pretrain_genes", "--pretrain_epochs", str(args.epochs), "--pretrain_lr", str(args.lr))
    cut = Step("image_tilling", tiling, tiles, ())
    first = Step("train_mymodel", training, home, (cut.key,))
    evaluation = (*shared, "--encoder", str(encoder), "--out", str(home / "retrieval"))
    seconds = [step.run() for step in (cut, first, Step("get_accuracy_image", evaluation, home, (first.key,)))]
    found = json.loads((home / "retrieval" / "metrics.json").read_text())
    figures = [found["slice"][way]["R@5"] for way in ("image_to_gene", "gene_to_image")]
    figures = [checkpoint.load(encoder, "stage_one", "--encoder")["row"]["val_R@5"], *figures]
    figures.append(found["random10"]["contrastive"])
    return {"seed": seed, "pretrained": pretrained, "seconds": seconds[1], **dict(zip(FIGURES, figures, strict=True))}


def lines(record: dict[str, Any]) -> list[str]:
    """The tables, as markdown."""
    found = [
        "| seed | model | marginal | depth | expressed: model | marginal | epoch | probe: untrained | pretrained | s |"
    ]
    found += ["| --- " * 10 + "|"]
    for row in record["runs"]:
        names = ("model", "marginal", "depth", "model_expressed", "marginal_expressed", "epoch")
        names += ("probe_untrained", "probe_pretrained", "seconds")
        values = [(record | row)[name] for name in names]
        cells = [
            f"{value:.4f}" if 0 < abs(value) < 1 and name != "epoch" else f"{value:g}"
            for name, value in zip(names, values, strict=True)
        ]
        found.append("| " + " | ".join([str(row["seed"]), *cells]) + " |")
    found.append(f"\nThe components read off the bins by ridge, without an encoder: {record['probe_bins']:.4f}")
    if record["stage_one"]:
        found += ["", f"| seed | pretrained | {' | '.join(FIGURES)} |", "| --- " * 6 + "|"]
    for row in record["stage_one"]:
        cells = [f"{row[name]:.3f}" for name in FIGURES]
        found.append("| " + " | ".join([str(row["seed"]), "yes" if row["pretrained"] else "no", *cells]) + " |")
    return found


def main(args) -> dict[str, Any]:
    args.out.mkdir(parents=True, exist_ok=True)
    rows = prepare(args)
    sections = load(rows, args)
    bins = [gene_panels.bin_tokens(one.panels["input"].read_counts(), one.total_counts) for one in sections]
    validation = next(i for i, one in enumerate(sections) if one.part == "val")
    record: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": machine_name(args.device),
        "settings": {"fold": FOLD, "epochs": args.epochs, "lr": args.lr, "blocks": DEPTH, "genes": bins[0].shape[1]},
        "depth": like_depth(sections[validation], bins[validation]),
        "probe_bins": probe([own.astype(np.float32) for own in bins], sections),
        "runs": [run(sections, bins, seed, args) for seed in args.seeds],
    }
    pairs = [(seed, pretrained) for seed in args.seeds for pretrained in (True, False)] if args.stage_one else []
    record["stage_one"] = [stage_one(*pair, args) for pair in pairs]
    write_record(args.out / "pretrain_genes.json", record)
    (args.out / "pretrain_genes.md").write_text("\n".join(lines(record)) + "\n")
    print("\n".join(lines(record)))
    return record


if __name__ == "__main__":
    settings.run(main, parse_args())
