"""Wrong files of a shared model: each is refused in one line that says what is wrong and what to do."""

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_shares import KINDS, STAGES, exported, load
from spaceranger_folders import refused
from tiny_runs import LAST, Bomb, stderr_line

from utils.sharing import export
from utils.training import checkpoint
from utils.training.shared_folder import CONFIG, WEIGHTS


@pytest.fixture
def own(trained, tmp_path):
    return exported(trained, tmp_path)


def test_only_a_new_folder_is_written_to(trained, own):
    before = {path: path.read_bytes() for path in own["stage_two"].iterdir()}
    refused("expected a new or an empty folder, found", export.export, trained.decoder, own["stage_two"])
    assert {path: path.read_bytes() for path in own["stage_two"].iterdir()} == before


def test_a_checkpoint_to_resume_from_is_not_shared(trained, tmp_path):
    path = trained.decoder.with_name(LAST)
    refused("found those to resume from; give best_epoch_weights.pth", export.export, path, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def damage(folder, kind, how):
    """One thing wrong with a folder; returns what its line must say."""
    weights, config = folder / WEIGHTS, folder / CONFIG
    whole, tensors = weights.read_bytes(), load_file(weights)
    known = json.loads(config.read_text())
    first = "model.image_encoder.to_vector.weight"
    if how.startswith("corrupt"):
        weights.write_bytes(whole[: int(len(whole) * float(how.split()[1]))])
        return "model.safetensors: expected weights, found an? (corrupt|empty)"
    if how == "no weights":
        weights.unlink()
        return "found no model.safetensors; give a folder that --export wrote"
    if how == "no config":
        config.unlink()
        return "found no config.json; give"
    if how == "a tensor missing":
        save_file({name: one for name, one in tensors.items() if name != first}, weights)
        return r"expected float32 \[32, ..\] for model.image_encoder.*, found none"
    if how == "a tensor more":
        save_file(tensors | {"model.more": torch.ones(2)}, weights)
        return r"expected none for model.more, found float32 \[2\]"
    if how == "another shape":
        save_file(tensors | {first: torch.ones(3, 3)}, weights)
        return r"to_vector.weight, found float32 \[3, 3\]; fix: export or download the folder again"
    if how == "another type":
        save_file(tensors | {first: tensors[first].bfloat16()}, weights)
        return r"to_vector.weight, found bfloat16 \["
    if how == "another model":
        save_file(tensors | {first: tensors[first] + 1}, weights)
        return "expected the sha256 of config.json, found another; fix: export"
    if how == "code":
        weights.write_bytes(pickle.dumps(Bomb(folder / "ran")))
        return "model.safetensors: expected weights, found a corrupt or"
    if how == "broken JSON":
        config.write_text(config.read_text()[:-20])
        return "config.json: expected JSON, found .*; fix: export"
    if how == "no text":
        config.write_bytes(b"\xff\xfe\x00")
        return "config.json: expected JSON"
    if how == "a list":
        config.write_text("[1]")
        return "expected what --export wrote, found the config of something else"
    if how == "another library":
        config.write_text(json.dumps({"model_type": "vit", "format": 2, "kind": kind}))
        return "expected what --export wrote, found the config of something else"
    if how == "keys missing":
        config.write_text(json.dumps({k: v for k, v in known.items() if k not in ("genes", "settings")}))
        return r"config.json: expected genes \(list\), settings \(dict\), found none; fix: export"
    if how == "no scale":
        config.write_text(json.dumps(known | {"tile_scale": {}}))
        return "config.json: expected side_px of tile_scale, found none"
    if how == "sizes of another model":
        config.write_text(json.dumps(known | {"sizes": known["sizes"] | {"width": 16}}))
        return "weights that fit this version, found others"
    if how == "newer":
        config.write_text(json.dumps(known | {"format": checkpoint.FORMAT + 1}))
        return rf"expected format .*, found {checkpoint.FORMAT + 1}; update this Magic, a newer one made it"
    if how == "older":
        config.write_text(json.dumps(known | {"format": 1}))
        return rf"expected format .*, found 1; train it again with {checkpoint.SCRIPTS[kind]}"
    assert how == "the other stage"
    other = next(one for one in KINDS if one != kind)
    config.write_text(json.dumps(known | {"kind": other}))
    return f"expected a {kind} checkpoint of {checkpoint.SCRIPTS[kind]}, found {other}"


WRONG = [
    "corrupt 0",
    "corrupt 0.00001",
    "corrupt 0.3",
    "corrupt 0.99",
    "no weights",
    "no config",
    "a tensor missing",
    "code",
]
WRONG += ["a tensor more", "another shape", "another type", "another model", "broken JSON", "no text", "a list"]
WRONG += ["another library", "keys missing", "no scale", "sizes of another model", "newer", "older", "the other stage"]


@pytest.mark.parametrize("how", WRONG)
def test_a_wrong_folder_is_one_line(trained, own, capsys, tmp_path, how):
    kind = KINDS[WRONG.index(how) % 2]
    flag, script = STAGES[kind]
    expected = damage(own[kind], kind, how)
    capsys.readouterr()
    assert trained.exit_code(script, f"--{flag}", own[kind], "--out", tmp_path / "out") == 2
    stderr_line(capsys, f"--{flag}: ", expected)
    assert not (own[kind] / "ran").exists()


def test_a_folder_of_checkpoints_is_told_apart(trained, capsys):
    assert trained.exit_code("decoder_similarity", "--decoder", trained.decoder.parent) == 2
    stderr_line(capsys, "found no model.safetensors and no config.json", "a file such as best_epoch_weights.pth")


@pytest.mark.parametrize(
    ("number", "says"), [(1, "train it again with train_decoder.py"), (99, "update this Magic, a newer one made it")]
)
def test_files_of_other_formats_say_what_to_do(trained, tmp_path, number, says):
    state = torch.load(trained.decoder, weights_only=True)
    torch.save(state | {"format": number}, tmp_path / "other.pth")
    refused(f"expected format .*, found {number}; {says}", load, tmp_path / "other.pth", "stage_two")
    refused(f"expected format .*, found {number}; {says}", export.export, tmp_path / "other.pth", tmp_path / "new")


def test_either_stage_is_asked_for(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "w.pth")
    refused("expected a checkpoint of train_mymodel.py or train_decoder.py", load, tmp_path / "w.pth", None)
