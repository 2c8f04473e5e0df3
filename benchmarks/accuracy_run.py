"""One run of accuracy.py, a fold with a seed: the six scripts as a user calls them, then every method, into one JSON.

A run is repeated only where its key differs: a hash of RULES, of the flags of the scripts, and of the data (counts,
images, positions, scale factors, lines of the table, the encoder's weights). An interrupted run begins anew.

The JSON of a run holds: fold, seed, ablation, rules, key, flags by script, date, machine, seconds by step,
`methods` (figures of each method, means over slices), `retrieval`, `losses` of stage one, `sd_ratio` (predicted over
measured deviation of a gene), and `draws`: PCC per gene against residuals in 2,000 resamples, in whole units of 1e-5,
of the methods that are compared by an interval. The resamples are the same for all methods and seeds of a fold, so a
difference of two methods is the difference of their draws.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks import accuracy_folds as folds
from benchmarks.accuracy_folds import RULES, Fold
from benchmarks.record import machine_name
from utils import settings as shared_settings
from utils.files.atomic import write_whole
from utils.files.hashing import content_hash
from utils.settings import StageOneSettings
from utils.slices import splits, visium

ROOT = Path(__file__).resolve().parents[1]
BEST = "best_epoch_weights.pth"
PRETRAINED = "_pretrained"  # stage two on the encoder as it was before stage one


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The flags of accuracy.py; paths are absolute, as the scripts run in the repository's root."""

    data: Path | None
    out: Path
    runs: Path
    protocol: str
    seeds: list[int] | None
    only: list[str] | None
    small: bool
    ablations: bool
    shuffled: bool
    table: bool
    keep: bool
    encoder: str
    encoder_weights: str | None
    tile_px: int
    device: str
    workers: int | None
    debug: bool

    def run_name(self, fold: str, seed: int, ablation: str = "default") -> str:
        """Name of a run's folder and file; a default run of full length is called FOLD_seedN alone."""
        marks = {
            self.encoder.replace("/", "_"): self.encoder != folds.DEFAULT_ENCODER,
            f"{self.tile_px}px": self.tile_px != folds.DEFAULT_PX,
            "small": self.small,
            "shuffled": self.shuffled,
            ablation: ablation != "default",
        }
        return f"{fold}_seed{seed}" + "".join(f"_{mark}" for mark, applies in marks.items() if applies)


@dataclass(frozen=True)
class Step:
    """A call of a script."""

    name: str  # the script's, and PRETRAINED where it is called a second time
    argv: tuple[str, ...]

    @property
    def script(self) -> str:
        return self.name.removesuffix(PRETRAINED)

    def run(self, log: Path) -> float:
        """Seconds that the script took; its output goes to `log`. Raises ValueError where it fails."""
        start = time.perf_counter()
        with log.open("w") as file:
            command = [sys.executable, f"{self.script}.py", *self.argv]
            code = subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT).returncode
        if code:
            last = " / ".join(line.strip() for line in log.read_text().splitlines()[-3:])
            raise ValueError(f"{self.script}.py ended with code {code}: {last} (whole output: {log})")
        return round(time.perf_counter() - start, 1)


def digest(*content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


@cache
def slice_key(folder: Path, name: str, image: str | None) -> str:
    """Hash of a slice's counts, of its image, and of all files in its spatial/."""
    source = visium.read_slice(folder, name)
    counts = visium.counts_hash(source.counts, source.spots.index.to_numpy(str), source.genes)
    files = sorted(path for path in (source.root / "spatial").iterdir() if path.is_file())
    return digest(counts, [content_hash(path) for path in (*files, source.fullres_image(image)) if path is not None])


@dataclass(frozen=True)
class Run:
    """A fold, a seed and an ablation; `weights` are those of the image encoder before stage one."""

    fold: Fold
    seed: int
    settings: Settings
    weights: str
    ablation: str = "default"

    @property
    def name(self) -> str:
        return self.settings.run_name(self.fold.name, self.seed, self.ablation)

    @property
    def folder(self) -> Path:
        return self.settings.out / self.name

    @property
    def file(self) -> Path:
        return self.settings.runs / f"{self.name}.json"

    def encoder(self, kind: str = "") -> Path:
        return self.folder / f"encoder_model{kind}" / BEST

    def similarity(self, kind: str = "") -> Path:
        return self.folder / f"similarity{kind}"

    def own_flags(self, script: str) -> list[str]:
        """Flags of a script that set what it computes, as opposed to where it reads and writes."""
        size, encoder = str(self.settings.tile_px), self.settings.encoder
        flags = {
            "image_tilling": ["--tile_px", size],
            "train_mymodel": ["--image_encoder", encoder, "--image_size", size],
        }
        seed = [] if script in ("image_tilling", "make_decoder_data") else ["--seed", str(self.seed)]
        return [*flags.get(script, []), *seed, *folds.script_flags(script, self.ablation, self.settings.small)]

    def step(self, name: str, **files: Any) -> Step:
        """A call of a script; `files` are those that only this call reads or writes."""
        script = name.removesuffix(PRETRAINED)
        tiles = "tiles_" + self.ablation if "image_tilling" in folds.ABLATIONS[self.ablation] else "tiles"
        places = {"data": self.settings.data, "tiles": self.settings.out / tiles, "panels": self.folder / "panels"}
        places |= {"slices": self.folder / "slices.csv", **files}
        machine = {"device": self.settings.device, "workers": self.settings.workers}
        words = [str(word) for flag, x in (places | machine).items() if x is not None for word in (f"--{flag}", x)]
        return Step(name, (*words, *self.fold.flags, *self.own_flags(script)))

    @property
    def steps(self) -> list[Step]:
        folder, kinds = self.folder, ("", PRETRAINED) if self.ablation == "default" else ("",)
        training = {"image_weights": self.weights, "out": self.encoder().parent, "logs": folder / "logs"}
        steps = [self.step("image_tilling"), self.step("make_decoder_data"), self.step("train_mymodel", **training)]
        steps.append(self.step("get_accuracy_image", encoder=self.encoder(), out=folder / "retrieval"))
        for kind in kinds:
            out, logs = folder / f"decoder_model{kind}", folder / f"logs{kind}"
            steps.append(self.step(f"train_decoder{kind}", encoder=self.encoder(kind), out=out, logs=logs))
            steps.append(self.step(f"decoder_similarity{kind}", decoder=out / BEST, out=self.similarity(kind)))
        return steps

    def stage_one_settings(self) -> StageOneSettings:
        """Settings of train_mymodel.py, whose data, encoder and optimiser the other methods share."""
        import train_mymodel

        parsed = train_mymodel.parse_args(list(next(step.argv for step in self.steps if step.name == "train_mymodel")))
        shared_settings.check_training(parsed)
        return parsed

    def flags(self) -> dict[str, str]:
        """Flags of each script that change the result; a changed default of a script calls for other RULES."""
        return {step.name: " ".join(self.own_flags(step.script)) for step in self.steps}

    @property
    def key(self) -> str:
        assert self.settings.data is not None
        rows = self.fold.rows
        contents = [slice_key(splits.slice_folder(self.settings.data, r), r.slice, r.image) for r in rows]
        weights = self.weights if self.weights in ("timm", "none") else content_hash(Path(self.weights))
        data = ([asdict(row) for row in rows], contents, self.fold.flags, weights)
        return digest(RULES, data, self.settings.shuffled, self.flags())

    def finished(self) -> dict[str, Any] | None:
        """The record of a finished run of this key, None where there is none."""
        if not self.file.exists():
            return None
        record = json.loads(self.file.read_text())
        return record if record["key"] == self.key else None

    def do(self) -> dict[str, Any]:
        """All steps and methods; the JSON is written last."""
        from benchmarks import accuracy_methods, accuracy_scores

        shutil.rmtree(self.folder, ignore_errors=True)
        self.fold.write(self.folder / "slices.csv")
        seconds = {}
        for step in self.steps:
            if step.name == f"train_decoder{PRETRAINED}":
                accuracy_methods.write_pretrained(self.encoder(), self.encoder(PRETRAINED), self.stage_one_settings())
            seconds[step.name] = step.run(self.folder / f"{step.name}.log")
            if step.name == "make_decoder_data" and self.settings.shuffled:
                folds.shuffle_panels(self.folder / "panels", [row.slice for row in self.fold.rows])
        start = time.perf_counter()
        figures = accuracy_scores.evaluate(self)
        seconds["methods"] = round(time.perf_counter() - start, 1)
        record = {
            "fold": self.fold.name,
            "seed": self.seed,
            "ablation": self.ablation,
            "rules": RULES,
            "key": self.key,
            "flags": self.flags(),
            "date": date.today().isoformat(),
            "machine": machine_name(self.settings.device),
            "seconds": seconds,
            **figures,
        }
        write_run(self.file, record)
        return record


def write_run(path: Path, record: dict[str, Any]) -> None:
    """JSON with a line per key, so that thousands of draws are not thousands of lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"{json.dumps(name)}: {json.dumps(value, allow_nan=False)}" for name, value in record.items()]
    write_whole(path, ("{\n" + ",\n".join(lines) + "\n}\n").encode())


def finish(run: Run) -> dict[str, Any]:
    """The record of a run: read where its file has the same key, else made."""
    record = run.finished()
    if record is not None:
        print(f"{run.name}: there already", flush=True)
        return record
    if run.file.exists():
        print(f"{run.name}: {run.file} was made with other data or settings: run again", flush=True)
    record = run.do()
    score, seconds = record["methods"]["magic"]["residuals"], sum(record["seconds"].values())
    print(f"{run.name}: magic {score}, {seconds:.0f} s", flush=True)
    return record
