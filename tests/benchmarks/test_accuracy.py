"""benchmarks/accuracy.py: folds, what is repeated and what is not, the table; slowly, all of it at once."""

import importlib
import json
import shutil
from dataclasses import replace

import anndata
import numpy as np
import pandas as pd
import pytest
from tiny_runs import rewrite_matrix, row

from benchmarks import accuracy, accuracy_run, accuracy_scores, accuracy_table
from benchmarks import accuracy_folds as folds
from utils.genes import panels as gene_panels
from utils.slices import splits
from utils.slices.splits import SliceRow

SECTIONS = [SliceRow(name, name[0], "", 200.0, f"{name}.jpg") for name in ("C2", "C3", "C4", "C5", "B4", "C6")]


def parts_of(fold):
    return {part: [r.slice for r in fold.rows if r.part == part] for part in splits.PARTS}


def tiny(data, out, *flags):
    """Checked settings of a small run with the smallest encoder."""
    files = ["--data", data, "--out", out, "--runs", out / "runs", "--protocol", "given", "--small"]
    encoder = ["--encoder", "test_vit", "--encoder_weights", "none", "--tile_px", 32, "--workers", 0, "--device", "cpu"]
    settings = accuracy.parse_args([str(flag) for flag in (*files, *encoder, *flags)])
    accuracy.check(settings)
    return settings


@pytest.fixture
def run(simulated, tmp_path):
    """`run(*flags)` is the run of the simulated slices' own split with seed 0."""

    def make(*flags, ablation="default", **changed):
        fold = folds.given_folds(splits.read_table(simulated)[0])[0]
        return accuracy_run.Run(replace(fold, **changed), 0, tiny(simulated, tmp_path, *flags), "none", ablation)

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


def test_every_ablation_changes_what_it_names_and_parses(run):
    default = run()
    for name in folds.ABLATIONS:
        other, changed = run(ablation=name), set(folds.ABLATIONS[name])
        flags = other.flags()
        assert {step for step in flags if flags[step] != default.flags()[step]} == changed, name
        for step in other.steps:
            parsed = importlib.import_module(step.script).parse_args(list(step.argv))
            assert parsed.seed == other.seed and str(parsed.panels).startswith(str(other.folder))


def test_every_run_has_a_folder_of_its_own_and_shares_tiles_cut_alike(run):
    default, counts, hires = (run(ablation=name) for name in ("default", "counts", "hires"))
    assert len({one.folder for one in (default, counts, hires, run("--shuffled"))}) == 4
    tiles = [one.steps[0].argv[3] for one in (default, counts, hires)]
    assert tiles[0] == tiles[1] != tiles[2]
    assert counts.file.name == "given_seed0_test_vit_32px_small_counts.json"
    assert [step.name for step in default.steps][-2:] == ["train_decoder_pretrained", "decoder_similarity_pretrained"]
    assert len(default.steps) == len(counts.steps) + 2


# ---- what is repeated


def test_a_key_knows_data_parts_and_settings_but_neither_paths_nor_machine(run, monkeypatch):
    same = run()
    key, rows = same.key, same.fold.rows
    assert run("--out", "elsewhere", "--device", "auto", "--workers", "3").key == key
    others = [
        run("--tile_px", "48"),
        run("--shuffled"),
        run(ablation="no_matching"),
        run(flags=("--allow_leak",)),
        run(rows=(replace(rows[0], part="val"), replace(rows[1], part="train"), rows[2])),
    ]
    keys = {key, *(other.key for other in others)}
    monkeypatch.setitem(folds.SMALL, "train_mymodel", "--Epoch 4")
    assert len({*keys, same.key}) == 7


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
def test_a_replaced_input_repeats_a_run(simulated, tmp_path, what):
    """Under the same name: the key of a run is that of what the files hold."""
    data = shutil.copytree(simulated, tmp_path / "data")

    def key():
        accuracy_run.slice_key.cache_clear()
        fold = folds.given_folds(splits.read_table(data)[0])[0]
        return accuracy_run.Run(fold, 0, tiny(data, tmp_path / "out"), "none").key

    before = key()
    assert key() == before
    REPLACED[what](data)
    assert key() != before


def test_other_weights_repeat_a_run(run, tmp_path):
    (tmp_path / "a.pth").write_bytes(b"weights")
    runs = [run(), *(replace(run(), weights=weights) for weights in ("timm", str(tmp_path / "a.pth")))]
    keys = [one.key for one in runs]
    (tmp_path / "a.pth").write_bytes(b"others")
    assert len({*keys, runs[2].key}) == 4


def test_a_finished_run_is_not_repeated_and_one_of_another_key_is(run, monkeypatch, capsys):
    def do(self):
        record = {"key": self.key, "methods": {"magic": {"residuals": 0.1}}, "seconds": {"methods": 1.0}}
        accuracy_run.write_run(self.file, record)
        return record

    monkeypatch.setattr(accuracy_run.Run, "do", do)
    accuracy_run.finish(run())
    assert "there already" not in capsys.readouterr().out
    monkeypatch.setattr(accuracy_run.Run, "do", lambda self: pytest.fail("run again"))
    assert accuracy_run.finish(run())["methods"]["magic"]["residuals"] == 0.1
    assert "there already" in capsys.readouterr().out
    monkeypatch.setattr(accuracy_run.Run, "do", do)
    assert run(flags=("--allow_leak",)).finished() is None
    accuracy_run.finish(run(flags=("--allow_leak",)))
    assert capsys.readouterr().out.count("other data or settings: run again") == 1


def test_a_step_that_fails_raises_with_its_last_output(tmp_path):
    step = accuracy_run.Step("image_tilling", ("--data", str(tmp_path / "none")))
    with pytest.raises(ValueError, match=r"image_tilling.py ended with code 2: .*none.*image_tilling.log"):
        step.run(tmp_path / "image_tilling.log")


# ---- shuffled counts


def test_shuffling_moves_counts_with_their_totals_and_nothing_else(prepared, tmp_path):
    names = [path.name for path in sorted(prepared.panels.iterdir())]
    shutil.copytree(prepared.panels, tmp_path, dirs_exist_ok=True)
    folds.shuffle_panels(tmp_path, names)
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


def test_a_fraction_of_the_spots_is_shuffled_in_both_files_alike(prepared, tmp_path):
    name = min(path.name for path in prepared.panels.iterdir())
    shutil.copytree(prepared.panels, tmp_path, dirs_exist_ok=True)
    folds.shuffle_panels(tmp_path, [name], 0.3)
    moved = []
    for role in gene_panels.FILES:
        old, new = (anndata.read_h5ad(gene_panels.panel_path(p, None, name, role)) for p in (prepared.panels, tmp_path))
        moved.append((old.obs["total_counts"] != new.obs["total_counts"]).to_numpy())
        assert sorted(old.obs["total_counts"]) == sorted(new.obs["total_counts"])
    np.testing.assert_array_equal(*moved)
    assert 0.2 < moved[0].mean() <= 0.3


# ---- the table


def record_of(rng, seed, magic=0.2, ablation="default"):
    """A finished run as accuracy_run.py writes it."""
    scores = {name: 0.01 * i for i, name in enumerate(accuracy_table.METHODS)} | {"magic": magic, "knn": 0.1}
    figures = {name: dict.fromkeys(accuracy_table.FIGURES, score + 0.01 * seed) for name, score in scores.items()}
    figures["mean"] = dict.fromkeys(accuracy_table.FIGURES)
    gallery = dict.fromkeys(accuracy_table.GALLERY, 0.2 + seed / 10)
    noise = rng.normal(scale=500, size=2000)
    drawn = [name for name in accuracy_scores.DRAWN if name != "mean"]
    return {
        "fold": "P1",
        "seed": seed,
        "ablation": ablation,
        "rules": folds.RULES,
        "date": "2026-01-0" + str(seed + 1),
        "machine": "m",
        "methods": figures,
        "draws": {name: np.rint(1e5 * figures[name]["residuals"] + noise).astype(int).tolist() for name in drawn},
        "retrieval": {
            "neighbours": {"chance": 0.1, **gallery},
            "interval": {name: [0.1, 0.3 + seed / 10] for name in gallery},
            "R@10": 0.3,
            "R@10_chance": 0.1,
        },
        "losses": {"best": dict.fromkeys(accuracy_table.LOSSES, 2.0 + seed)},
        "sd_ratio": 0.3,
    }


def test_a_fold_is_means_over_seeds_with_the_difference_to_the_best_baseline(rng):
    records = [record_of(rng, seed) for seed in (0, 1, 2)]
    assert accuracy_table.best_baseline(records) == "knn"
    gain, ends = accuracy_table.difference(records, "magic", records, "knn")
    assert gain == pytest.approx(0.1) and ends == pytest.approx([0.1, 0.1], abs=1e-4)  # the same noise in both
    text = "\n".join(accuracy_table.fold_lines("P1", records, 3))
    assert text.startswith("### P1\n") and "| mean | - | - | - | - |" in text
    assert "| **magic** | 0.210 ± 0.010 | 0.210 ± 0.010 |" in text
    assert "neighbours (chance 0.100): depth 0.300 ± 0.100 [0.100, 0.400], contrastive" in text
    assert "R@10 0.300 ± 0.000 (chance 0.100)" in text
    assert "contrast 3 (chance 3), matching 3 (chance 3). Predicted over measured deviation of a gene: 0.3." in text


def test_markdown_states_what_its_intervals_hold_for_and_what_is_out_of_date(rng):
    record = record_of(rng, 0)
    text = accuracy_table.markdown({"P1": [record]}, " --small", n_seeds=2)
    assert "hold for these slices" in text and "--data DATA --small`, 2026-01-01, m." in text
    assert "### P1 (1 of 2 seeds)" in text and "| **magic** | 0.200 |" in text and "| mean | - |" in text
    assert "magic - knn, the best baseline, against residuals: +0.100 [+0.1" in text
    assert "Out of date" not in text and "shuffled" not in text
    old = record | {"rules": folds.RULES - 1}
    text = accuracy_table.markdown({"P1": [old]}, "", 1, shuffled=True)
    assert text.startswith("**Out of date**") and "expected of every method is 0" in text


def test_intervals_are_of_the_mean_over_seeds():
    one, other = np.arange(101.0), np.zeros(101)
    assert accuracy_table.interval([one, one + 2], [other, other]) == pytest.approx([3.5, 98.5])


def test_ablations_are_compared_with_the_default(rng):
    records = {"default": record_of(rng, 0), "no_queue": record_of(rng, 0, magic=0.15, ablation="no_queue")}
    rows = [line.strip("| ").split(" | ") for line in accuracy_table.ablation_markdown(records, "").splitlines()[-3:]]
    assert [row[:2] for row in rows] == [["default", "0.200"], ["no_queue", "0.150"], ["no_stage_one", "0.100"]]
    assert rows[0][2:] == ["0.200", "0.200", "0.200", "0.300"] and rows[2][3:6] == ["-", "-", "-"]
    gain, low, high = (float(word.strip("[,]")) for word in rows[1][6].split())
    assert gain == -0.05 and -0.08 < low < -0.05 < high < -0.02


@pytest.mark.parametrize("name, flags", [("accuracy", []), ("ablations", ["--small", "--ablations"])])
def test_the_tables_of_results_md_are_those_of_the_kept_runs(name, flags, capsys):
    accuracy.main(accuracy.parse_args(["--table", *flags]))
    text, mark = capsys.readouterr().out.strip(), f"<!-- table: {name} -->"
    assert accuracy.RESULTS.read_text().split(mark)[1].strip() == text


def test_flags_that_exclude_each_other_and_unknown_folds_are_refused(simulated, tmp_path):
    for flags in (("--ablations",), ("--only", "given", "x"), ("--table",)):
        with pytest.raises(ValueError, match=flags[0]):
            tiny(simulated, tmp_path, *flags)
    with pytest.raises(ValueError, match="--data"):
        accuracy.check(accuracy.parse_args([]))
    with pytest.raises(ValueError, match=r"--runs .*found none"):
        accuracy.main(accuracy.parse_args(["--table", "--runs", str(tmp_path)]))
    with pytest.raises(ValueError, match="--only C_to_B: expected one of given"):
        accuracy.main(tiny(simulated, tmp_path, "--only", "C_to_B", "0"))


@pytest.mark.slow
def test_a_whole_run_from_slices_to_the_table(simulated, tmp_path, capsys):
    accuracy.main(tiny(simulated, tmp_path))
    record = json.loads((tmp_path / "runs" / "given_seed0_test_vit_32px_small.json").read_text())
    assert set(record["methods"]) == set(accuracy_table.METHODS)
    known = [figures["residuals"] for name, figures in record["methods"].items() if name != "mean"]
    assert all(-1 < score < 1 for score in known) and record["methods"]["ridge"]["residuals"] > 0.05
    assert all(len(draws) == 2000 for draws in record["draws"].values())
    assert str(tmp_path) not in json.dumps(record)
    assert (tmp_path / "accuracy.md").read_text().count("| **magic** |") == 1
    capsys.readouterr()
    accuracy.main(tiny(simulated, tmp_path))
    assert "there already" in capsys.readouterr().out
