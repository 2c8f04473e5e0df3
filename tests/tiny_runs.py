"""The six scripts on tiny slices: where a run reads and writes, its flags, and how a refusal looks."""

import importlib
import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from scipy.sparse import csc_matrix

from utils import settings
from utils.files import tensors
from utils.slices import splits, visium

FLAGS = {
    "image_tilling": "--tile_px 32",
    "make_decoder_data": "--n_input_genes 50 --n_top_genes 20",
    "train_mymodel": "--device cpu --precision fp32 --batch_size 16 --image_encoder test_vit --image_size 32 "
    "--image_weights none --gene_depth 1 --gene_width 16 --gene_heads 1 --gene_tokens 4 --width 32 --fusion_blocks 1 "
    "--components 4 --expression_weight 1",
    "train_decoder": "--device cpu --precision fp32 --batch_size 16 --decoder_layers 1 --decoder_width 16 "
    "--target lognorm",
    "get_accuracy_image": "--device cpu --precision fp32",
    "decoder_similarity": "--device cpu --precision fp32",
}
PREPROCESSING = ("image_tilling", "make_decoder_data")
TRAINING = ("train_mymodel", "train_decoder")
EVALUATION = ("get_accuracy_image", "decoder_similarity")
ONE_EPOCH = dict.fromkeys(TRAINING, ("--Epoch", 1))
BEST, LAST = "best_epoch_weights.pth", "last_epoch_weights.pth"
PREVIOUS = "previous_epoch_weights.pth"
STAGES = {"train_mymodel": "encoder_model", "train_decoder": "decoder_model"}


class Bomb:
    """Unpickling it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "ran")


@dataclass(frozen=True)
class Work:
    """Folders of one run. What a script writes goes below `out`, apart from tiles and panels."""

    data: Path
    tiles: Path
    panels: Path
    out: Path

    @property
    def encoder(self) -> Path:
        return self.out / "encoder_model" / BEST

    @property
    def decoder(self) -> Path:
        return self.out / "decoder_model" / BEST

    def argv(self, script: str, *flags) -> list[str]:
        """The flags of a script on these folders; `flags` come last, so that they win."""
        files = {
            "train_mymodel": ["--out", self.encoder.parent, "--logs", self.out / "logs"],
            "train_decoder": ["--encoder", self.encoder, "--out", self.decoder.parent, "--logs", self.out / "logs"],
            "get_accuracy_image": ["--encoder", self.encoder, "--out", self.out / "results" / "retrieval"],
            "decoder_similarity": ["--decoder", self.decoder, "--out", self.out / "results" / "similarity"],
        }.get(script, [])
        shared = ["--data", self.data, "--tiles", self.tiles, "--panels", self.panels, "--workers", 0]
        return [str(flag) for flag in (*shared, *FLAGS[script].split(), *files, *flags)]

    def run(self, script: str, *flags) -> None:
        module = importlib.import_module(script)
        module.main(module.parse_args(self.argv(script, *flags)))

    def exit_code(self, script: str, *flags) -> int:
        """As the command line runs it: files and flags checked, errors turned into one line."""
        module = importlib.import_module(script)
        with pytest.raises(SystemExit) as stop:
            settings.run(module.main, module.parse_args(self.argv(script, *flags)))
        return stop.value.code


def split_flag(work: Work, text: str) -> tuple[str, Path]:
    """Writes a table of slices, below its header, and gives the flag that names it."""
    path = work.out / "slices.csv"
    path.write_text("slice,patient,part\n" + text)
    return "--slices", path


def data_flags(work: Work, **changed) -> SimpleNamespace:
    """The flags that reading slices looks at."""
    same = {"data": work.data, "tiles": work.tiles, "panels": work.panels, "slices": None}
    return SimpleNamespace(
        **same | {"val_strip": False, "allow_leak": False, "batch_size": 16, "part": "test"} | changed
    )


def row(name: str, part: str = "train", patient: str | None = None) -> splits.SliceRow:
    """A line of slices.csv: the patient is the first three letters of the slice."""
    return splits.SliceRow(name, patient or name[:3], part, 100.0, None)


def stderr_line(capsys, *expected: str) -> str:
    """What stands on stderr: one line, no traceback, that holds every regular expression."""
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.endswith("\n"), error
    assert "Traceback" not in error
    for pattern in expected:
        assert re.search(pattern, error), f"{pattern!r} not in {error!r}"
    return error


def snapshot(*folders: Path) -> dict[Path, bytes | None]:
    """Every file and folder below, with what it holds."""
    found = [path for folder in folders for path in sorted(folder.rglob("*"))]
    return {path: path.read_bytes() if path.is_file() else None for path in found}


def rewrite_matrix(folder: Path, edit) -> None:
    """Change a slice's counts: `edit` takes and gives counts (S, G) as a dense array, barcodes, gene names."""
    path = folder / "filtered_feature_bc_matrix.h5"
    matrix = visium.read_matrix(path)
    counts, barcodes, names = edit(matrix.counts.toarray(), matrix.barcodes, matrix.genes)
    path.unlink()
    write_matrix(path, counts, barcodes, names)


def write_matrix(path: Path, counts: np.ndarray, barcodes, names, ids=None) -> None:
    """Counts (S, G) of any number type in the 10x v3 schema."""
    columns = csc_matrix(np.asarray(counts).T)
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix")
        group["data"], group["indices"], group["indptr"] = columns.data, columns.indices, columns.indptr
        group["shape"], group["barcodes"] = columns.shape, np.array(barcodes, "S")
        ids = [f"ID{i}" for i in range(len(names))] if ids is None else ids
        features = {"name": names, "id": ids, "feature_type": ["Gene Expression"] * len(names)}
        for key, values in features.items():
            group[f"features/{key}"] = np.array(values, "S")


def state(work, script, name):
    return tensors.read_tensors(work.out / STAGES[script] / name, "--test")


def different(one, other, path=""):
    """Where two nested states differ, bit for bit."""
    if isinstance(one, dict):
        if set(one) != set(other):
            return [f"{path}: {set(one) ^ set(other)}"]
        return [found for key in one for found in different(one[key], other[key], f"{path}/{key}")]
    if isinstance(one, list | tuple):
        pairs = enumerate(zip(one, other, strict=True))
        return [found for i, (a, b) in pairs for found in different(a, b, f"{path}/{i}")]
    same = torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    return [] if same else [path]


def progress(work, script):
    """What must not depend on an interruption: all but paths and seconds."""
    kept = {}
    for name in (BEST, LAST):
        found = state(work, script, name)
        kept[name] = {key: value for key, value in found.items() if key not in ("settings", "row")}
        kept[name]["row"] = {key: value for key, value in found["row"].items() if key != "seconds"}
    return kept
