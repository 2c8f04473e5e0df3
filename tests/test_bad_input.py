"""Bad input: one line that names the file or the flag, exit code 2, and everything on disk as it was before."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from tiny_runs import BEST, FLAGS, LAST, Work, rewrite_matrix, snapshot, stderr_line, write_matrix

from utils.slices import genes, reader, tiles

TRAINING = ("train_mymodel", "train_decoder")
EVALUATION = ("get_accuracy_image", "decoder_similarity")
PREPROCESSING = ("image_tilling", "make_decoder_data")
MATRIX = "filtered_feature_bc_matrix.h5"


@pytest.fixture
def work(trained, tmp_path):
    """All that the six scripts read and wrote, but for the small pictures: to be damaged."""
    own = Work(*(tmp_path / name for name in ("data", "tiles", "panels", "out")))
    for name in ("data", "tiles", "panels"):
        unread = shutil.ignore_patterns("*.png", "truth.h5ad")
        shutil.copytree(getattr(trained, name), getattr(own, name), ignore=unread)
    for name in ("encoder_model", "decoder_model"):
        shutil.copytree(trained.out / name, own.out / name)
    return own


@pytest.fixture(scope="module")
def control(trained, tmp_path_factory):
    """Asserts that a script runs on the undamaged folders with the flags of this test file; once for each script."""
    passed = {}

    def run(script):
        if script not in passed:
            out = tmp_path_factory.mktemp("control")
            new = PREPROCESSING[: PREPROCESSING.index(script) + 1] if script in PREPROCESSING else ()
            own = Work(
                trained.data,
                out / "tiles" if "image_tilling" in new else trained.tiles,
                out / "panels" if "make_decoder_data" in new else trained.panels,
                out,
            )
            models = ("--encoder", trained.encoder) if script in ("train_decoder", "get_accuracy_image") else ()
            models = ("--decoder", trained.decoder) if script == "decoder_similarity" else models
            passed[script] = own.exit_code(script, *models, *epochs(script))
        assert passed[script] == 0

    return run


def epochs(script):
    return ("--Epoch", 1) if script in TRAINING else ()


@pytest.fixture
def refused(work, control, capsys):
    """Runs a script on what a test has damaged: `refused(script, flags, *what its line must hold)`."""

    def run(script, flags, *expected):
        control(script)
        before = snapshot(work.data, work.tiles, work.panels, work.out)
        capsys.readouterr()
        assert work.exit_code(script, *epochs(script), *flags) == 2
        line = stderr_line(capsys, *expected)
        after = snapshot(work.data, work.tiles, work.panels, work.out)
        assert after == before, f"changed: {sorted(set(after) ^ set(before))}"
        return line

    return run


def positions(work, name="P01_1"):
    (path,) = (work.data / name / "spatial").glob("tissue_positions*.csv")
    return path


def split(work, text):
    path = work.out / "slices.csv"
    path.write_text("slice,patient,part\n" + text)
    return "--slices", path


# ---- slices


@pytest.mark.parametrize("script", FLAGS)
def test_data_folder_that_is_missing_empty_or_a_file(work, refused, script):
    refused(script, ["--data", work.out / "nowhere"], "nowhere: expected a folder of slices, found nothing", "--data")
    (work.out / "empty").mkdir()
    refused(script, ["--data", work.out / "empty"], "empty: expected slice folders", "--data")
    refused(script, ["--data", positions(work)], "csv: expected a folder of slices, found a file")


@pytest.mark.parametrize("script", PREPROCESSING)
def test_missing_positions(work, refused, script):
    positions(work).unlink()
    refused(script, [], r"P01_1/spatial: expected one of tissue_positions.csv, .*found none; add it")


@pytest.mark.parametrize("script", PREPROCESSING)
def test_no_barcode_in_common(work, refused, script):
    rewrite_matrix(work.data / "P01_1", lambda c, barcodes, names: (c, [b[:-1] + "2" for b in barcodes], names))
    refused(script, [], "P01_1: expected barcodes in common")


@pytest.mark.parametrize("script", PREPROCESSING)
@pytest.mark.parametrize("share", [0.0, 0.5, 0.95])
def test_truncated_h5(work, refused, script, share):
    path = work.data / "P01_1" / MATRIX
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    refused(script, [], f"P01_1/{MATRIX}: expected a 10x matrix in HDF5")


@pytest.mark.parametrize("script", PREPROCESSING)
def test_a_slice_without_tissue_spots(work, refused, script):
    path = positions(work)
    path.write_text(re.sub(r"(-1),1,", r"\1,0,", path.read_text()))
    refused(script, [], "P01_1: expected spots in tissue, found 0 of")


def test_missing_scale_factors(work, refused):
    (work.data / "P01_1" / "spatial" / "scalefactors_json.json").unlink()
    refused("image_tilling", [], "scalefactors_json.json: expected the scale factors")


@pytest.mark.parametrize("value", [0.5, -1, np.nan, np.inf])
def test_counts_that_are_none(work, refused, value):
    path = work.data / "P01_1" / MATRIX
    matrix = reader.read_matrix(path)
    counts = matrix.counts.toarray().astype(float)
    path.unlink()
    write_matrix(path, counts, matrix.barcodes, matrix.genes)
    assert reader.read_matrix(path).counts.sum() == matrix.counts.sum(), "whole numbers as floats are counts"
    counts[3, 5] = value
    path.unlink()
    write_matrix(path, counts, matrix.barcodes, matrix.genes)
    refused("make_decoder_data", [], f"{MATRIX}: expected raw counts", f"found {value}")


def test_no_count_at_all(work, refused):
    rewrite_matrix(work.data / "P01_1", lambda counts, barcodes, names: (counts * 0, barcodes, names))
    refused("make_decoder_data", [], "P01_1: expected spots with counts, found none")


# ---- pictures


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.95])
def test_corrupt_picture(work, refused, share):
    """Tiles of other settings, cut from the whole picture, stay."""
    path = work.data / "P01_1" / "P01_1_he.jpg"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    refused("image_tilling", ["--tile_px", 16], "P01_1_he.jpg: expected a picture, found one that cannot be read")


def test_no_picture(work, refused):
    (work.data / "P01_1" / "P01_1_he.jpg").unlink()
    refused("image_tilling", [], "expected the image P01_1_he.jpg")
    refused("image_tilling", ["--source", "hires"], "P01_1: expected a full-resolution picture, found none")


# ---- the table and the split


@pytest.mark.parametrize("script", ["make_decoder_data", "train_mymodel", "get_accuracy_image"])
def test_no_split_of_two_patients(work, refused, script):
    line = refused(script, split(work, "P01_1,A,\nP02_1,B,\nP03_1,B,\n"), "expected three patients or more to split")
    assert "2 (A, B)" in line and "--val_strip" in line


@pytest.mark.parametrize("script", ["make_decoder_data", "train_mymodel", "train_decoder", "decoder_similarity"])
def test_a_test_patient_in_train(work, refused, script):
    parts = split(work, "P01_1,A,train\nP02_1,B,val\nP03_1,A,test\n")
    refused(script, parts, r"patients in test and in another part: A \(test, train\)", "--allow_leak")


@pytest.mark.parametrize("script", TRAINING)
def test_no_validation_slice(work, refused, script):
    refused(script, split(work, "P01_1,A,train\nP03_1,C,test\n"), "no slice has part val", "--val_strip")


@pytest.mark.parametrize("script", EVALUATION)
def test_a_slice_that_was_seen_in_training(work, refused, script):
    refused(script, split(work, "P02_1,B,train\nP01_1,A,test\n"), "P01_1 held out here, but seen in its training")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("NOSUCH,A,train\n", "expected the slice folder .*NOSUCH, found no such folder"),
        ("P01_1,A,training\n", "expected train, val, test or nothing as part, found training"),
        ("../P01_1,A,train\n", "expected a path inside the folder"),
        ("", "expected a line per slice, found only the header"),
    ],
)
def test_a_bad_table(work, refused, text, words):
    for script in ("image_tilling", "train_mymodel"):
        refused(script, split(work, text), f"slices.csv.*{words}")


# ---- panels and tiles


def test_a_list_with_unknown_genes(work, refused):
    listed = work.out / "list.txt"
    known = genes.read_panel(genes.panel_path(work.data, work.panels, "P01_1", "target")).genes
    listed.write_text("\n".join([*known, "NOSUCH"]))
    for flag in ("--target_genes", "--input_genes"):
        refused("make_decoder_data", [flag, listed], r"list.txt: 1 of 21 genes are in no train slice \(NOSUCH")
    refused("make_decoder_data", ["--target_genes", work.out / "none.txt"], "none.txt: expected a text file")


@pytest.mark.parametrize("script", [*TRAINING, *EVALUATION])
def test_panels_that_are_missing_or_torn(work, refused, script):
    role = "target" if script in ("train_decoder", "decoder_similarity") else "input"
    path = genes.panel_path(work.data, work.panels, "P01_1", role)
    path.write_bytes(path.read_bytes()[:2000])
    refused(script, [], f"P01_1/{path.name}: expected a file of make_decoder_data.py")
    path.unlink()
    refused(script, [], f"P01_1/{path.name}: expected a panel file, found none; run make_decoder_data.py first")


@pytest.mark.parametrize("script", [*TRAINING, *EVALUATION])
def test_tiles_that_are_missing(work, refused, script):
    folder = work.tiles / "P01_1"
    pack, record = tiles.TilePack(folder), tiles.read_record(folder)
    rows = np.arange(3, 70)
    tiles.write_pack(folder, pack.barcodes[rows], np.zeros((67, 2)), pack.read(rows), pack.size)
    tiles.write_record(folder / "tiles.json", record | {"number": 67})
    refused(script, [], "tiles/P01_1: expected a tile for each of 70 spots, 3 have none", "image_tilling.py")
    shutil.rmtree(folder)
    refused(script, [], "tiles/P01_1: expected tiles.json and tiles.h5, found none; run image_tilling.py first")


@pytest.mark.parametrize("script", TRAINING)
def test_a_batch_larger_than_the_train_set(work, refused, script):
    refused(script, ["--batch_size", 71], "--batch_size 71 is larger than the train set of 70 spots")


def test_a_panel_chosen_on_a_held_out_slice(work, refused):
    parts = split(work, "P03_1,C,train\nP02_1,B,val\nP01_1,A,test\n")
    for script in TRAINING:
        refused(script, parts, r"P03_1/.*h5ad: its genes were chosen on P01_1, outside the train part \(P03_1\)")


# ---- checkpoints


@pytest.mark.parametrize(("script", "role"), [("get_accuracy_image", "input"), ("decoder_similarity", "target")])
def test_a_checkpoint_of_another_gene_panel(work, refused, script, role):
    work.run("make_decoder_data", "--n_top_genes", 19, "--n_input_genes", 40)
    refused(script, [], f"trained on .. {role} genes, of which .* has .. among its", f"--{role}_genes")


@pytest.mark.parametrize("script", ["train_decoder", *EVALUATION])
def test_a_torn_missing_or_foreign_checkpoint(work, refused, script):
    flag, path = ("--decoder", work.decoder) if script == "decoder_similarity" else ("--encoder", work.encoder)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused(script, [], f"{flag}: .*{path.parent.name}/{BEST} is torn")
    path.unlink()
    refused(script, [], f"{flag}: expected the file .*{path.parent.name}/{BEST}, found none; run train_")
    torch.save({"weights": torch.ones(2)}, path)
    refused(script, [], f"{flag}: expected a stage_... checkpoint of train_.*, found another file")


def test_the_checkpoint_of_the_other_stage(work, refused):
    for script in ("train_decoder", "get_accuracy_image"):
        refused(
            script, ["--encoder", work.decoder], "expected a stage_one checkpoint of train_mymodel.py, found stage_two"
        )
    refused("decoder_similarity", ["--decoder", work.encoder], "expected a stage_two checkpoint of train_decoder.py")


@pytest.mark.parametrize("script", TRAINING)
def test_resume_from_what_does_not_fit(work, refused, script):
    folder = (work.encoder if script == "train_mymodel" else work.decoder).parent
    size = {"train_mymodel": ["--width", 48], "train_decoder": ["--decoder_width", 32]}[script]
    refused(script, ["--resume", *size], f"--resume: .*{folder.name}/{LAST} was trained with other sizes")
    if script == "train_decoder":
        refused(script, ["--resume", "--target", "counts"], "was trained with other target")
    (folder / LAST).write_bytes((folder / LAST).read_bytes()[:5000])
    refused(script, ["--resume"], f"--resume: .*{LAST} is torn")
    (folder / LAST).unlink()
    refused(script, ["--resume"], f"--resume: expected the file .*{LAST}, found none; run without --resume first")


# ---- weights and names


def test_gene_weights_without_their_genes(work, refused):
    weights = work.encoder
    for flag in ("--gene_weights", "--gene2vec"):
        refused("train_mymodel", [flag, weights], "--gene_weights and --gene2vec need --gene_vocab")
    refused("train_mymodel", ["--gene_weights", work.out / "none.pth"], "--gene_weights: expected the file .*none.pth")


def test_foreign_gene_weights(work, refused):
    """Nothing in the file fits: the run stops, it does not train from random weights in silence."""
    vocabulary, weights = work.out / "genes.txt", work.out / "weights.pth"
    vocabulary.write_text("\n".join(genes.read_panel(genes.panel_path(work.data, work.panels, "P01_1", "input")).genes))
    torch.save({"model_state_dict": {"other.weight": torch.ones(3)}}, weights)
    flags = ["--gene_weights", weights, "--gene_vocab", vocabulary, "--tune_block", 0]
    refused("train_mymodel", flags, "--gene_weights: 0 of scBERT's .* tensors found")
    weights.write_bytes(weights.read_bytes()[:300])
    refused("train_mymodel", flags, "--gene_weights: .*weights.pth is torn")


def test_foreign_image_weights(work, refused):
    weights = work.out / "weights.pth"
    torch.save({"model": {"other.weight": torch.ones(3)}}, weights)
    refused("train_mymodel", ["--image_weights", weights], "--image_weights do not fit test_vit")
    refused("train_mymodel", ["--image_encoder", "no_such_model"], "--image_encoder no_such_model: expected a name")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_a_device_that_is_not_there(work, refused):
    refused("train_mymodel", ["--device", "cuda"], "--device cuda: expected a CUDA device")
    refused("train_mymodel", ["--precision", "fp16"], "--precision fp16 needs a CUDA device")


def test_tiles_of_another_scale_than_the_encoder(work, refused):
    for one in work.tiles.iterdir():
        record = json.loads((one / "tiles.json").read_text())
        tiles.write_record(one / "tiles.json", record | {"um_per_px": 7.0})
    for script in ("train_decoder", *EVALUATION):
        refused(script, [], r"tiles of \(32, ", r"\(32, 7.0\)", r"\(32, 3.5\)", "image_tilling.py")
