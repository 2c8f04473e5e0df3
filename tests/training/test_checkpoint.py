"""Checkpoints: written whole, read without running anything, the best one kept, refused where they do not belong."""

import argparse
import pickle
from pathlib import Path

import pytest
import torch
from spaceranger_folders import refused
from tiny_runs import Bomb

from utils.files import atomic, tensors
from utils.training import checkpoint
from utils.training.checkpoint import CORRUPT, LAST, PREVIOUS

TABLE = [{"slice": "s", "part": "train"}, {"slice": "v", "part": "val"}, {"slice": "t", "part": "test"}]
ABOUT = {
    **{"sizes": {"width": 4}, "genes": ["a", "b"], "tile_scale": [32, 3.5], "counts_hashes": {"s": "h"}},
    **{"table": TABLE, "settings": {"val_strip": False}},
}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "encoder_model" / "best_epoch_weights.pth"


def test_round_trip(path):
    state = {"model": {"w": torch.arange(3.0)}, "genes": ["a"], "row": {"loss": 0.5, "n": 3, "none": None}}
    checkpoint.save(path, "stage_one", **state)
    found = checkpoint.load(path, "stage_one", "--encoder")
    assert torch.equal(found["model"].pop("w"), torch.arange(3.0))
    assert found == state | {"model": {}, "format": 6, "kind": "stage_one"}
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_settings_become_plain_values(path):
    settings = {"out": Path("a/b"), 3: (1, Path("c")), "deep": {"x": [Path("d"), None, True]}}
    plain = atomic.plain(settings)
    assert plain == {"out": "a/b", "3": [1, "c"], "deep": {"x": ["d", None, True]}}
    checkpoint.save(path, "stage_one", settings=plain)
    assert checkpoint.load(path, "stage_one", "--encoder")["settings"] == plain


def test_an_interrupted_save_leaves_the_old_file(path, monkeypatch):
    checkpoint.save(path, "stage_one", epoch=1)
    whole = path.read_bytes()

    def corrupt(state, file):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", corrupt)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(path, "stage_one", epoch=2)
    assert path.read_bytes() == whole


# ---- what is refused


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.3, 0.6, 0.9, 0.99])
def test_a_corrupt_file_is_refused(path, fraction):
    checkpoint.save(path, "stage_one", model={f"w{i}": torch.randn(40) for i in range(30)})
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * fraction)])
    line = refused(
        "--encoder: .*best_epoch_weights.pth: expected weights, found", checkpoint.load, path, "stage_one", "--encoder"
    )
    assert len(line) < 400


@pytest.mark.parametrize("fraction", [0.1, 0.4, 0.7, 0.8, 0.99])
def test_a_corrupt_file_of_the_old_format_is_refused(path, fraction):
    """Weights saved before torch 1.6 are not zip files; their download may have stopped anywhere."""
    path.parent.mkdir()
    weights = {f"w{i}": torch.randn(40) for i in range(30)}
    torch.save({"model": weights}, path, _use_new_zipfile_serialization=False)
    assert set(tensors.read_weights(path, "--image_weights")) == set(weights)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * fraction)])
    refused("--image_weights: .*expected weights, found", tensors.read_weights, path, "--image_weights")


@pytest.mark.parametrize("content", [b"hello", b"\x80\x04K\x01.", b"PK\x03\x04", b"\x00" * 100, b"(lp0\n."])
def test_a_file_that_is_no_checkpoint_is_refused(path, content):
    path.parent.mkdir()
    path.write_bytes(content)
    refused("--encoder: ", checkpoint.load, path, "stage_one", "--encoder")


def test_code_in_a_file_is_refused_and_never_run(path, tmp_path):
    marker = tmp_path / "ran"
    path.parent.mkdir()
    torch.save({"format": 2, "kind": "stage_one", "model": Bomb(marker)}, path)
    refused("expected tensors and plain values, found code", checkpoint.load, path, "stage_one", "--encoder")
    path.write_bytes(pickle.dumps({"kind": "stage_one", "model": Bomb(marker)}))
    refused("--encoder: ", checkpoint.load, path, "stage_one", "--encoder")
    assert not marker.exists()
    pickle.loads(path.read_bytes())  # had it been trusted
    assert marker.read_text() == "ran"


def test_a_missing_file_is_named(path):
    refused(
        "--encoder: expected the file .*best_epoch_weights.pth, found none", checkpoint.load, path, "x", "--encoder"
    )


def test_the_other_stage_is_refused(path):
    checkpoint.save(path, "stage_two", model={})
    line = refused(
        "expected a stage_one checkpoint of train_mymodel.py", checkpoint.load, path, "stage_one", "--encoder"
    )
    assert "found stage_two" in line
    refused(
        "checkpoint of train_decoder.py, found another file", checkpoint.load, foreign(path), "stage_two", "--decoder"
    )


def foreign(path):
    torch.save({"w": torch.ones(2)}, path)
    return path


@pytest.mark.parametrize("state", [torch.ones(2), [1, 2], {"state_dict": {}}])
def test_a_foreign_file_is_refused(path, state):
    path.parent.mkdir()
    torch.save(state, path)
    refused("found another file", checkpoint.load, path, "stage_one", "--encoder")


@pytest.mark.parametrize("number", [None, 1, 2, 3, 4, 5, "6", 7])
@pytest.mark.parametrize("kind", ["stage_one", "stage_two"])
def test_another_format_is_refused(path, kind, number):
    path.parent.mkdir()
    torch.save({"kind": kind} if number is None else {"format": number, "kind": kind}, path)
    remedy = "update this Magic" if number == 7 else f"train it again with {checkpoint.SCRIPTS[kind]}"
    refused(
        f"expected format 6, which this version reads, found {number}; .*{remedy}", checkpoint.load, path, kind, "--enc"
    )


def test_weights_of_another_model_are_refused(path):
    weights = torch.nn.Linear(3, 2).state_dict()
    checkpoint.fit(torch.nn.Linear(3, 2), weights, path, "--encoder")
    for other in (torch.nn.Linear(4, 2), torch.nn.Linear(3, 2, bias=False)):
        refused(
            "--encoder: .*expected weights that fit this version, found others",
            checkpoint.fit,
            other,
            weights,
            path,
            "--encoder",
        )


# ---- the last one and the one before it


def save_last(out, number, **changed):
    checkpoint.save_last(out, "stage_two", model={"w": torch.full((2,), float(number))}, step=number, **ABOUT | changed)


def test_the_newest_two_are_kept(tmp_path):
    for number in range(3):
        save_last(tmp_path, number)
    kept = {name: checkpoint.load(tmp_path / name, "stage_two", "--resume")["step"] for name in (LAST, PREVIOUS)}
    assert kept == {LAST: 2, PREVIOUS: 1} and len(list(tmp_path.iterdir())) == 2
    assert checkpoint.read_resumed(tmp_path, "stage_two", ABOUT)["step"] == 2


@pytest.mark.parametrize("damage", ["corrupt", "empty", "foreign", "missing"])
def test_a_useless_last_one_is_named_and_the_one_before_it_used(tmp_path, capsys, damage):
    for number in range(2):
        save_last(tmp_path, number)
    last = tmp_path / LAST
    content = {"corrupt": last.read_bytes()[:-200], "empty": b"", "foreign": b"something else"}.get(damage)
    last.unlink() if content is None else last.write_bytes(content)
    assert checkpoint.read_resumed(tmp_path, "stage_two", ABOUT)["step"] == 0
    told = capsys.readouterr().out
    assert LAST in told and "going on from the one before it" in told
    assert checkpoint.load(last, "stage_two", "--resume")["step"] == 0, "the good one stands in its place"
    assert (tmp_path / CORRUPT).exists() == (content is not None), "nothing is thrown away"
    save_last(tmp_path, 2)
    assert checkpoint.load(tmp_path / PREVIOUS, "stage_two", "--resume")["step"] == 0


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sizes", {"width": 5}),
        ("genes", ["b", "a"]),
        ("tile_scale", [32, 7.0]),
        ("counts_hashes", {"s": "other"}),
        ("target", "residuals"),
        ("encoder_hash", "other"),
        ("table", [TABLE[0] | {"part": "val"}, TABLE[1] | {"part": "train"}, TABLE[2]]),
        ("table", TABLE[:1]),
        ("settings", {"val_strip": True}),
    ],
)
def test_resume_refuses_a_run_on_other_things(tmp_path, key, value):
    about = ABOUT | {"target": "lognorm", "encoder_hash": "one"}
    for number in range(2):
        save_last(tmp_path, number, **about)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    said = "split" if key in ("table", "settings") else key
    refused(
        f"--resume: .*{LAST}: expected the {said} of this run, found others",
        checkpoint.read_resumed,
        tmp_path,
        "stage_two",
        about | {key: value},
    )
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_test_slices_may_be_others_at_resume(tmp_path):
    save_last(tmp_path, 0)
    about = ABOUT | {"table": [*TABLE[:2], {"slice": "another", "part": "test"}]}
    assert checkpoint.read_resumed(tmp_path, "stage_two", about)["step"] == 0


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("unexpected pos 64 vs 0")])
def test_a_full_disk_leaves_the_last_good_file(tmp_path, monkeypatch, error):
    save_last(tmp_path, 0)

    def full(state, file):
        file.write(b"half")
        raise error

    monkeypatch.setattr(torch, "save", full)
    refused(f"{LAST}: expected room for a checkpoint", save_last, tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == [LAST]
    assert checkpoint.read_resumed(tmp_path, "stage_two", ABOUT)["step"] == 0


# ---- weights of others


@pytest.mark.parametrize("key", [None, "model", "state_dict", "teacher", "model_state_dict"])
def test_foreign_weights_are_found(tmp_path, key):
    weights = {"module.a": torch.ones(2), "b.module.c": torch.zeros(1)}
    torch.save(weights if key is None else {key: weights, "epoch": 3}, tmp_path / "w.pth")
    found = tensors.read_weights(tmp_path / "w.pth", "--image_weights")
    assert set(found) == {"a", "b.module.c"} and torch.equal(found["a"], torch.ones(2))


def test_flags_beside_the_tensors_are_read(tmp_path):
    """The checkpoints of timm, DINO and MAE hold the flags of their run."""
    content = {"model": {"a": torch.ones(2)}, "args": argparse.Namespace(lr=0.1, inner=argparse.Namespace(x="y"))}
    torch.save(content, tmp_path / "w.pth")
    found = tensors.read_tensors(tmp_path / "w.pth", "--x")
    assert torch.equal(found["model"]["a"], torch.ones(2)) and found["args"] == content["args"]


def test_safetensors(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.ones(2)}, tmp_path / "w.safetensors")
    assert torch.equal(tensors.read_weights(tmp_path / "w.safetensors", "--x")["a"], torch.ones(2))
    for content in (b"", b"corrupt" * 10, (tmp_path / "w.safetensors").read_bytes()[:-4]):
        (tmp_path / "corrupt.safetensors").write_bytes(content)
        refused(
            "--x: .*corrupt.safetensors: expected weights, found an? (corrupt|empty)",
            tensors.read_weights,
            tmp_path / "corrupt.safetensors",
            "--x",
        )


@pytest.mark.parametrize("state", [{}, {"epoch": 3}, [1], torch.ones(2)])
def test_files_without_named_tensors_are_refused(tmp_path, state):
    torch.save(state, tmp_path / "w.pth")
    refused("--image_weights: expected named tensors", tensors.read_weights, tmp_path / "w.pth", "--image_weights")


def test_the_hash_of_a_file(tmp_path):
    import hashlib

    (tmp_path / "a").write_bytes(b"weights")
    assert checkpoint.model_hash(tmp_path / "a") == hashlib.sha256(b"weights").hexdigest()
