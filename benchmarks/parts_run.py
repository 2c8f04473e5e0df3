"""Runs of parts.py: the simulated cohort, the scripts as a user calls them, and the figures of one method and seed."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import decoder_similarity
import get_accuracy_image
import image_tilling
import make_decoder_data
import train_decoder
import train_mymodel
from benchmarks.accuracy_folds import shuffle_panels
from utils import distributed
from utils.evaluation import retrieval
from utils.features import cache
from utils.features.dataset import SliceData
from utils.files.atomic import write_record
from utils.simulation.slices import write_slices
from utils.slices import splits
from utils.training import checkpoint, split

RULES = 1  # raised whenever a method or figure is computed differently, so that earlier runs are repeated
BEST = "best_epoch_weights.pth"
MISMATCHED, FRACTION = "_mismatched", 0.3
NO_MATCHING, NO_QUEUE, NO_ALPHA = "--matching_weight 0", "--queue_size 0", "--alpha 0"
QUEUE, ALPHA = "--queue_size 1024", "--alpha 0.4"
PARTS = {  # flags of train_mymodel.py
    "none": f"{NO_MATCHING} {NO_QUEUE} {NO_ALPHA}",
    "matching": f"{NO_QUEUE} {NO_ALPHA}",
    "queue": f"{NO_MATCHING} {QUEUE} {NO_ALPHA}",
    "distillation": f"{NO_MATCHING} {NO_QUEUE} {ALPHA}",
    "queue_distillation": f"{NO_MATCHING} {QUEUE} {ALPHA}",
    "full": f"{QUEUE} {ALPHA}",
}
STAGE_ONE = (
    "--image_encoder test_vit --image_size 64 --image_weights none --gene_depth 1 --gene_width 64 --gene_heads 1 "
    "--gene_tokens 16 --fusion_blocks 1 --width 128 --Init_lr 1e-3 --expression_weight 0 --precision fp32"
)
STAGE_TWO = "--decoder_layers 1 --decoder_width 32 --Init_lr 1e-3 --Epoch 3 --precision fp32"
TILE_PX, BATCH_SIZE, N_GENES = 64, 32, 600
PANELS = "--n_input_genes 300 --n_top_genes 100"
AUC_OTHERS = 9  # mismatched pairs to each pair
N_TOLD_APART = 3  # patients


@dataclass(frozen=True)
class Cohort:
    """Simulated patients, a slice each: those of `parts` come first, the last `unseen` are for the evaluation."""

    folder: Path
    patients: int
    parts: Sequence[str]
    unseen: int
    spots: int
    batch_effects: float
    val_strip: bool

    def flags(self, panels: str = "panels") -> list[str]:
        """Where every script finds the slices."""
        places = {"data": "data", "tiles": "tiles", "panels": panels, "slices": "slices.csv"}
        words = [word for flag, name in places.items() for word in (f"--{flag}", str(self.folder / name))]
        return [*words, *(["--val_strip"] if self.val_strip else [])]

    def prepare(self, mismatched: bool) -> None:
        """Slices, tiles and panels, as far as they are not there."""
        data = self.folder / "data"
        if not (data / "slices.csv").exists():
            shutil.rmtree(data, ignore_errors=True)
            write_slices(data, self.patients, 1, self.spots, N_GENES, batch_effects=self.batch_effects, verbose=True)
        rows, _ = splits.read_table(data, split=False)
        part = [*self.parts, *[""] * (len(rows) - len(self.parts) - self.unseen), *["test"] * self.unseen]
        table = [replace(row, part=p) for row, p in zip(rows, part, strict=True)]
        splits.write_table(table, self.folder / "slices.csv")
        image_tilling.main(image_tilling.parse_args([*self.flags(), "--tile_px", str(TILE_PX)]))
        for panels in ("panels", "panels" + MISMATCHED) if mismatched else ("panels",):
            make_decoder_data.main(make_decoder_data.parse_args([*self.flags(panels), *PANELS.split()]))
        if mismatched:
            train = [row.slice for row in table if row.part == "train"]
            shuffle_panels(self.folder / ("panels" + MISMATCHED), train, FRACTION)


@dataclass(frozen=True)
class Run:
    """A method with a seed."""

    cohort: Cohort
    method: str
    seed: int
    steps: int
    more_flags: str = ""

    @property
    def folder(self) -> Path:
        return self.cohort.folder / f"{self.method}_seed{self.seed}"

    @property
    def encoder(self) -> Path:
        return self.folder / "encoder_model" / BEST

    def stage_one_flags(self) -> str:
        """All that sets what stage one computes; whole epochs, as many as --steps asks for."""
        n_spots = self.cohort.parts.count("train") * self.cohort.spots
        epochs = max(round(self.steps / (n_spots // BATCH_SIZE)), 1)
        part = PARTS[self.method.removesuffix(MISMATCHED)]
        return f"{STAGE_ONE} --batch_size {BATCH_SIZE} --Epoch {epochs} --seed {self.seed} {part} {self.more_flags}"

    def key(self) -> dict[str, Any]:
        """What a finished run must have been made with to be kept."""
        about = (str(self.cohort.patients), *self.cohort.parts, self.cohort.unseen, self.cohort.spots)
        flags = [self.stage_one_flags(), STAGE_TWO]
        return {"rules": RULES, "cohort": [*about, self.cohort.batch_effects, self.cohort.val_strip], "flags": flags}

    def finish(self) -> dict[str, Any]:
        """Figures of the run, read where it is finished, else made."""
        path, key = self.folder / "figures.json", self.key()
        if path.exists() and (kept := json.loads(path.read_text()))["key"] == json.loads(json.dumps(key)):
            return kept["figures"]
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        with (self.folder / "log").open("w") as log, contextlib.redirect_stdout(log):
            figures = self.do()
        write_record(path, {"key": key, "figures": figures})
        print(f"{self.folder.name}: " + ", ".join(f"{k} {v:.3f}" for k, v in figures["mean"].items() if v is not None))
        return figures

    def do(self) -> dict[str, Any]:
        """The scripts of both stages and their evaluations; figures of each unseen patient, and their means."""
        start, panels = time.perf_counter(), "panels"
        train = [*self.cohort.flags(panels + MISMATCHED if self.method.endswith(MISMATCHED) else panels)]
        stage_one = ["--out", str(self.encoder.parent), "--logs", str(self.folder / "logs")]
        train_mymodel.main(train_mymodel.parse_args([*train, *stage_one, *self.stage_one_flags().split()]))
        seconds = time.perf_counter() - start
        evaluated = [*self.cohort.flags(), "--precision", "fp32"]
        retrieval_flags = ["--encoder", str(self.encoder), "--out", str(self.folder / "retrieval")]
        args = get_accuracy_image.parse_args([*evaluated, *retrieval_flags])
        get_accuracy_image.main(args)
        figures = retrieval_figures(self.folder / "retrieval" / "metrics.json", self.matching)
        if self.matching:
            for name, of_method in matching_aucs(args).items():
                figures[name] |= of_method
        for name, of_method in self.stage_two(train, evaluated).items():
            figures[name] |= of_method
        means = {key: mean([of[key] for of in figures.values()]) for key in next(iter(figures.values()))}
        return {"per_patient": figures, "mean": means, "seconds": round(seconds, 1), "steps": self.n_steps()}

    @property
    def matching(self) -> bool:
        return NO_MATCHING not in self.stage_one_flags()

    def n_steps(self) -> int:
        """Steps that stage one took."""
        last = checkpoint.load(self.encoder.with_name("last_epoch_weights.pth"), "stage_one", "--encoder")
        return int(last["model"]["n_steps"])

    def stage_two(self, train: list[str], evaluated: list[str]) -> dict[str, dict[str, float]]:
        """PCC per gene against residuals of each patient: at the initialisation, and after training."""
        out = self.folder / "decoder_model"
        flags = [*train, "--encoder", str(self.encoder), "--out", str(out), "--logs", str(self.folder / "logs")]
        flags += [*STAGE_TWO.split(), "--seed", str(self.seed)]
        figures: dict[str, dict[str, float]] = {}
        for name, more in (("pcc_initialisation", ["--max_minutes", "1e-9"]), ("pcc_residuals", ["--resume"])):
            with contextlib.suppress(SystemExit):  # --max_minutes: leaves after a step, the initialisation is the best
                train_decoder.main(train_decoder.parse_args([*flags, *more]))
            to = self.folder / name
            words = [*evaluated, "--decoder", str(out / BEST), "--out", str(to)]
            decoder_similarity.main(decoder_similarity.parse_args(words))
            per_slice = json.loads((to / "metrics.json").read_text())["per_slice"]
            for slice_, of_slice in per_slice.items():
                figures.setdefault(slice_, {})[name] = of_slice["residuals"]["model"]["pcc_gene_mean"]
        return figures


def mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def retrieval_figures(path: Path, matching: bool) -> dict[str, dict[str, float | None]]:
    """Of metrics.json, by slice; null where the fusion was not trained."""
    figures: dict[str, dict[str, float | None]] = {}
    for name, of_slice in json.loads(path.read_text())["per_slice"].items():
        near, whole = of_slice["neighbours"], of_slice["slice"]
        recalls = [whole[way]["R@10"] for way in ("image_to_gene", "gene_to_image")]
        figures[name] = {
            "contrastive_neighbours": near["contrastive"],
            "matching_neighbours": near["matching"] if matching else None,
            "reranked_neighbours": near["reranked"] if matching else None,
            "matching_auc": None,
            "matching_auc_same_depth": None,
            "recall_at_10": float(np.mean(recalls)),
        }
    return figures


# ---- batch effects


def patients_told_apart(encoder: Path, flags: list[str]) -> float | None:
    """Accuracy of a linear classifier of the first three patients of any part, on features of the pretrained encoder;
    None of fewer patients.

    Trained on the spots left of each slice's middle and tested on those right of it, and the other way round: spots
    that lie together look alike, whoever's they are.
    """
    from sklearn.linear_model import LogisticRegression

    args = get_accuracy_image.parse_args([*flags, "--encoder", str(encoder), "--part", "all", "--allow_leak"])
    state = checkpoint.load(encoder, "stage_one", "--encoder")
    slices = split.load_evaluation(args, state, "--encoder", ("input",))[0][:N_TOLD_APART]
    if len(slices) < N_TOLD_APART:
        return None
    with distributed.running("cpu", "fp32") as accelerator:
        inference = cache.Inference(accelerator, args.batch_size, args.workers)
        features = cache.pretrained_features(state, state["settings"], slices, inference, None)
    x, patient = np.concatenate(features), np.repeat(np.arange(len(slices)), [len(f) for f in features])
    x = (x - x.mean(0)) / np.maximum(x.std(0), 1e-6)
    left = np.concatenate([s.xy_fullres_px[:, 0] < np.median(s.xy_fullres_px[:, 0]) for s in slices])
    classifier = LogisticRegression(max_iter=1000)
    halves = [classifier.fit(x[half], patient[half]).score(x[~half], patient[~half]) for half in (left, ~left)]
    return float(np.mean(halves))


# ---- AUC of matching


def depth_candidates(total_counts: np.ndarray, n: int) -> np.ndarray:
    """For each spot itself, then the n others whose total counts are nearest in rank: (S,) -> (S, 1 + n)."""
    rank = np.argsort(np.argsort(total_counts, kind="stable"))
    distance = np.abs(rank[:, None] - rank[None, :]).astype(float)
    np.fill_diagonal(distance, -1)
    return np.argsort(distance, axis=1, kind="stable")[:, : n + 1]


def auc_of(scores: np.ndarray, truth: np.ndarray) -> float:
    """Pairs, in column `truth` (S,) of the scores (S, K), against all others."""
    import torch

    from model import losses

    is_pair = np.arange(scores.shape[1]) == truth[:, None]
    return float(losses.pair_auc(torch.from_numpy(scores[is_pair]), torch.from_numpy(scores[~is_pair])))


def matching_aucs(args: get_accuracy_image.Settings) -> dict[str, dict[str, float]]:
    """By slice, against mismatched pairs of the same slice: drawn at random, and of nearly equal total counts."""
    state = checkpoint.load(args.encoder, "stage_one", "--encoder")
    slices, _ = split.load_evaluation(args, state, "--encoder", ("input",))
    with distributed.running(args.device, args.precision) as accelerator:
        model = get_accuracy_image.load_model(args.encoder, state, accelerator.device)

        def of_slice(slice_: SliceData) -> dict[str, float]:
            rows = slice_.rows_of(args.part)
            encoded = get_accuracy_image.encode(model, slice_, rows, slice_.bins(), accelerator, args)
            random = retrieval.random_candidates(len(rows), AUC_OTHERS, args.seed)
            near = depth_candidates(slice_.total_counts[rows], AUC_OTHERS)
            galleries = {"matching_auc": (random.candidates, random.truth)}
            galleries["matching_auc_same_depth"] = (near, np.zeros(len(rows), int))
            scores = {
                k: get_accuracy_image.match_scores(model, encoded, c, accelerator) for k, (c, _) in galleries.items()
            }
            return {key: auc_of(scores[key], truth) for key, (_, truth) in galleries.items()}

        return {slice_.name: of_slice(slice_) for slice_ in slices}
