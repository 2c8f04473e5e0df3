"""One run of accuracy.py, a fold with a seed: the six scripts as a user calls them, then every row, into one JSON.

A step is repeated only where its key has changed. The key of a step is a hash of RULES, of the flags of its script that
differ from their defaults, and of the keys of the steps that it reads from; those of the first are hashes of what the
data hold: counts, images, positions, scale factors, lines of the table, and the encoder's weights.

The JSON of a run holds: fold, seed, ablation, key, settings (flags by script), date, machine, seconds by step, `rows`
(figures of each row, means over slices), `retrieval`, `diagnostics`, and `draws`: of magic, the baselines and
stage_two_pretrained the PCC per gene against residuals in 2,000 resamples, in whole units of 1e-5. The resamples are
the same for all rows and seeds of a fold, so a difference of two rows is the difference of their draws.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks import accuracy_folds as folds
from benchmarks.accuracy_folds import Fold
from benchmarks.speed import machine_name
from utils import settings
from utils.files.atomic import write_record, write_whole
from utils.files.hashing import content_hash
from utils.slices import splits, visium

ROOT = Path(__file__).resolve().parents[1]
RULES = 6  # raised whenever a step, row or figure comes to be computed otherwise: older ones are then repeated
BEST = "best_epoch_weights.pth"
PRETRAINED = "_pretrained"  # stage two on the encoder as stage one found it


def digest(*what: Any) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Step:
    """A call of a script; `folder` keeps NAME.log and, once it is done, NAME.json."""

    name: str  # the script's, and what sets it apart from another call of it
    argv: tuple[str, ...]
    folder: Path
    after: tuple[str, ...]  # keys of what it reads

    @property
    def script(self) -> str:
        return self.name.removesuffix(PRETRAINED)

    def parsed(self) -> Any:
        return importlib.import_module(self.script).parse_args(list(self.argv))

    @property
    def settings(self) -> dict[str, Any]:
        """Flags that are not at their defaults, and say what is computed: a default that is changed raises RULES."""
        module, parsed = importlib.import_module(self.script), vars(self.parsed())
        default = vars(module.parse_args([]))
        return {name: value for name, value in parsed.items() if name not in settings.WHERE and value != default[name]}

    @property
    def key(self) -> str:
        return digest(RULES, self.name, self.settings, self.after)

    def run(self) -> float:
        """Seconds that the script took, now or when it was last run with this key. Raises ValueError where it fails."""
        note, log = self.folder / f"{self.name}.json", self.folder / f"{self.name}.log"
        if note.exists() and (done := json.loads(note.read_text()))["key"] == self.key:
            return done["seconds"]
        note.unlink(missing_ok=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, f"{self.script}.py", *self.argv]
        start = time.perf_counter()
        with log.open("w") as file:
            code = subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT).returncode
        if code:
            last = " / ".join(line.strip() for line in log.read_text().splitlines()[-3:])
            raise ValueError(f"{self.script}.py ended with code {code}: {last} (all it said: {log})")
        seconds = round(time.perf_counter() - start, 1)
        write_record(note, {"key": self.key, "seconds": seconds, "command": command})
        return seconds


@cache
def content_of(folder: Path, name: str, image: str | None) -> str:
    """Hash of a slice's counts, of its image, and of all that lies in its spatial/."""
    source = visium.read_slice(folder, name)
    counts = visium.counts_hash(source.counts, source.spots.index.to_numpy(str), source.genes)
    files = sorted(path for path in (source.root / "spatial").iterdir() if path.is_file())
    fullres = source.fullres_image(image)
    return digest(counts, [content_hash(path) for path in (*files, fullres) if path is not None])


@cache
def weights_key(weights: str) -> str:
    """timm, none, or a hash of what the tensors of a file hold (the file's own bytes vary with torch's version)."""
    if weights in ("timm", "none"):
        return weights
    from utils.training.checkpoint import read_weights

    found = hashlib.sha256()
    for name, tensor in sorted(read_weights(Path(weights), "--encoder_weights").items()):
        found.update(name.encode() + tensor.contiguous().float().numpy().tobytes())
    return found.hexdigest()[:16]


class Run:
    """A fold, a seed and an ablation, and where all of it lies; `args` are those of accuracy.py, their paths absolute.

    `home` is the folder of stage one, which an ablation of stage two shares with the default run. `prepare` are the
    steps before the shuffling of --shuffled, `steps` those behind it.
    """

    def __init__(self, fold: Fold, seed: int, args: Any, ablation: str = "default"):
        self.fold, self.seed, self.args, self.ablation = fold, seed, args, ablation
        self.name = f"{fold.name}_seed{seed}{folds.suffix(args, ablation)}"
        changed = set(folds.ABLATIONS[ablation])
        self.fold_folder = args.out / "shuffled" / fold.name if args.shuffled else args.out / fold.name
        self.folder, default = (
            self.fold_folder / f"seed_{seed}{folds.suffix(args, name)}" for name in (ablation, "default")
        )
        self.home = default if changed <= {"train_decoder"} else self.folder
        self.tiles = args.out / (f"tiles_{ablation}" if "image_tilling" in changed else "tiles")
        self.chosen_panels, self.panels = args.out / fold.name / "panels", self.fold_folder / "panels"
        self.slices = args.out / fold.name / "slices.csv"
        self.encoder = self.home / "encoder_model" / BEST
        self.pretrained_encoder = self.folder / f"encoder_model{PRETRAINED}" / BEST
        contents = [content_of(splits.slice_folder(args.data, r), r.slice, r.image) for r in fold.rows]
        self.slices_key = digest([(r.slice, r.spot_pitch_um) for r in fold.rows], contents)
        rows = [asdict(r) for r in fold.rows]
        self.data_key = digest(rows, contents, fold.flags, args.shuffled, weights_key(args.encoder_weights))
        self.prepare, self.steps = self.plan()

    def step(self, name: str, folder: Path, after: Sequence[Step], **files: Any) -> Step:
        """Flags: where the data lie, what the settings say, and the `files` of this call."""
        script = name.removesuffix(PRETRAINED)
        flags = {"data": self.args.data, "tiles": self.tiles, "device": self.args.device, "workers": self.args.workers}
        if script == "image_tilling":  # every slice of the data, for all folds; only what is missing is cut
            keys, own = (self.slices_key,), ()
        else:
            chosen = script == "make_decoder_data"
            flags |= {"panels": self.chosen_panels if chosen else self.panels, "slices": self.slices}
            flags |= {} if chosen else {"seed": self.seed}
            keys, own = (self.data_key, *(before.key for before in after)), self.fold.flags
        said = [str(x) for flag, value in (flags | files).items() if value is not None for x in (f"--{flag}", value)]
        settings = folds.script_flags(script, self.ablation, self.args)
        return Step(name, (*said, *own, *settings), folder, keys)

    def plan(self) -> tuple[list[Step], list[Step]]:
        tiles = self.step("image_tilling", self.tiles, [])
        panels = self.step("make_decoder_data", self.fold_folder, [])
        weights, encoder = self.args.encoder_weights, {"encoder": self.encoder}
        first = self.step(
            "train_mymodel",
            self.home,
            [tiles, panels],
            image_weights=weights,
            out=self.encoder.parent,
            logs=self.home / "logs",
        )
        steps = [first, self.step("get_accuracy_image", self.home, [first], **encoder, out=self.home / "retrieval")]
        for kind in ("", PRETRAINED) if self.ablation == "default" else ("",):
            files = {"encoder": self.pretrained_encoder} if kind else encoder
            out, logs = self.folder / f"decoder_model{kind}", self.folder / f"logs{kind}"
            second = self.step(f"train_decoder{kind}", self.folder, [first], **files, out=out, logs=logs)
            files = {"decoder": out / BEST, "out": self.similarity(kind)}
            steps += [second, self.step(f"decoder_similarity{kind}", self.folder, [second], **files)]
        return [tiles, panels], steps

    def similarity(self, kind: str = "") -> Path:
        return self.folder / f"similarity{kind}"

    def parsed(self, script: str) -> Any:
        return next(step for step in self.steps if step.name == script).parsed()

    @property
    def settings(self) -> dict[str, Any]:
        return {step.name: step.settings for step in (*self.prepare, *self.steps)}

    @property
    def key(self) -> str:
        return digest(RULES, self.data_key, self.settings)

    def file(self) -> Path:
        return self.args.runs / f"{self.name}.json"

    def found(self) -> dict[str, Any] | None:
        """The finished run of this key, None where there is none."""
        if not self.file().exists():
            return None
        record = json.loads(self.file().read_text())
        return record if record["key"] == self.key else None

    def do(self) -> dict[str, Any]:
        """All steps and rows; the JSON is written last."""
        from benchmarks import accuracy_rows, accuracy_scores

        self.fold.write(self.slices)
        seconds = {step.name: step.run() for step in self.prepare}
        if self.args.shuffled:
            folds.shuffle_panels(self.chosen_panels, self.panels, [row.slice for row in self.fold.rows])
        for step in self.steps:
            if step.name == f"train_decoder{PRETRAINED}":
                accuracy_rows.write_pretrained(self.encoder, self.pretrained_encoder, self.parsed("train_mymodel"))
            seconds[step.name] = step.run()
        start = time.perf_counter()
        found = accuracy_scores.evaluate(self)
        seconds["rows"] = round(time.perf_counter() - start, 1)
        record = {
            "fold": self.fold.name,
            "seed": self.seed,
            "ablation": self.ablation,
            "key": self.key,
            "settings": self.settings,
            "date": date.today().isoformat(),
            "machine": machine_name(self.args.device),
            "seconds": seconds,
            **found,
        }
        write_run(self.file(), record)
        return record


def write_run(path: Path, record: dict[str, Any]) -> None:
    """JSON with a line per key, so that thousands of draws are not thousands of lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"{json.dumps(name)}: {json.dumps(value, allow_nan=False)}" for name, value in record.items()]
    write_whole(path, ("{\n" + ",\n".join(lines) + "\n}\n").encode())


def done(run: Run) -> dict[str, Any]:
    """The record of a run: read where its file has the same key, else made."""
    found = run.found()
    if found is not None:
        print(f"{run.name}: there already", flush=True)
        return found
    if run.file().exists():
        print(f"{run.name}: {run.file()} was made with other data or settings: run again", flush=True)
    record = run.do()
    print(
        f"{run.name}: magic {record['rows']['magic']['residuals']}, {sum(record['seconds'].values()):.0f} s", flush=True
    )
    return record
