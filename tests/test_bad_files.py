"""Bad panels, tiles, checkpoints and flags: one line that names what is wrong, exit code 2, nothing on disk changed."""

import json
import shutil

import numpy as np
import pytest
import torch
from tiny_runs import BEST, EVALUATION, LAST, PREVIOUS, TRAINING, split_flag

from utils.files.atomic import write_record
from utils.genes import panels as gene_panels
from utils.images import tiles

# ---- panels and tiles


def test_a_list_with_unknown_genes(damaged, refused):
    listed = damaged.out / "list.txt"
    known = gene_panels.read_panel(gene_panels.panel_path(damaged.data, damaged.panels, "P01_1", "target")).genes
    listed.write_text("\n".join([*known, "NOSUCH"]))
    for flag in ("--target_genes", "--input_genes"):
        refused(
            "make_decoder_data",
            [flag, listed],
            r"list.txt: expected genes of the train slices, found 1 of 21 in none \(NOSUCH",
        )
    refused("make_decoder_data", ["--target_genes", damaged.out / "none.txt"], "none.txt: expected a text file")


@pytest.mark.parametrize("script", [*TRAINING, *EVALUATION])
def test_panels_that_are_missing_or_torn(damaged, refused, script):
    role = "target" if script in ("train_decoder", "decoder_similarity") else "input"
    path = gene_panels.panel_path(damaged.data, damaged.panels, "P01_1", role)
    path.write_bytes(path.read_bytes()[:2000])
    refused(script, [], f"P01_1/{path.name}: expected a file of make_decoder_data.py")
    path.unlink()
    refused(
        script,
        [],
        f"P01_1/{path.name}: expected a panel file, found none; run make_decoder_data.py, or .* --panels",
    )


@pytest.mark.parametrize("script", [*TRAINING, *EVALUATION])
def test_tiles_that_are_missing(damaged, refused, script):
    folder = damaged.tiles / "P01_1"
    pack, record = tiles.TilePack(folder), tiles.read_record(folder)
    rows = np.arange(3, 70)
    tiles.write_pack(folder, pack.barcodes[rows], np.zeros((67, 2)), [pack.read(rows)], pack.size)
    write_record(folder / "tiles.json", record | {"number": 67})
    refused(script, [], "tiles/P01_1: expected a tile for each of 70 spots, found none for 3", "image_tilling.py")
    shutil.rmtree(folder)
    refused(
        script,
        [],
        "tiles/P01_1: expected tiles.json and tiles.h5, found none; run image_tilling.py, or .* --tiles",
    )


@pytest.mark.parametrize("script", TRAINING)
def test_a_batch_larger_than_the_train_set(damaged, refused, script):
    refused(script, ["--batch_size", 71], "--batch_size: expected at most the 70 train spots, found 71")


def test_a_panel_chosen_on_a_held_out_slice(damaged, refused):
    parts = split_flag(damaged, "P03_1,C,train\nP02_1,B,val\nP01_1,A,test\n")
    for script in TRAINING:
        refused(
            script,
            parts,
            r"P03_1/.*h5ad: expected genes chosen on the train part \(P03_1\), found some chosen on P01_1",
        )


# ---- checkpoints


@pytest.mark.parametrize(("script", "role"), [("get_accuracy_image", "input"), ("decoder_similarity", "target")])
def test_a_checkpoint_of_another_gene_panel(damaged, refused, script, role):
    damaged.run("make_decoder_data", "--n_top_genes", 19, "--n_input_genes", 40)
    n, shared = {"input": (50, 40), "target": (20, 19)}[role]
    words = f"P01_1.*: expected the {n} {role} genes of --.*, found {shared} genes, {shared} of them among those; make"
    refused(script, [], words, f"--{role}_genes, or use the panels it was trained on")


@pytest.mark.parametrize("script", ["train_decoder", *EVALUATION])
def test_a_torn_missing_or_foreign_checkpoint(damaged, refused, script):
    flag, path = ("--decoder", damaged.decoder) if script == "decoder_similarity" else ("--encoder", damaged.encoder)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused(script, [], f"{flag}: .*{path.parent.name}/{BEST}: expected weights, found")
    path.unlink()
    refused(script, [], f"{flag}: expected the file .*{path.parent.name}/{BEST}, found none; run train_")
    torch.save({"weights": torch.ones(2)}, path)
    refused(script, [], f"{flag}: expected a stage_... checkpoint of train_.*, found another file")


def test_the_checkpoint_of_the_other_stage(damaged, refused):
    for script in ("train_decoder", "get_accuracy_image"):
        refused(
            script,
            ["--encoder", damaged.decoder],
            "expected a stage_one checkpoint of train_mymodel.py, found stage_two",
        )
    refused("decoder_similarity", ["--decoder", damaged.encoder], "expected a stage_two checkpoint of train_decoder.py")


@pytest.mark.parametrize("script", TRAINING)
def test_resume_from_what_does_not_fit(damaged, refused, script):
    folder = (damaged.encoder if script == "train_mymodel" else damaged.decoder).parent
    size = {"train_mymodel": ["--width", 48], "train_decoder": ["--decoder_width", 32]}[script]
    refused(
        script, ["--resume", *size], f"--resume: .*{folder.name}/{LAST}: expected the sizes of this run, found others"
    )
    if script == "train_decoder":
        refused(script, ["--resume", "--target", "counts"], "expected the target of this run, found others")
    for name in (LAST, PREVIOUS):
        (folder / name).write_bytes((folder / name).read_bytes()[:5000])
    refused(script, ["--resume"], f"--resume: .*{LAST}: expected weights, found")
    for name in (LAST, PREVIOUS):
        (folder / name).unlink()
    refused(script, ["--resume"], f"--resume: expected the file .*{LAST}, found none; run without --resume first")


# ---- weights and names


def test_gene_weights_without_their_genes(damaged, refused):
    weights = damaged.encoder
    for flag in ("--gene_weights", "--gene2vec"):
        refused("train_mymodel", [flag, weights], "--gene_weights and --gene2vec: expected --gene_vocab")
    refused(
        "train_mymodel", ["--gene_weights", damaged.out / "none.pth"], "--gene_weights: expected the file .*none.pth"
    )


def test_foreign_gene_weights(damaged, refused):
    """Nothing in the file fits: the run stops, it does not train from random weights in silence."""
    vocabulary, weights = damaged.out / "genes.txt", damaged.out / "weights.pth"
    vocabulary.write_text(
        "\n".join(gene_panels.read_panel(gene_panels.panel_path(damaged.data, damaged.panels, "P01_1", "input")).genes)
    )
    torch.save({"model_state_dict": {"other.weight": torch.ones(3)}}, weights)
    flags = ["--gene_weights", weights, "--gene_vocab", vocabulary, "--tune_block", 0]
    refused("train_mymodel", flags, "--gene_weights: expected scBERT's .* tensors, found 0")
    weights.write_bytes(weights.read_bytes()[:300])
    refused("train_mymodel", flags, "--gene_weights: .*weights.pth: expected weights, found")


def test_foreign_image_weights(damaged, refused):
    weights = damaged.out / "weights.pth"
    torch.save({"model": {"other.weight": torch.ones(3)}}, weights)
    refused("train_mymodel", ["--image_weights", weights], "--image_weights: expected weights of test_vit")
    refused(
        "train_mymodel",
        ["--image_encoder", "no_such_model"],
        "--image_encoder: expected a model that timm knows, found no_such_model",
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_a_device_that_is_not_there(damaged, refused):
    refused("train_mymodel", ["--device", "cuda"], "--device cuda: expected a CUDA device")
    refused("train_mymodel", ["--precision", "fp16"], "--precision fp16: expected a CUDA device")


def test_tiles_of_another_scale_than_the_encoder(damaged, refused):
    for one in damaged.tiles.iterdir():
        record = json.loads((one / "tiles.json").read_text())
        write_record(one / "tiles.json", record | {"um_per_px": 7.0})
    for script in ("train_decoder", *EVALUATION):
        refused(script, [], "expected tiles of 32 px at 3.5 um", "found tiles of 32 px at 7 um", "image_tilling.py")
