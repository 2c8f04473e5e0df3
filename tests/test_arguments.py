"""Flags: published defaults, checks of single values and between flags, one line for what is wrong."""

import argparse
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from spaceranger_folders import refused
from tiny_runs import FLAGS

import train_mymodel
from utils import arguments, settings

ROOT = Path(__file__).parents[1]
PUBLISHED = {
    "batch_size": 32,
    "Init_Epoch": 0,
    "Epoch": 100,
    "Init_lr": 1e-4,
    "momentum": 0.9,
    "weight_decay": 1e-2,
    "lr_decay_type": "cos",
    "precision": "auto",
    "resume": False,
}
STAGE_ONE = {
    "image_encoder": "deit_base_patch16_224.fb_in1k",
    "image_size": 224,
    "image_weights": "timm",
    "image_tokens": 50,
    "gene_depth": 6,
    "gene_width": 200,
    "gene_heads": 10,
    "gene_tokens": 64,
    "tune_block": 4,
    "width": 512,
    "fusion_blocks": 3,
    "queue_size": 4096,
    "alpha": 0.4,
    "expression_weight": 5.0,
    "out": Path("encoder_model"),
}
STAGE_TWO = {
    "encoder": Path("encoder_model/best_epoch_weights.pth"),
    "target": "residuals",
    "context": 18,
    "decoder_layers": 6,
    "decoder_width": 64,
    "out": Path("decoder_model"),
}
DEFAULTS = {
    "image_tilling": {"part": "all", "source": "auto", "tile_um": 112, "tile_px": 224, "crop_size": None},
    "make_decoder_data": {"part": "all", "n_top_genes": 300, "n_input_genes": 2000, "min_counts": 0},
    "train_mymodel": PUBLISHED | STAGE_ONE,
    "train_decoder": PUBLISHED | STAGE_TWO,
    "get_accuracy_image": {"part": "test", "neighbours": 8, "encoder": STAGE_TWO["encoder"]},
    "decoder_similarity": {"part": "test", "decoder": Path("decoder_model/best_epoch_weights.pth")},
}
SHARED = {
    "data": Path("data/Breast_cancer"),
    "tiles": Path("data/Breast_cancer_image_process"),
    "panels": None,
    "slices": None,
    "device": "auto",
    "seed": 0,
    "val_strip": False,
    "allow_leak": False,
    "debug": False,
}


@pytest.mark.parametrize("script", FLAGS)
def test_without_flags_the_published_values_stand(script):
    found = vars(importlib.import_module(script).parse_args([]))
    expected = SHARED | DEFAULTS[script]
    assert {name: found[name] for name in expected} == expected
    assert found["workers"] is None  # by machine and work


@pytest.mark.parametrize("script", FLAGS)
def test_every_flag_explains_itself_or_is_plain(script, capsys):
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(script).parse_args(["--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0 and f"python {script}.py" in shown, "a command to copy"
    assert set(re.findall(r"--\w+", (ROOT / f"{script}.py").read_text())) <= set(re.findall(r"--\w+", shown)) | {
        "--help"
    }


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (arguments.count, {"1": 1, "4096": 4096}, ["0", "-1", "1.5", "1e3", "", "x", "nan"]),
        (arguments.count_or_zero, {"0": 0, "7": 7}, ["-1", "0.5", "none"]),
        (arguments.positive, {"1e-4": 1e-4, "112": 112.0}, ["0", "-1", "nan", "inf", "x"]),
        (arguments.not_negative, {"0": 0.0, "1e-2": 0.01}, ["-1e-9", "nan", "inf"]),
        (arguments.fraction_above_zero, {"1": 1.0, "1e-3": 0.001}, ["0", "-0.1", "1.1", "nan"]),
        (arguments.fraction, {"0": 0.0, "1": 1.0, "0.4": 0.4}, ["-0.1", "1.1", "nan"]),
        (arguments.shard, {"1/4": (0, 4), "4/4": (3, 4)}, ["0/2", "3/2", "1", "a/b", "1/0", "-1/2", "", "1/2/3"]),
    ],
)
def test_values_of_flags(kind, good, bad):
    for text, value in good.items():
        assert kind(text) == value and type(kind(text)) is type(value)
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match=r"expected (a .*number|I/N).*, found"):
            kind(text)


@pytest.mark.parametrize(
    "flags", ["--batch_size 0", "--seed x", "--device gpu", "--momentum 2", "--Init_lr", "--alpha 2"]
)
def test_a_wrong_value_gives_one_line(flags, capsys):
    assert flags.split()[0] in parse_error(flags, capsys)


@pytest.mark.parametrize("flags", ["--batchsize 3", "--dat x", "extra", "--resume False"])
def test_a_flag_that_is_none_gives_one_line(flags, capsys):
    """No abbreviations; a switch takes no value."""
    assert "unrecognized arguments: " in parse_error(flags, capsys)


@pytest.mark.parametrize(
    ("flags", "meant"),
    [
        ("--batchsize 3", "--batch_size"),
        ("--epoch=3 --batch-size 2", "--Epoch --batch_size"),
        ("--datta x", "--data"),
        ("--zzzzzz", None),
        ("extra", None),
    ],
)
def test_a_misspelt_flag_is_answered_by_the_one_that_is_near(flags, meant, capsys):
    error = parse_error(flags, capsys)
    assert (f"; did you mean {meant}? (see" in error) if meant else ("did you mean" not in error)


def parse_error(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        train_mymodel.parse_args(flags.split())
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "--help" in error and "usage" not in error
    return error


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--Min_lr", "1"], "--Min_lr: expected at most --Init_lr 0.0001, found 1"),
        (["--Init_Epoch", "100"], "--Init_Epoch: expected less than --Epoch 100, found 100"),
        (["--batch_size", "1"], "--batch_size: expected at least 2 spots, found 1"),
        (["--resume", "--out", "nowhere"], "--resume: expected the file nowhere/last_epoch_weights.pth, found none"),
        (["--gene2vec", __file__], "--gene_weights and --gene2vec: expected --gene_vocab"),
        (["--gene_weights", __file__], "--gene_weights and --gene2vec: expected --gene_vocab"),
        (["--gene_vocab", "nowhere.txt"], "--gene_vocab: expected the file nowhere.txt"),
        (["--gene_weights", "nowhere.pth"], "--gene_weights: expected the file nowhere.pth"),
        (["--image_weights", "tim"], "--image_weights: expected the file tim, found none; or use timm or none"),
        (
            ["--gene_weights", __file__, "--gene_vocab", __file__, "--gene_depth", "4"],
            "--tune_block: expected less than --gene_depth 4, found 4",
        ),
    ],
)
def test_checks_between_flags(flags, words):
    refused(re.escape(words), train_mymodel.check, train_mymodel.parse_args(flags))


def test_the_lowest_rate_is_a_hundredth_unless_told():
    for flags, lowest in (([], 1e-6), (["--Init_lr", "0.5"], 0.005), (["--Min_lr", "0"], 0)):
        args = train_mymodel.parse_args(flags)
        assert args.Min_lr == pytest.approx(lowest)


def test_shards_take_every_item_once(capsys):
    items = list(range(11))
    for number in (1, 2, 4, 12):
        shards = [arguments.of_shard(items, (i, number), "slides") for i in range(number)]
        assert sorted(item for shard in shards for item in shard) == items
    assert capsys.readouterr().out == "shard 12 of 12: none of 11 slides belongs to it\n"


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ValueError("a.h5: broken\nin two lines"), 2, "a.h5: broken in two lines"),
        (FileNotFoundError(2, "No such file", "a.h5"), 2, "a.h5"),
        (KeyboardInterrupt(), 130, ""),
        (None, 0, ""),
    ],
)
def test_how_a_script_ends(error, code, words, capsys):
    def main(args):
        if error is not None:
            raise error

    with pytest.raises(SystemExit) as stop:
        settings.run(main, argparse.Namespace(debug=False))
    shown = capsys.readouterr().err
    assert stop.value.code == code and words in shown and shown.count("\n") == bool(words)


def test_what_is_a_bug_keeps_its_traceback_and_debug_shows_all():
    def main(args):
        raise KeyError("bug") if args.bug else ValueError("bad file")

    with pytest.raises(KeyError):
        settings.run(main, argparse.Namespace(debug=False, bug=True))
    with pytest.raises(ValueError, match="bad file"):
        settings.run(main, argparse.Namespace(debug=True, bug=False))


HEAVY = "torch timm scanpy accelerate torchvision sklearn matplotlib"
IMPORTED = """
import sys, importlib
script, flags = importlib.import_module(sys.argv[1]), sys.argv[2:]
try:
    importlib.import_module("utils.settings").run(script.main, script.parse_args(flags))
except SystemExit as stop:
    loaded = [name for name in "{heavy}".split() if name in sys.modules]
    print("loaded", *loaded, "code", stop.code)
"""


def loaded_by(*argv):
    """What a fresh process had imported when the script ended, and its exit code, as one line."""
    code = IMPORTED.format(heavy=HEAVY)
    run = subprocess.run([sys.executable, "-c", code, *argv], cwd=ROOT, capture_output=True, text=True, check=True)
    return run.stdout.splitlines()[-1]


@pytest.mark.parametrize("script", FLAGS)
def test_help_imports_nothing_heavy(script):
    assert loaded_by(script, "--help") == "loaded code 0"


def test_flags_and_files_are_checked_before_anything_heavy_is_imported(tmp_path):
    for script in ("make_decoder_data", "train_mymodel"):
        assert loaded_by(script, "--data", str(tmp_path / "nowhere")) == "loaded code 2"
    for script in ("train_decoder", "get_accuracy_image", "decoder_similarity"):
        assert loaded_by(script, "--data", str(tmp_path)) == "loaded code 2", "the checkpoint is missing"


def test_the_command_line_itself(tmp_path):
    argv = [sys.executable, "make_decoder_data.py", "--data", str(tmp_path / "nowhere")]
    run = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.startswith("make_decoder_data.py: ") and run.stderr.count("\n") == 1
