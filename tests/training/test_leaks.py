"""What training and the evaluations refuse: spots seen before, other panels, other tiles, a part without slices."""

import dataclasses
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from spaceranger_folders import refused
from tiny_runs import data_flags, row

from utils.features import dataset
from utils.genes import panels as gene_panels
from utils.training import checkpoint, split

ROLES = ("input", "target")


# ---- what training refuses


def training(work, rows, **changed):
    return split.load_training(rows, data_flags(work, **changed), ROLES)


def choose_without_strips(work):
    """Panels of P01_1 that are chosen without its validation strip."""
    (work.out / "strips.csv").write_text("slice,patient,part\nP01_1,P01,train\n")
    work.run("make_decoder_data", "--slices", work.out / "strips.csv", "--val_strip")


def test_training_needs_a_train_and_a_validation_part(work):
    rows = [row("P01_1"), row("P02_1", "val"), row("P03_1", "test")]
    assert [one.name for one in training(work, rows)] == ["P01_1", "P02_1"], "test slices are not even read"
    refused("expected a slice of part val, found none; .*or use --val_strip", training, work, [rows[0], rows[2]])
    refused("expected a slice of part train, found none; name one in slices.csv$", training, work, rows[1:])
    choose_without_strips(work)
    assert len(training(work, rows[:1], val_strip=True)) == 1
    refused("expected a slice of part train", training, work, rows[1:], val_strip=True)


def test_a_panel_chosen_on_a_slice_outside_the_train_part_is_refused(work):
    refused(
        r"expected genes chosen on the train part \(P03_1\), found some chosen on P01_1; run make_decoder_data.py",
        training,
        work,
        [row("P03_1"), row("P02_1", "val")],
    )
    assert training(work, [row("P01_1"), row("P03_1"), row("P02_1", "val")]), "a part of the train slices may choose"


def test_a_batch_larger_than_the_train_set_is_refused(work):
    rows = [row("P01_1"), row("P02_1", "val")]
    refused("--batch_size: expected at most the 70 train spots, found 71", training, work, rows, batch_size=71)
    assert training(work, rows, batch_size=70)
    choose_without_strips(work)
    n = len(training(work, rows[:1], val_strip=True)[0].rows_of("train"))
    refused(f"the {n} train spots", training, work, rows[:1], batch_size=70, val_strip=True)


def test_a_copy_without_some_spots_in_two_parts_is_refused(work, monkeypatch):
    rows, load_slices = [row("P01_1"), row("P02_1", "val")], dataset.load_slices

    def with_a_copy(*args, **kwargs):
        first, other = load_slices(*args, **kwargs)
        copied = {"barcodes": first.barcodes[5:], "total_counts": first.total_counts[5:]}
        return [first, dataclasses.replace(other, **copied)]

    assert training(work, rows)
    monkeypatch.setattr(dataset, "load_slices", with_a_copy)
    refused(r"the same spots in two parts: P01_1 \(train\), P02_1 \(val\); correct the parts", training, work, rows)


def test_the_same_counts_in_two_parts_are_refused(work, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(work.data, data)
    work = dataclasses.replace(work, data=data)
    for role in gene_panels.FILES:
        shutil.copy(
            gene_panels.panel_path(work.data, work.panels, "P01_1", role),
            gene_panels.panel_path(work.data, work.panels, "P02_1", role),
        )
    for folder in (work.tiles, work.data):  # the whole slice under another name
        shutil.rmtree(folder / "P02_1")
        shutil.copytree(folder / "P01_1", folder / "P02_1")
    rows = [row("P01_1"), row("P02_1", "val")]
    refused(r"identical counts in two parts: P01_1 \(train\), P02_1 \(val\)", training, work, rows)
    assert training(work, rows, allow_leak=True)
    assert "warning: slices with identical counts" in capsys.readouterr().out


# ---- what an evaluation refuses


def state_of(rows, **more):
    kept = {
        "table": [dataclasses.asdict(r) for r in rows],
        "pretrain_hashes": {},
        "counts_hashes": {r.slice: f"h{r.slice}" for r in rows},
    }
    return kept | {"settings": {"allow_leak": False, "val_strip": False}} | more


TRAINED_ON = [row("P01_1"), row("P02_1", "val"), row("P03_1", "test")]


@pytest.mark.parametrize(
    ("held_out", "seen"),
    [
        (row("P03_1", "test"), False),
        (row("P09_1", "test"), False),
        (row("P01_2", "test"), True),  # another slice of a train patient
        (row("P02_2", "test"), True),  # another slice of a validation patient
        (row("P01_1", "val"), True),
        (row("P02_1", "val"), False),
        (row("P01_2", "val"), False),
        (row("P01_1", "train"), False),
    ],
)
def test_what_was_seen_is_not_held_out(held_out, seen, capsys):
    state = state_of(TRAINED_ON)
    if seen:
        refused(
            f"--encoder: .*not trained on {held_out.slice}, held out here",
            split.check_unseen,
            [held_out],
            state,
            "--encoder",
            False,
        )
    else:
        split.check_unseen([held_out], state, "--encoder", False)
    assert list(split.seen_in_training([held_out], state)) == ([held_out.slice] if seen else [])
    split.check_unseen([held_out], state, "--encoder", allow_leak=True)
    assert ("warning: --encoder" in capsys.readouterr().out) == seen


def test_a_train_patient_in_another_spelling_was_seen():
    held_out = dataclasses.replace(row("X1_1", "test"), patient="p01")
    assert split.seen_in_training([held_out], state_of(TRAINED_ON)) == {"X1_1": "another slice of patient p01"}


def test_a_slice_under_another_name_is_known_by_its_counts():
    renamed, state = row("X09_1", "test"), state_of(TRAINED_ON)
    split.check_unseen([renamed], state, "--encoder", False, {"X09_1": "hX09_1"})
    split.check_unseen([renamed], state, "--encoder", False, {"X09_1": "hP03_1"})
    for of in ("hP01_1", "hP02_1"):
        refused("X09_1, held out here", split.check_unseen, [renamed], state, "--encoder", False, {"X09_1": of})


def test_what_taught_the_encoder_counts_too():
    state = state_of(TRAINED_ON, encoder_table=[dataclasses.asdict(row("P07_1"))])
    refused("P07_2, held out here", split.check_unseen, [row("P07_2", "test")], state, "--decoder", False)


def test_a_leak_is_recorded_of_evaluated_slices_and_of_a_models_own_table():
    leaky = [row("P01_1"), row("P02_1", "val"), row("P01_2", "test")]
    parts = {"P01_2": ["test"], "P02_2": ["train", "val", "gap"], "P09_1": ["test"]}
    slices = [
        SimpleNamespace(
            name=name, patient=name[:3], part=np.array(part), panels={"input": SimpleNamespace(counts_hash=name)}
        )
        for name, part in parts.items()
    ]
    assert split.leaked_slices(slices, state_of(TRAINED_ON)) == ["P01_2"]
    assert split.leaks_of_table(state_of(TRAINED_ON)) == []
    assert split.leaks_of_table(state_of(leaky)) == ["P01 (test, train)"]
    encoder = [dataclasses.asdict(r) for r in (row("P02_1", "val"), row("P02_2", "test"))]
    assert split.leaks_of_table(state_of(leaky, encoder_table=encoder)) == ["P01 (test, train)", "P02 (test, val)"]


def test_a_panel_chosen_on_the_strip_is_refused(work):
    rows = [row("P01_1")]
    said = "expected genes chosen without the validation strips, found .* run make_decoder_data.py with --val_strip"
    refused(said, training, work, rows, val_strip=True)
    choose_without_strips(work)
    assert training(work, rows, val_strip=True)


def test_with_strips_val_is_strips_and_validation_slices(work):
    (work.out / "slices.csv").write_text("slice,patient,part\nP01_1,P01,train\nP02_1,P02,val\nP03_1,P03,test\n")
    flags = data_flags(work, part="val", slices=work.out / "slices.csv", val_strip=True)
    for strip, expected in ((True, ["P01_1", "P02_1"]), (False, ["P02_1"])):
        found = split.rows_of_part(flags, {"settings": {"val_strip": strip}})
        assert [one.slice for one in found] == expected


def test_a_validation_strip_is_stated_in_spots(work, capsys):
    choose_without_strips(work)
    slice_ = training(work, [row("P01_1")], val_strip=True)[0]
    numbers = [(slice_.part == part).sum() for part in ("train", "val", "gap")]
    assert sum(numbers) == 70 and numbers[1] == 17
    said = f"P01_1: {numbers[0]} train and 17 validation spots, {numbers[2]} left out between them"
    assert said in capsys.readouterr().out.splitlines()


def test_a_leak_that_training_allowed_is_only_said(capsys):
    state = state_of(TRAINED_ON, settings={"allow_leak": True, "val_strip": False})
    split.check_unseen([row("P01_2", "test")], state, "--encoder", False)
    assert "warning" in capsys.readouterr().out


@pytest.fixture(scope="module")
def states(trained):
    return {
        "input": checkpoint.load(trained.encoder, "stage_one", "--encoder"),
        "target": checkpoint.load(trained.decoder, "stage_two", "--decoder"),
    }


def evaluation(work, states, role, **changed):
    return split.load_evaluation(data_flags(work, **changed), states[role], "--weights", (role,))


@pytest.mark.parametrize("role", ROLES)
def test_an_evaluation_has_its_slices_and_those_that_taught(work, states, role):
    for part, names in (("test", ["P03_1"]), ("val", ["P02_1"]), ("all", ["P01_1", "P02_1", "P03_1"])):
        slices, trained_on = evaluation(work, states, role, part=part)
        assert [one.name for one in slices] == names and [one.name for one in trained_on] == ["P01_1", "P02_1"]


def test_an_evaluation_of_a_part_that_is_not_there_is_refused(work, states, tmp_path):
    (tmp_path / "slices.csv").write_text("slice,part\nP01_1,train\nP03_1,val\n")
    refused("expected a slice of part test", evaluation, work, states, "input", slices=tmp_path / "slices.csv")


def test_an_evaluation_on_tiles_of_another_scale_is_refused(work, states):
    shutil.rmtree(work.tiles)
    work.run("image_tilling", "--tile_um", 56)
    for role in ROLES:
        refused(
            r"expected tiles of 32 px at 3.5 um per px, as --weights was trained on, found tiles of 32 px at 1.75",
            evaluation,
            work,
            states,
            role,
        )
