"""A shared model: the folder holds the checkpoint to the last bit, and scripts take it."""

import json
import math
from pathlib import Path

import anndata
import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_shares import KINDS, STAGES, exported, load
from tiny_runs import Work, stderr_line

from utils import settings
from utils.sharing import __main__ as sharing
from utils.sharing import export, model_card
from utils.training import checkpoint
from utils.training.shared_folder import CARD, CONFIG, FILES, WEIGHTS

SPLIT = {"P01_1": "train", "P01_2": "test"}


@pytest.fixture(scope="module")
def shared(trained, tmp_path_factory):
    return exported(trained, tmp_path_factory.mktemp("shared"))


@pytest.fixture
def own(trained, tmp_path):
    return exported(trained, tmp_path)


def same(one, other):
    """Equal in keys and value; tensors to the bit."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        return all(same(one[key], other[key]) for key in one)
    if isinstance(one, torch.Tensor):
        alike = one.dtype == other.dtype and one.shape == other.shape
        return alike and one.contiguous().numpy().tobytes() == other.contiguous().numpy().tobytes()
    return one == other


# ---- what is written is what is read


@pytest.mark.parametrize("kind", KINDS)
def test_the_round_trip_is_exact(trained, shared, kind):
    before = checkpoint.load(getattr(trained, STAGES[kind][0]), kind, "--weights")
    after = load(shared[kind], kind)
    for key in ("settings", "encoder_settings"):
        if key in before:  # paths of this machine are cut to names, all else is kept
            given, found = before.pop(key), after.pop(key)
            assert (
                found == export.publishable(given) and given.keys() == found.keys() and given["seed"] == found["seed"]
            )
            assert Path(given["data"]).is_absolute() and found["data"] == "data"
    assert same(before, after) and list(before["model"]) == list(after["model"])
    assert sorted(path.name for path in shared[kind].iterdir()) == sorted(FILES)


def test_all_kinds_of_tensors_come_back(tmp_path):
    """Half precisions, whole numbers, booleans, scalars, empty, transposed, shared, NaN and signed zeros."""
    twice = torch.arange(6.0).view(2, 3)
    model = {
        "a.b.weight": torch.tensor([math.nan, -0.0, math.inf]),
        "bf16": torch.randn(3).bfloat16(),
        "half": torch.randn(3).half(),
        "long": torch.tensor(2**62),
        "flags": torch.tensor([True, False]),
        "none": torch.zeros(0, 4),
        "transposed": twice.T,
        "twice": twice,
        "part": twice[0],
        "image_encoder.mean": torch.zeros(3, 1, 1),
        "image_encoder.std": torch.ones(3, 1, 1),
    }
    state = {"model": model, "sizes": {"image_encoder": "vit", "crop_scales": [1.0, 0.5]}, "genes": ["b", "a", "é"]}
    state |= {"tile_scale": [32, None], "table": [], "counts_hashes": {}, "settings": {}, "row": {"loss": 0.1 + 0.2}}
    checkpoint.save(tmp_path / "best.pth", "stage_one", **state)
    export.export(tmp_path / "best.pth", tmp_path / "shared")
    before, after = load(tmp_path / "best.pth", "stage_one"), load(tmp_path / "shared", "stage_one")
    views = [one["model"].pop("bf16").view(torch.int16) for one in (before, after)]  # NumPy has no bf16
    assert torch.equal(*views) and same(before, after)


def test_an_export_of_an_export_is_the_same(shared, tmp_path):
    export.export(shared["stage_two"], tmp_path / "again")
    for name in FILES:
        assert (tmp_path / "again" / name).read_bytes() == (shared["stage_two"] / name).read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_predicts_as_the_checkpoint_does(trained, shared, tmp_path, kind):
    flag, script = STAGES[kind]
    found = {}
    for name, path in (("file", getattr(trained, flag)), ("folder", shared[kind])):
        trained.run(script, f"--{flag}", path, "--out", tmp_path / name)
        found[name] = anndata.read_h5ad(tmp_path / name / "predictions.h5ad")
        metrics = [(tmp_path / one / "metrics.json").read_bytes() for one in found]
    assert len(set(metrics)) == 1
    assert found["file"].X.tobytes() == found["folder"].X.tobytes()
    for key in found["file"].obsm:
        assert np.array_equal(found["file"].obsm[key], found["folder"].obsm[key])


def test_stage_two_trains_on_a_shared_stage_one(trained, shared, tmp_path):
    own = Work(trained.data, trained.tiles, trained.panels, tmp_path)
    own.run("train_decoder", "--encoder", shared["stage_one"], "--Epoch", 1, "--Init_lr", 1e-3)
    ours, theirs = load(own.decoder, "stage_two"), load(trained.decoder, "stage_two")
    assert same(ours["model"], theirs["model"])
    assert ours["encoder_hash"] == checkpoint.model_hash(shared["stage_one"]) != theirs["encoder_hash"]


def test_the_hash_of_a_folder_is_of_weights_and_config(own):
    folder = own["stage_one"]
    before = checkpoint.model_hash(folder)
    (folder / CARD).write_text("edited")
    assert checkpoint.model_hash(folder) == before
    for name in (CONFIG, WEIGHTS):
        (folder / name).write_bytes((folder / name).read_bytes() + b" ")
        assert checkpoint.model_hash(folder) != before
        before = checkpoint.model_hash(folder)


# ---- what a reader is told


def test_the_config_says_what_is_needed_elsewhere(trained, shared):
    for kind, folder in shared.items():
        config = json.loads((folder / CONFIG).read_text())
        state = load(folder, kind)
        assert config["tile_scale"] == {"side_px": 32, "um_per_px": 3.5}
        assert config["normalisation"]["mean"] == state["model"]["image_encoder.mean"].flatten().tolist()
        assert config["genes"] == state["genes"] and config["metrics"] == state["row"]
        assert (
            config["versions"]["torch"] == torch.__version__.split("+")[0]
            and config["versions"]["magic"].count(".") == 2
        )
        table = getattr(trained, STAGES[kind][0]).parent / "slices.csv"
        assert config["training_table_sha256"] == checkpoint.model_hash(table)
        assert config["tensors"].keys() == load_file(folder / WEIGHTS).keys()
    assert config["target"] == "lognorm"


def test_no_path_of_the_machine_is_published(trained, shared):
    for folder in shared.values():
        for name in (CONFIG, CARD):
            text = (folder / name).read_text()
            assert str(trained.data.parent) not in text and str(Path.home()) + "/" not in text and '"/' not in text


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("/home/jane/data", "data"),
        ("/", ""),
        ("C:\\Users\\jane\\w.pth", "w.pth"),
        ("../../jane/w.pth", "w.pth"),
        ("~/w.pth", "w.pth"),
        ("data/Breast_cancer", "data/Breast_cancer"),
        ("hf_hub:owner/name", "hf_hub:owner/name"),
        ("C:foo", "C:foo"),
        (math.nan, None),
        ((1, [math.inf, 0.5]), [1, [None, 0.5]]),
        ({1: True}, {"1": True}),
    ],
)
def test_publishable_values(value, expected):
    assert export.publishable(value) == expected


def test_a_leak_stands_in_the_card():
    table = [
        {"slice": s, "patient": "P01", "part": part, "spot_pitch_um": None, "image": None} for s, part in SPLIT.items()
    ]
    lines = model_card._slices({"table": table, "settings": {"val_strip": True}})
    assert lines[0] == "- train: P01_1 (patient P01)" and "leak: P01 (test, train) in test" in lines[-1]


def test_the_card(shared):
    for kind, folder in shared.items():
        card = huggingface_hub.ModelCard.load(folder / CARD)
        assert card.data.library_name == "magic-st" and "spatial-transcriptomics" in card.data.tags
        assert card.data.license is None and "Whoever shares these weights states their licence" in card.text
        assert "- train: P01_1 (patient P01)" in card.text and "- val: P02_1 (patient P02)" in card.text
        assert "P03" not in card.text, "not trained on"
        assert "leak" not in card.text
        assert "32 x 32 px, 3.5 um per px, 112 um" in card.text
        state = load(folder, kind)
        for name, value in state["row"].items():
            assert (f"- {name}: {value:.4g}" in card.text) == name.startswith("val_")
        assert f"{len(state['genes'])} genes ({', '.join(state['genes'][:5])}, ..." in card.text
        assert "Not a medical device" in card.text and f"--{STAGES[kind][0]} FOLDER" in card.text
    assert "as log1p counts per 10,000; with up to 18 neighbours of each spot as context" in card.text
    below = int((state["val_pcc"] < 0.1).sum())
    assert f"- {below} of 20 genes are below 0.1" in card.text
    best = state["genes"][int(state["val_pcc"].argmax())]
    assert f"best: {best} {state['val_pcc'].max():.2f}" in card.text


# ---- the command


def command(*argv):
    sharing.main(sharing.parse_args([str(one) for one in argv]))


def exit_code(*argv):
    with pytest.raises(SystemExit) as stop:
        settings.run(sharing.main, sharing.parse_args([str(one) for one in argv]))
    return stop.value.code


def test_the_command_line(trained, shared, tmp_path, capsys):
    command(trained.encoder, tmp_path / "new")
    assert checkpoint.model_hash(tmp_path / "new") == checkpoint.model_hash(shared["stage_one"])
    assert "model.safetensors, README.md, config.json" in capsys.readouterr().out
    assert exit_code(trained.encoder, tmp_path / "new") == 2
    stderr_line(capsys, "DIR: expected a new or an empty folder")
    assert exit_code(tmp_path / "none.pth", tmp_path / "other") == 2
    stderr_line(capsys, "CHECKPOINT: expected the file .*none.pth, found none; train first")
    for wrong, expected in ((["a"], "required: DIR"), (["a", "b", "c"], "unrecognized arguments: c")):
        with pytest.raises(SystemExit):
            sharing.parse_args(wrong)
        stderr_line(capsys, expected)
