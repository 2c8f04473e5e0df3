"""Is a slide that is unlike the training data noticed, and do the intervals hold the measured values?

    python benchmarks/domain.py --data data/Breast_cancer --out results/domain
    python benchmarks/domain.py --part intervals --data data/Breast_cancer --out results/domain \\
        --decoder decoder_model/best_epoch_weights.pth --held_out C5 --unseen B4

Part scores needs no trained model: a score depends on the pixels of the tiles alone. On the slices of --data every one
in turn is held out from a model of two others, calibrated on a third; on simulated slices models of three patients are
calibrated on a fourth. Held-out crops of 60 spots are then spoilt in ways that a slide is in practice. Part intervals
predicts the slices of one model by predict_slide.py. Writes OUT/scores.json, OUT/intervals.json, the tables of
docs/prediction.md, and with --keep puts them there.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import domain_kinds as kinds
from benchmarks.record import machine_name, put_into, table_lines
from utils import arguments
from utils import settings as shared_settings
from utils.files.atomic import write_figure, write_record, write_whole
from utils.slices import splits, visium
from utils.slices.lattice import nearest_px

if TYPE_CHECKING:
    from utils.features.domain import Domain

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "prediction.md"
TILE_UM, TILE_PX = 310.0, 224
CROP = 60  # spots of a unit
SIMULATED: dict[str, Any] = {"n_patients": 5, "n_spots": 90, "n_genes": 60, "slices_per_patient": 2}
DRAWS = 2000


@dataclass(frozen=True, kw_only=True)
class Settings:
    data: Path | None
    out: Path
    part: str
    seed: int
    tile_px: int
    decoder: Path
    held_out: str | None
    unseen: str | None
    keep: bool
    debug: bool


def parse_args(argv: list[str] | None = None) -> Settings:
    parser = arguments.Parser(__doc__)
    parser.add_argument("--data", type=Path, help="folder of four slices or more of one patient; simulated ones alone")
    parser.add_argument("--out", type=Path, default=Path("results/domain"))
    parser.add_argument("--part", choices=["scores", "intervals"], default="scores")
    parser.add_argument("--seed", type=arguments.count_or_zero, default=0)
    parser.add_argument("--tile_px", type=arguments.count, default=TILE_PX, help="side of the tiles, pixels")
    parser.add_argument("--decoder", type=Path, default=Path("decoder_model/best_epoch_weights.pth"))
    parser.add_argument("--held_out", help="slice of a patient that the decoder was trained on")
    parser.add_argument("--unseen", help="slice of another patient")
    parser.add_argument("--keep", action="store_true", help="put tables and plot into docs/")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return Settings(**vars(parser.parse_args(argv)))


# ---- scores: statistics of tiles


@dataclass(frozen=True)
class Section:
    """A slice: its image, and where its spots are in pixels of it."""

    name: str
    patient: str
    path: Path
    xy_px: np.ndarray  # (S, 2)
    um_per_px: float


def sections_of(data: Path) -> list[Section]:
    rows, warnings = splits.read_table(data, split=False)
    shared_settings.warn(warnings)
    return [section(splits.slice_folder(data, row), row) for row in rows]


def section(folder: Path, row: splits.SliceRow) -> Section:
    slice_ = visium.open_slice(folder, row.slice)
    image = slice_.source_image()
    xy = slice_.spots[list(visium.POSITIONS_PX)].to_numpy(float) * image.scale
    pitch_um = row.spot_pitch_um or visium.VISIUM_PITCH_UM
    return Section(row.slice, row.patient, image.path, xy, pitch_um / (slice_.pitch_px * image.scale))


def crop_of(section_: Section, seed: int, n: int = CROP) -> np.ndarray:
    """Rows (n,) of the spots nearest to one that is drawn."""
    centre = section_.xy_px[np.random.default_rng(seed).integers(len(section_.xy_px))]
    return np.argsort(np.linalg.norm(section_.xy_px - centre, axis=1), kind="stable")[:n]


def statistics(pixels: np.ndarray, xy_px: np.ndarray, side_px: float, tile_px: int) -> np.ndarray:
    """Statistics (S, K) of the tiles around spots of an image (h, w, 3), cut as predict_slide.py cuts them."""
    import torch

    from model.domain import tile_statistics
    from utils.features.cache import to_float
    from utils.images.tiles import Cut, cut_tiles

    cut = Cut("fullres", "", None, side_px, tile_px, resampled=True)
    with kinds.in_memory(pixels) as image:
        batches = cut_tiles(image, xy_px, cut, 32, 1)
        return np.concatenate([tile_statistics(to_float(torch.from_numpy(b), tile_px)).numpy() for b in batches])


def clean_statistics(section_: Section, tile_px: int) -> np.ndarray:
    """Of all spots of a slice."""
    return statistics(kinds.read(section_.path), section_.xy_px, TILE_UM / section_.um_per_px, tile_px)


def spoilt_statistics(section_: Section, rows: np.ndarray, settings: Settings) -> dict[str, np.ndarray]:
    """By kind, of the spots of a crop that it affects (n, K)."""
    side, tile_px = TILE_UM / section_.um_per_px, settings.tile_px
    xy, pixels = kinds.region(kinds.read(section_.path), section_.xy_px[rows], 1.1 * side)
    found = {}
    for name, spoil in kinds.KINDS.items():
        rng = np.random.default_rng(settings.seed)
        spoilt = spoil(pixels, section_.um_per_px, rng)
        found[name] = statistics(spoilt, xy, side, tile_px)
        if name in kinds.LOCAL:
            changed = kinds.changed(pixels, spoilt, xy, side)
            found[name] = found[name][changed >= kinds.AFFECTED]
    for name, factor in kinds.SCALES.items():
        found[name] = statistics(pixels, xy, factor * side, tile_px)
    glass = kinds.glass_spots(kinds.read(section_.path), side)
    if len(glass):
        found["glass"] = statistics(kinds.read(section_.path), glass[:CROP], side, tile_px)
    return found


@dataclass(frozen=True)
class Model:
    """What is fitted, and which sections it is tested on: others of its patients, and other patients'."""

    train: tuple[str, ...]
    calibrate: str
    held_out: tuple[str, ...]
    unseen: tuple[str, ...]


def real_models(sections: list[Section]) -> list[Model]:
    """Each section of the patient with the most of them is held out once; the next one (cyclic) calibrates, the two
    after it train."""
    patients = [s.patient for s in sections]
    own = max(sorted(set(patients)), key=patients.count)
    names = [s.name for s in sections if s.patient == own]
    if len(names) < 4:
        raise ValueError(f"--data: expected four slices of one patient at least, found {len(names)}; give more slices")
    others = tuple(s.name for s in sections if s.patient != own)
    n = len(names)
    return [Model((names[(i + 2) % n], names[(i + 3) % n]), names[(i + 1) % n], (names[i],), others) for i in range(n)]


def simulated_models(sections: list[Section]) -> list[Model]:
    """One model of the first slices of three patients, calibrated on a fourth; the second slices are held out."""
    patients = sorted({s.patient for s in sections})
    first, second = ([s.name for s in sections if s.name.endswith(end)] for end in ("_1", "_2"))
    unseen = tuple(s.name for s in sections if s.patient in patients[4:])
    return [Model(tuple(first[:3]), first[3], tuple(second[:3]), unseen)]


def fit(model: Model, clean: dict[str, np.ndarray], seed: int) -> Domain:
    from types import SimpleNamespace

    from utils.features import domain

    def spots(name: str, part: str) -> Any:
        return SimpleNamespace(rows_of=lambda p: np.arange(len(clean[name]) if p == part else 0))

    slices = [*(spots(name, "train") for name in model.train), spots(model.calibrate, "val")]
    return domain.fit(slices, [clean[name] for name in (*model.train, model.calibrate)], seed)[0]


def unit(kind: str, model: str, slice_: str, values: np.ndarray, fitted: Domain) -> dict[str, Any]:
    """Scores of one unit, a crop or a slice."""
    from utils.features import domain
    from utils.prediction import trust

    score, of_slide = domain.scores(values, fitted)
    flagged = float((score > 1).mean())
    warned = bool(flagged > trust.MOST_FLAGGED or of_slide > 1)
    about = {"kind": kind, "model": model, "slice": slice_, "n_spots": len(score)}
    return about | {"flagged": flagged, "slide_score": of_slide, "warned": warned}


def score_units(settings: Settings) -> list[dict[str, Any]]:
    """All units of all models: clean slices and crops, and each kind that spoils a crop."""
    groups = {"simulated": simulated_sections(settings)}
    if settings.data is not None:
        groups = {"real": sections_of(settings.data)} | groups
    clean = {s.name: clean_statistics(s, settings.tile_px) for group in groups.values() for s in group}
    spoilt: dict[str, dict[str, np.ndarray]] = {}
    units = []
    for group, sections in groups.items():
        by_name = {s.name: s for s in sections}
        for model in real_models(sections) if group == "real" else simulated_models(sections):
            fitted = fit(model, clean, settings.seed)
            for name in model.held_out:
                rows = crop_of(by_name[name], settings.seed)
                units.append(unit("clean slice", group, name, clean[name], fitted))
                units.append(unit("clean", group, name, clean[name][rows], fitted))
                spoilt[name] = spoilt.get(name) or spoilt_statistics(by_name[name], rows, settings)
                units += [unit(kind, group, name, v, fitted) for kind, v in spoilt[name].items() if len(v)]
                print(f"{group}: {name} done", flush=True)
            units += [unit("another patient", group, name, clean[name], fitted) for name in model.unseen]
            for other, foreign in groups.items():
                if other != group:
                    crops = {s.name: clean[s.name][crop_of(s, settings.seed)] for s in foreign}
                    units += [unit(f"{other}, not {group}", group, name, v, fitted) for name, v in crops.items()]
    return units


def simulated_sections(settings: Settings) -> list[Section]:
    """Simulated slices in OUT/simulated, written there where they are missing."""
    from utils.simulation.slices import write_slices

    folder = settings.out / "simulated"
    if not (folder / "slices.csv").exists():
        write_slices(folder, **SIMULATED, seed=settings.seed)
    return sections_of(folder)


# ---- scores: figures


def by_slide(units: list[dict[str, Any]], figure: Callable[[list[dict[str, Any]]], float], seed: int) -> list[float]:
    """95 % interval of a figure over bootstrap draws of slices."""
    slices, rng = sorted({u["slice"] for u in units}), np.random.default_rng(seed)
    of_slice = {name: [u for u in units if u["slice"] == name] for name in slices}
    draws = [[u for name in rng.choice(slices, len(slices)) for u in of_slice[name]] for _ in range(DRAWS)]
    return [float(value) for value in np.quantile([figure(draw) for draw in draws], [0.025, 0.975])]


def summarise(units: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """A line per model and kind: fraction of spots flagged, and AUROC of the slide's score against clean crops."""
    import torch

    from model import losses

    def scores(some: list[dict[str, Any]]) -> torch.Tensor:
        return torch.tensor([u["slide_score"] for u in some], dtype=torch.float64)

    lines = []
    for group in dict.fromkeys(u["model"] for u in units):
        own = [u for u in units if u["model"] == group]
        negative = scores([u for u in own if u["kind"] == "clean"])
        for kind in dict.fromkeys(u["kind"] for u in own):
            chosen = [u for u in own if u["kind"] == kind]

            def flagged(some: list[dict[str, Any]]) -> float:
                return float(np.mean([u["flagged"] for u in some]))

            def separated(some: list[dict[str, Any]], clean: torch.Tensor = negative) -> float:
                return float(losses.pair_auc(scores(some), clean))

            line = {"model": group, "kind": kind, "n_units": len(chosen), "flagged": flagged(chosen)}
            line |= {"flagged_interval": by_slide(chosen, flagged, seed), "warned": sum(u["warned"] for u in chosen)}
            if not kind.startswith("clean"):
                line |= {"auroc": separated(chosen), "auroc_interval": by_slide(chosen, separated, seed)}
            lines.append(line)
    return lines


def score_table(lines: list[dict[str, Any]]) -> str:
    head = ["tested on", "model of", "units", "spots flagged", "slide AUROC", "units warned of"]
    rows = []
    for line in lines:
        low, high = line["flagged_interval"]
        separated = "-"
        if "auroc" in line:
            separated = f"{line['auroc']:.2f} [{line['auroc_interval'][0]:.2f}, {line['auroc_interval'][1]:.2f}]"
        cells = [kinds.LABELS.get(line["kind"], line["kind"]), line["model"], str(line["n_units"])]
        cells += [f"{line['flagged']:.0%} [{low:.0%}, {high:.0%}]"]
        cells += [separated, str(line["warned"])]
        rows.append(cells)
    return "\n".join(table_lines(head, rows))


# ---- intervals


def predicted(settings: Settings, name: str) -> Any:
    """A slice of --data as predict_slide.py predicts it: its predictions.h5ad."""
    import anndata

    import predict_slide

    assert settings.data is not None
    rows, _ = splits.read_table(settings.data, split=False)
    row = next((row for row in rows if row.slice == name), None)
    if row is None:
        raise ValueError(f"--data: expected the slice {name}, found {', '.join(r.slice for r in rows)}")
    out = settings.out / "predicted" / name
    argv = [str(splits.slice_folder(settings.data, row)), "--decoder", str(settings.decoder), "--out", str(out)]
    argv += ["--maps", "0"] + (["--spot_pitch_um", f"{row.spot_pitch_um:g}"] if row.spot_pitch_um else [])
    predict_slide.main(predict_slide.parse_args(argv))
    return anndata.read_h5ad(out / "predictions.h5ad")


def interval_line(adata: Any, ends: dict[str, np.ndarray], tested_on: str, seed: int) -> dict[str, Any]:
    """Coverage, mean over genes, with its interval over blocks of spots, and mean width: of the intervals of a slice,
    and of those that use no prediction."""
    from utils.evaluation import bootstrap, intervals

    measured = adata.layers["measured"]
    xy = adata.obsm["spatial"]
    blocks = bootstrap.blocks(xy, float(np.median(nearest_px(xy))))
    line: dict[str, Any] = {"tested on": tested_on, "n_spots": adata.n_obs, "n_genes": adata.n_vars}
    shape = np.ones(adata.shape)
    both = {
        "intervals": (adata.layers["interval_low"], adata.layers["interval_high"]),
        "unconditional": (shape * ends["measured_low"], shape * ends["measured_high"]),
    }
    for name, (low, high) in both.items():
        covered = intervals.coverage(measured, low, high)
        line[name] = {
            "coverage": float(covered.mean()),
            "interval": list(bootstrap.block_bootstrap_interval(covered, blocks, DRAWS, seed=seed)),
            "width": float(np.nanmean(high - low)),
        }
    inside = (measured >= both["intervals"][0]) & (measured <= both["intervals"][1])
    per_gene = inside.mean(0)
    line["genes_below_.85"] = float((per_gene < 0.85).mean())
    return line


def score_and_error(adata: Any, sd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Score (S,) of each spot, and its error: root mean square over genes, in deviations of the train spots."""
    error = (adata.layers["measured"] - adata.X) / sd
    return adata.obs["domain_score"].to_numpy(), np.sqrt(np.nanmean(error**2, axis=1))


def interval_figures(settings: Settings) -> dict[str, Any]:
    from scipy.stats import spearmanr

    from utils.training import checkpoint

    state = checkpoint.load(settings.decoder, "stage_two", "--decoder")
    ends = {name: values.numpy() for name, values in state["interval"].items()}
    sd = state["model"]["target_sd"].numpy()
    lines, points = [], {}
    for kind, name in (("another slice of a trained patient", settings.held_out), ("another patient", settings.unseen)):
        if name is not None:
            adata = predicted(settings, name)
            lines.append(interval_line(adata, ends, f"{name}, {kind}", settings.seed))
            points[name] = score_and_error(adata, sd)
            lines[-1]["score_error_spearman"] = float(spearmanr(*points[name]).statistic)
            lines[-1]["flagged"] = float(adata.obs["out_of_domain"].mean())
    draw_error(settings.out / "score_error.png", points)
    return {"level": float(ends["level"]), "calibration_spots": int(ends["n_spots"]), "lines": lines}


def draw_error(path: Path, points: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Error of each spot against its score, and the median of the error in tenths of the spots by score."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5.5, 4), layout="constrained")
    for name, (score, error) in points.items():
        dots = axes.scatter(score, error, s=6, alpha=0.35, linewidths=0)
        tenths = np.array_split(np.argsort(score), 10)
        medians = [(np.median(score[t]), np.median(error[t])) for t in tenths if len(t)]
        axes.plot(*zip(*medians, strict=True), "o-", color=np.asarray(dots.get_facecolor())[0, :3], label=name)
    axes.axvline(1, color="grey", linestyle=":", label="limit")
    axes.set(xscale="log", xlabel="out-of-domain score", ylabel="error of the spot (deviations of the gene)")
    axes.legend()
    write_figure(path, figure)


def interval_table(figures: dict[str, Any]) -> str:
    head = ["tested on", "spots", "coverage", "mean width", "coverage without prediction", "its width", "rho"]
    rows = []
    for line in figures["lines"]:
        cells = [line["tested on"], str(line["n_spots"])]
        for name in ("intervals", "unconditional"):
            low, high = line[name]["interval"]
            cells += [f"{line[name]['coverage']:.3f} [{low:.3f}, {high:.3f}]", f"{line[name]['width']:.2f}"]
        rows.append([*cells, f"{line['score_error_spearman']:.2f}"])
    return "\n".join(table_lines(head, rows))


# ---- main


def check(settings: Settings) -> None:
    if settings.part == "intervals" and (settings.data is None or settings.held_out is None):
        raise ValueError("--part intervals: expected --data and --held_out, found one missing; name a slice of --data")


def main(settings: Settings) -> None:
    check(settings)
    about = {"date": date.today().isoformat(), "machine": machine_name("cpu"), "seed": settings.seed}
    settings.out.mkdir(parents=True, exist_ok=True)
    if settings.part == "scores":
        units = score_units(settings)
        lines = summarise(units, settings.seed)
        table, figures = score_table(lines), {"lines": lines, "units": units}
    else:
        figures = interval_figures(settings)
        table = interval_table(figures)
    write_record(settings.out / f"{settings.part}.json", about | figures)
    text = f"{table}\n\nSeed {settings.seed}, {about['date']}, {about['machine']}."
    write_whole(settings.out / f"{settings.part}.md", (text + "\n").encode())
    print(json.dumps(figures["lines"], indent=1) if settings.debug else text)
    if settings.keep:
        put_into(PAGE, settings.part, text)
        if settings.part == "intervals":
            write_whole(ROOT / "docs" / "score_error.png", (settings.out / "score_error.png").read_bytes())


if __name__ == "__main__":
    shared_settings.run(main, parse_args())
