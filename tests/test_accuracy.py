"""benchmarks/accuracy.py: folds, what is repeated and what is not, the rows, the table; slowly, all of it at once."""

import json
import shutil
from dataclasses import replace

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from tiny_runs import rewrite_matrix, row

from benchmarks import accuracy, accuracy_run, accuracy_table
from benchmarks import accuracy_folds as folds
from utils.genes import panels as gene_panels
from utils.slices import splits
from utils.slices.splits import SliceRow

SECTIONS = [SliceRow(name, name[0], "", 200.0, f"{name}.jpg") for name in ("C2", "C3", "C4", "C5", "B4", "C6")]


def parts_of(fold):
    return {part: [r.slice for r in fold.rows if r.part == part] for part in splits.PARTS}


def tiny(data, out, *flags):
    """Parsed and checked flags of a small run with the smallest encoder."""
    files = ["--data", data, "--out", out, "--runs", out / "runs", "--protocol", "given", "--small"]
    encoder = ["--encoder", "test_vit", "--encoder_weights", "none", "--tile_px", 32, "--workers", 0, "--device", "cpu"]
    args = accuracy.parse_args([str(flag) for flag in (*files, *encoder, *flags)])
    accuracy.check(args)
    return args


@pytest.fixture
def run(simulated, tmp_path):
    """`run(*flags)` is the run of the simulated slices' own split with seed 0."""

    def make(*flags, ablation="default", **changed):
        args = tiny(simulated, tmp_path, *flags)
        fold = folds.given_folds(splits.read_table(simulated)[0])[0]
        return accuracy_run.Run(replace(fold, **changed), 0, args, ablation)

    return make


# ---- folds and flags


def test_the_default_folds_are_of_the_slices_they_name():
    found = {fold.name: fold for fold in folds.default_folds(SECTIONS)}
    assert list(found) == ["C_to_B", "B_to_C", "within_C"]
    assert parts_of(found["C_to_B"]) == {"train": ["C2", "C3", "C4"], "val": ["C5"], "test": ["B4"]}
    assert parts_of(found["B_to_C"]) == {"train": ["B4"], "val": [], "test": ["C2", "C3", "C4", "C5"]}
    assert parts_of(found["within_C"]) == {"train": ["C2", "C3"], "val": ["C4"], "test": ["C5"]}
    assert [fold.flags for fold in found.values()] == [(), ("--val_strip",), ("--allow_leak",)]


def test_a_fold_is_written_with_the_pitch_and_image_of_the_data(tmp_path):
    lines = folds.default_folds(SECTIONS)[0].write(tmp_path / "fold" / "slices.csv").read_text().splitlines()
    assert lines[:2] == ["slice,patient,part,spot_pitch_um,image", "C2,C,train,200,C2.jpg"]


def test_missing_slices_are_named_with_the_protocol_for_other_data():
    with pytest.raises(ValueError, match=r"B4, C3 not found.*--protocol patients"):
        folds.default_folds([one for one in SECTIONS if one.slice not in ("B4", "C3")])


def test_each_patient_is_tested_once_with_the_next_for_validation():
    rows = [row(name, "") for name in ("P01_1", "P01_2", "P02_1", "P03_1", "P04_1")]
    found = {fold.name: parts_of(fold) for fold in folds.patient_folds(rows)}
    assert list(found) == ["P01", "P02", "P03", "P04"]
    assert found["P01"] == {"train": ["P03_1", "P04_1"], "val": ["P02_1"], "test": ["P01_1", "P01_2"]}
    assert found["P04"]["val"] == ["P01_1", "P01_2"]
    two = folds.patient_folds(rows[:3])
    assert [(fold.flags, parts_of(fold)["val"]) for fold in two] == [(("--val_strip",), [])] * 2
    with pytest.raises(ValueError, match="two patients or more, found P01"):
        folds.patient_folds(rows[:2])


def test_the_given_split_is_the_tables_own():
    rows = [row("P01_1"), row("P02_1", ""), row("P03_1", "test")]
    (fold,) = folds.given_folds(rows)
    assert (fold.name, fold.flags) == ("given", ("--val_strip",))
    assert parts_of(fold) == {"train": ["P01_1"], "val": [], "test": ["P03_1"]}
    assert folds.given_folds([*rows, row("P04_1", "val")])[0].flags == ()


def test_every_ablation_changes_what_it_names(run):
    default = run().settings
    for name in folds.ABLATIONS:
        settings, changed = run(ablation=name).settings, set(folds.ABLATIONS[name])
        differing = {step for step in settings if settings[step] != default[step]}
        assert differing <= changed | {"decoder_similarity"}, name
        assert changed <= differing or name == "no_expression", name  # whose weight may be 0 already


def test_an_ablation_of_stage_two_shares_stage_one_and_no_other_does(run):
    default, counts, alone, hires = (run(ablation=n) for n in ("default", "counts", "no_matching", "hires"))
    assert counts.encoder == default.encoder and counts.folder != default.folder
    assert alone.encoder != default.encoder and alone.tiles == default.tiles
    assert hires.tiles != default.tiles and hires.encoder != default.encoder
    assert [step.key for step in counts.steps[:2]] == [step.key for step in default.steps[:2]]
    assert counts.file().name == "given_seed0_test_vit_32px_small_counts.json"


# ---- what is repeated


def test_a_key_knows_data_parts_and_settings_but_neither_paths_nor_machine(run, monkeypatch):
    same = run()
    assert run("--out", "elsewhere", "--device", "auto", "--workers", "3").key == same.key
    rows = same.fold.rows
    others = [
        run("--tile_px", "48"),
        run("--shuffled"),
        run(ablation="no_matching"),
        run(flags=("--allow_leak",)),
        run(rows=(replace(rows[0], part="val"), replace(rows[1], part="train"), rows[2])),
    ]
    monkeypatch.setitem(folds.SMALL, "train_mymodel", "--Epoch 4")
    others.append(run())
    assert len({one.key for one in [same, *others]}) == 7


def other_bytes(path):
    path.write_bytes(path.read_bytes() + b"\n")


REPLACED = {
    "image": lambda data: other_bytes(data / "P01_1" / "P01_1_he.jpg"),
    "hires": lambda data: other_bytes(data / "P02_1" / "spatial" / "tissue_hires_image.png"),
    "positions": lambda data: other_bytes(next((data / "P03_1" / "spatial").glob("tissue_positions*"))),
    "scale factors": lambda data: other_bytes(data / "P01_1" / "spatial" / "scalefactors_json.json"),
    "counts": lambda data: rewrite_matrix(data / "P01_1", lambda counts, *names: (counts + (counts > 0), *names)),
    "pitch in slices.csv": lambda data: (data / "slices.csv").write_text(
        (data / "slices.csv").read_text().replace(",100,", ",55,")
    ),
}


@pytest.mark.parametrize("what", REPLACED)
def test_a_replaced_input_repeats_every_step(simulated, tmp_path, what):
    """Under the same name: rows of a run and each of its steps are those of what the files hold."""
    data = shutil.copytree(simulated, tmp_path / "data")

    def keys():
        accuracy_run.content_of.cache_clear()
        fold = folds.given_folds(splits.read_table(data)[0])[0]
        one = accuracy_run.Run(fold, 0, tiny(data, tmp_path / "out"))
        return [one.key, *(step.key for step in (*one.prepare, *one.steps))]

    before = keys()
    assert keys() == before
    REPLACED[what](data)
    assert all(old != new for old, new in zip(before, keys(), strict=True))


def test_weights_are_known_by_their_tensors(tmp_path):
    tensors, paths = {"a": torch.ones(2), "b": torch.zeros(3)}, [tmp_path / f"{i}.pth" for i in range(3)]
    for path, of in zip(paths, (tensors, dict(reversed(tensors.items())), {"a": torch.ones(2)}), strict=True):
        torch.save(of, path)
    keys = [accuracy_run.weights_key(str(path)) for path in paths]
    assert keys[0] == keys[1] != keys[2]


def test_a_finished_run_is_not_repeated_and_one_of_another_key_is(run, monkeypatch, capsys):
    def do(self):
        record = {"key": self.key, "rows": {"magic": {"residuals": 0.1}}, "seconds": {"rows": 1.0}}
        accuracy_run.write_run(self.file(), record)
        return record

    monkeypatch.setattr(accuracy_run.Run, "do", do)
    accuracy_run.done(run())
    assert "there already" not in capsys.readouterr().out
    monkeypatch.setattr(accuracy_run.Run, "do", lambda self: pytest.fail("run again"))
    assert accuracy_run.done(run())["rows"]["magic"]["residuals"] == 0.1
    assert "there already" in capsys.readouterr().out
    monkeypatch.setattr(accuracy_run.Run, "do", do)
    assert run(flags=("--allow_leak",)).found() is None
    accuracy_run.done(run(flags=("--allow_leak",)))
    assert capsys.readouterr().out.count("other data or settings: run again") == 1


def test_a_step_runs_once_and_again_when_its_key_changes(run, tmp_path):
    step = run().prepare[0]
    assert step.run() > 0 and (tmp_path / "tiles" / "image_tilling.log").read_text().endswith("tiles\n")
    (tmp_path / "tiles" / "image_tilling.log").write_text("as it was")
    step.run()
    assert (tmp_path / "tiles" / "image_tilling.log").read_text() == "as it was"
    replace(step, after=("other data",)).run()
    assert "are there" in (tmp_path / "tiles" / "image_tilling.log").read_text()


def test_a_step_that_fails_raises_with_what_it_said_last(tmp_path):
    step = accuracy_run.Step("image_tilling", ("--data", str(tmp_path / "none")), tmp_path, ())
    with pytest.raises(ValueError, match=r"image_tilling.py ended with code 2: .*none.*image_tilling.log"):
        step.run()
    assert not (tmp_path / "image_tilling.json").exists()


# ---- shuffled counts


def test_shuffling_moves_counts_with_their_totals_and_nothing_else(prepared, tmp_path):
    names = [path.name for path in sorted(prepared.panels.iterdir())]
    folds.shuffle_panels(prepared.panels, tmp_path, names)
    orders = []
    for name in names:
        for role in gene_panels.FILES:
            before, after = (gene_panels.panel_path(p, None, name, role) for p in (prepared.panels, tmp_path))
            old, new = anndata.read_h5ad(before), anndata.read_h5ad(after)
            order = np.random.default_rng(folds.zlib.crc32(name.encode())).permutation(old.n_obs)
            np.testing.assert_array_equal(new.X.toarray(), old.X.toarray()[order])
            np.testing.assert_array_equal(new.obs["total_counts"], old.obs["total_counts"].to_numpy()[order])
            pd.testing.assert_frame_equal(new.obs.drop(columns="total_counts"), old.obs.drop(columns="total_counts"))
            pd.testing.assert_frame_equal(new.var, old.var)
            np.testing.assert_array_equal(new.obsm["spatial"], old.obsm["spatial"])
            assert gene_panels.read_panel(after).counts_hash == gene_panels.read_panel(before).counts_hash
        orders.append(order)
    assert (orders[0] != np.arange(len(orders[0]))).any() and (orders[0] != orders[1]).any()


# ---- the table


def record_of(rng, seed, magic=0.2, ablation="default"):
    """A finished run as accuracy_run.py writes it."""
    scores = {name: 0.01 * i for i, name in enumerate(accuracy_table.ROWS)} | {"magic": magic, "knn": 0.1}
    figures = {name: dict.fromkeys(accuracy_table.FIGURES, score + 0.01 * seed) for name, score in scores.items()}
    figures["mean"] = dict.fromkeys(accuracy_table.FIGURES)
    found = dict.fromkeys(accuracy_table.GALLERY, 0.2 + seed / 10)
    noise = rng.normal(scale=500, size=2000)
    drawn = [name for name in (*accuracy_table.CHEAP, "stage_two_pretrained", "magic") if name != "mean"]
    return {
        "seed": seed,
        "ablation": ablation,
        "rows": figures,
        "draws": {name: np.rint(1e5 * figures[name]["residuals"] + noise).astype(int).tolist() for name in drawn},
        "retrieval": {
            "neighbours": {"chance": 0.1, **found},
            "interval": {name: [0.1, 0.3 + seed / 10] for name in found},
            "R@10": 0.3,
            "R@10_chance": 0.1,
        },
        "diagnostics": {
            "losses": {"best": {f"{a}_{b}": 2.0 + seed for a in ("contrast", "matching") for b in ("loss", "chance")}},
            "slice_classifier": {"before": {"accuracy": 0.8}, "after": {"accuracy": 0.5 + seed / 10, "chance": 0.5}},
            "effective_rank": {"image": 30.0, "gene": 10.0},
            "dead_units": {"image": 0.0, "gene": 0.0},
            "matching_calibration_error": 0.01,
            "sd_ratio": 0.3,
        },
    }


def test_a_fold_is_means_over_seeds_beside_the_best_cheap_row(rng):
    fold = accuracy_table.fold_table([record_of(rng, seed) for seed in (0, 1, 2)])
    assert set(fold) == {"rows", "best_baseline", "ratio", "difference_interval", "diagnostics"}
    assert fold["diagnostics"]["slice_after"] == pytest.approx(0.6) and fold["diagnostics"]["contrast_loss"] == 3.0
    assert tuple(fold["rows"]) == accuracy_table.ROWS
    for name, found in fold["rows"].items():
        assert set(found) == {"residuals", "lognorm", "given_depth", "top50", "retrieval"}
        assert all(set(found[key]) == {"mean", "sd", "seeds"} for key in accuracy_table.FIGURES)
        assert (found["retrieval"] is None) == (name != "magic")
    magic = fold["rows"]["magic"]
    assert magic["residuals"]["mean"] == pytest.approx(0.21) and magic["residuals"]["sd"] == pytest.approx(0.01)
    assert fold["rows"]["mean"]["residuals"] == {"mean": None, "sd": None, "seeds": [None] * 3}
    assert (fold["best_baseline"], fold["ratio"]) == ("knn", pytest.approx(0.21 / 0.11))
    assert fold["difference_interval"] == pytest.approx([0.1, 0.1], abs=1e-4)  # the same noise in both
    assert magic["retrieval"]["neighbours"]["chance"] == 0.1
    assert magic["retrieval"]["neighbours"]["reranked"]["seeds"] == pytest.approx([0.2, 0.3, 0.4])
    assert magic["retrieval"]["interval"]["depth"] == pytest.approx([0.1, 0.4])
    assert magic["retrieval"]["R@10"]["mean"] == pytest.approx(0.3) and magic["retrieval"]["R@10_chance"] == 0.1
    json.dumps(fold, allow_nan=False)


def test_markdown_says_what_its_intervals_speak_of_and_names_published_figures_for_patients_alone(rng):
    result = {"command": "c", "date": "d", "machine": "m", "seeds": [0, 1], "shuffled": False, "protocol": "patients"}
    result["folds"] = {"P1": accuracy_table.fold_table([record_of(rng, 0)])}
    text = accuracy_table.markdown(result)
    assert "of these slices, not of patients" in text and "TRIPLEX" in text and "Another protocol" in text
    assert "### P1 (1 of 2 seeds)" in text and "| **magic** | 0.200 |" in text and "| mean | - |" in text
    text = accuracy_table.markdown(result | {"protocol": "default", "shuffled": True})
    assert "TRIPLEX" not in text and "must come to chance" in text


def test_ablations_stand_beside_the_default(rng):
    records = {"default": record_of(rng, 0), "no_queue": record_of(rng, 0, magic=0.15, ablation="no_queue")}
    rows = accuracy_table.ablation_table(records)
    assert list(rows) == ["default", "no_queue", "no_stage_one"]
    assert rows["no_queue"]["difference"] == pytest.approx(-0.05)
    low, high = rows["no_queue"]["difference_interval"]
    assert -0.08 < low < -0.05 < high < -0.02
    assert rows["default"]["difference_interval"] == [0, 0] and rows["no_stage_one"]["retrieval"] is None
    about = {"command": "c", "date": "d", "machine": "m", "fold": "C_to_B", "seed": 0}
    assert "| no_queue | 0.150 |" in accuracy_table.ablation_markdown({"rows": rows, **about})


def test_flags_that_exclude_each_other_and_unknown_folds_are_refused(simulated, tmp_path):
    for flags in (("--ablations",), ("--only", "given", "x")):
        with pytest.raises(ValueError, match=flags[0]):
            tiny(simulated, tmp_path, *flags)
    with pytest.raises(ValueError, match="--only C_to_B: expected one of given"):
        accuracy.main(tiny(simulated, tmp_path, "--only", "C_to_B", "0"))
    assert not tiny(simulated, tmp_path).keep


@pytest.mark.slow
@pytest.mark.usefixtures("another_precision")
def test_a_whole_run_from_slices_to_the_table(simulated, tmp_path, capsys):
    accuracy.main(tiny(simulated, tmp_path))
    result = json.loads((tmp_path / "accuracy.json").read_text())
    rows = result["folds"]["given"]["rows"]
    assert tuple(rows) == accuracy_table.ROWS
    known = [found["residuals"]["mean"] for name, found in rows.items() if name != "mean"]
    assert all(-1 < score < 1 for score in known) and rows["ridge"]["residuals"]["mean"] > 0.05
    record = json.loads((tmp_path / "runs" / "given_seed0_test_vit_32px_small.json").read_text())
    assert all(len(draws) == 2000 for draws in record["draws"].values())
    assert set(record["diagnostics"]) >= {"losses", "effective_rank", "dead_units", "sd_ratio", "slice_classifier"}
    assert str(tmp_path) not in json.dumps(record)
    assert (tmp_path / "accuracy.md").read_text().count("| **magic** |") == 1
    capsys.readouterr()
    accuracy.main(tiny(simulated, tmp_path))
    assert "there already" in capsys.readouterr().out
