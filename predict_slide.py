"""Predict expression on slides where nothing was measured: whole-slide images, or slice folders with or without counts.

    python predict_slide.py slide.svs --out predicted --decoder decoder_model/best_epoch_weights.pth
    python predict_slide.py slide.tif --out predicted --um_per_px 0.5 --prediction_std
    python predict_slide.py cohort.csv --out predicted            # columns slide,um_per_px,positions,mask,spot_pitch_um

Finds the tissue, puts spots on a grid (or on given positions), cuts, encodes and drops their tiles one batch after the
other. Writes per slide predictions.h5ad, .csv, .geojson (QuPath), maps/, report.html and, last, settings.json: a slide
that has it is not predicted again. Of a slice with counts metrics.json and genes.csv too.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from utils import arguments, distributed, settings
from utils.files import atomic, exclusive
from utils.files.atomic import write_record, write_whole
from utils.prediction import slides as slide_list
from utils.training import checkpoint, split
from utils.words import count_of

if TYPE_CHECKING:
    import pandas as pd

    from utils.images.image import TissueImage
    from utils.prediction.layout import Plan, SlideSpots
    from utils.prediction.measured import MeasuredGenes
    from utils.prediction.members import Run
    from utils.prediction.predict import SlidePrediction

SETTINGS, FEATURES = "settings.json", "features"
RESULT_FLAGS = ("grid", "prediction_std", "maps", "spatialdata", "precision")  # another value gives other files


@dataclass(kw_only=True)
class Settings:
    slides: list[Path]
    um_per_px: float | None
    positions: Path | None
    mask: Path | None
    spot_pitch_um: float | None
    huge: bool
    grid: str | None
    decoder: list[Path]
    prediction_std: bool
    batch_size: int
    precision: str
    out: Path
    maps: int
    spatialdata: bool
    shard: tuple[int, int]
    device: str
    workers: int | None
    memory: float
    debug: bool


def parse_args(argv: list[str] | None = None) -> Settings:
    parser = arguments.Parser(__doc__)
    parser.add_argument("slides", nargs="+", type=Path, metavar="SLIDE", help="images, slice folders, tables (.csv)")
    group = parser.add_argument_group("slides")
    group.add_argument("--um_per_px", type=arguments.positive, help="um per pixel of the image, if it lacks it")
    group.add_argument("--positions", type=Path, help="Space Ranger positions of the spots, in place of a grid")
    group.add_argument("--mask", type=Path, help="image of any size; pixels above zero are tissue")
    group.add_argument(
        "--spot_pitch_um", type=arguments.positive, help="um between spots (default: the model's, or that of the slice)"
    )
    group.add_argument("--huge", action="store_true", help="accept large images that are decoded as a whole")
    group.add_argument("--grid", choices=["hexagonal", "square"], help="of the spots (default: the model's)")
    group = parser.add_argument_group("prediction")
    decoder = [Path("decoder_model/best_epoch_weights.pth")]
    group.add_argument(
        "--decoder",
        type=Path,
        nargs="+",
        default=decoder,
        help="checkpoint of stage two; of several the mean and the deviation are predicted",
    )
    group.add_argument(
        "--prediction_std",
        action="store_true",
        help="standard deviation over 8 flipped and rotated tiles; 9 x the time, 2 x of a model with --tta 8. It is no "
        "error bar: the layers interval_low and interval_high, which are always written, hold the measured value at a "
        "stated rate",
    )
    group.add_argument("--batch_size", type=arguments.count, default=32, help="spots encoded at a time")
    group.add_argument(
        "--precision",
        choices=["auto", "fp32", "bf16", "fp16"],
        default="auto",
        help="auto: bf16 if the hardware has it",
    )
    group = parser.add_argument_group("results")
    group.add_argument("--out", type=Path, required=True, help="one slide: its folder; several: a folder each below it")
    group.add_argument("--maps", type=arguments.count_or_zero, default=12, help="genes to draw, best by validation PCC")
    group.add_argument("--spatialdata", action="store_true", help="also predictions.zarr; needs spatialdata")
    group = parser.add_argument_group("machine")
    group.add_argument(
        "--shard", type=arguments.shard, default=(0, 1), help="I/N: every N-th slide from the I-th on (default: all)"
    )
    group.add_argument(
        "--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: CUDA if there is a device"
    )
    group.add_argument("--workers", type=arguments.count_or_zero, help="threads that cut tiles (default: up to 4)")
    settings.add_memory(parser)
    group.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return Settings(**vars(parser.parse_args(argv)))


def check_flags(args: Settings) -> None:
    """Checks between flags and of files, before anything heavy is imported."""
    if args.prediction_std and len(args.decoder) > 1:
        raise ValueError(
            f"--prediction_std: expected one --decoder, found {len(args.decoder)}, whose own deviation is given; leave "
            "--prediction_std out"
        )
    if args.spatialdata and importlib.util.find_spec("spatialdata") is None:
        raise ValueError("--spatialdata: expected the package spatialdata, found none; pip install spatialdata")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("expected one process, found a launcher's several; start one a GPU, each with its --shard I/N")
    for path in args.decoder:
        checkpoint.require_checkpoint(path, "--decoder", "run train_decoder.py first")


def result_key(planned: Plan, run: Run, args: Settings) -> dict[str, Any]:
    """What the results of a slide depend on: a slide whose record has the same key is not predicted again."""
    from utils.prediction.slide_features import fingerprint

    given = {name: getattr(planned.request, name) for name in ("um_per_px", "spot_pitch_um")}
    flags = {name: getattr(args, name) for name in RESULT_FLAGS}
    decoders = [member.file_hash for member in run.members]
    return {"decoders": decoders, "files": fingerprint(planned.files), **given, **flags}


def is_done(out: Path, key: dict[str, Any]) -> bool:
    try:
        return json.loads((out / SETTINGS).read_text())["key"] == key
    except (OSError, ValueError, KeyError):
        return False


def read_measured(planned: Plan, spots: SlideSpots, run: Run) -> MeasuredGenes | None:
    """What was measured on the spots; None without counts, or with positions other than those of the counts."""
    from utils.prediction import measured

    if planned.slice_ is None or planned.request.positions is not None:
        return None
    found = measured.read_measured(planned.slice_, run.members[0].state["genes"], spots.barcodes, run.memory * 2**30)
    if found and any(found.content in member.state["counts_hashes"].values() for member in run.members):
        print(f"warning: {spots.name}: the model was trained on this slice: its metrics do not hold for new slides")
    return found


def evaluate(
    out: Path, measured_genes: MeasuredGenes, predicted: np.ndarray, val_pcc: np.ndarray, run: Run
) -> tuple[dict[str, Any], pd.DataFrame]:
    """Writes metrics.json and genes.csv of a slice with counts; returns both."""
    from utils.prediction import measured

    mean = np.mean([member.model.target_mean.cpu().numpy() for member in run.members], axis=0)
    metrics, table = measured.evaluate(measured_genes, predicted, mean, val_pcc, run.members[0].state)
    write_record(out / "metrics.json", metrics)
    write_whole(out / "genes.csv", table.to_csv(index=False).encode())
    return metrics, table


def describe(
    planned: Plan, spots: SlideSpots, image: TissueImage, prediction: SlidePrediction, run: Run, decoders: list[Path]
) -> dict[str, Any]:
    """Plain values that go with the results."""
    from utils.prediction import trust

    states = [member.state for member in run.members]
    return {
        "slide": str(planned.request.slide),
        "image": str(planned.source.path),
        "image_px": [image.width, image.height],
        "um_per_fullres_px": spots.um_per_fullres_px,
        "spot_pitch_fullres_px": spots.pitch_fullres_px,
        "n_spots": len(spots.barcodes),
        "decoders": [str(path) for path in decoders],
        "domain": trust.domain_of(prediction.domain_score, prediction.slide_score, spots.tissue_fraction, states),
        "genes": trust.genes_of(states),
    }


def predict_image(
    planned: Plan, run: Run, args: Settings
) -> tuple[SlideSpots, tuple[np.ndarray, float], SlidePrediction, dict[str, Any]]:
    """Spots laid on the image, its thumbnail and the scale of that, what is predicted, and a record of all."""
    from utils.images.image import open_image
    from utils.prediction import layout, predict

    request, first = planned.request, run.members[0]
    with open_image(planned.source.path, planned.um_per_image_px, args.huge) as image:
        for note in image.notes:
            print(f"{request.name}: {planned.source.path.name}: {note}")
        thumbnail, scale = image.thumbnail()
        tile_um = first.tile_px * first.um_per_px
        spots = layout.place_spots(planned, image, thumbnail, scale, args.grid or first.state["grid"], tile_um)
        layout.warn_of_pitch(spots, first.state["spot_pitch_um"])
        predicted = predict.predict_slide(run, image, spots, request.out / FEATURES)
        about = describe(planned, spots, image, predicted, run, args.decoder)
    about["leak"] = [leak for member in run.members for leak in split.leaks_of_table(member.state)]
    return spots, (thumbnail, scale), predicted, about


def predict_one(planned: Plan, key: dict[str, Any], run: Run, args: Settings) -> None:
    """One slide, from its image to all its files; the record that marks it as done comes last."""
    from utils.prediction import outputs, trust
    from utils.report import anndata_files

    out, state = planned.request.out, run.members[0].state
    spots, (thumbnail, scale), predicted, about = predict_image(planned, run, args)
    if about["domain"]["warned"]:
        print(f"warning: {spots.name}: {about['domain']['verdict']}")
    (out / SETTINGS).unlink(missing_ok=True)  # results of two runs never stand under one record
    metrics: dict | None = None
    extra: dict[str, Any] = {}
    val_pcc = np.mean([member.state["val_pcc"].numpy() for member in run.members], axis=0)
    found = read_measured(planned, spots, run)
    if found is not None:
        metrics, table = evaluate(out, found, predicted.predicted, val_pcc, run)
        extra = {"measured": found.in_scale(state["target"]), "counts": found.counts}
        extra |= {"total_counts": found.total_counts, "gene_table": table}
    prediction = outputs.Prediction(
        spots=spots,
        genes=state["genes"],
        target=state["target"],
        val_pcc=val_pcc,
        image=thumbnail,
        image_scale=scale * spots.image_scale,
        about=about,
        predicted=predicted.predicted,
        prediction_std=predicted.prediction_std,
        interval=predicted.interval,
        domain_score=predicted.domain_score,
        left_out_pcc=trust.left_out_pcc(run.members),
        lognorm=anndata_files.predicted_lognorm([member.state for member in run.members], predicted.predicted),
        model_hash=run.model_hash,
        **extra,
    )
    flags = atomic.plain(vars(args))
    outputs.write_all(out, prediction, metrics, flags | about, args.maps)
    if args.spatialdata:
        outputs.write_spatialdata(out / "predictions.zarr", prediction)
    write_record(out / SETTINGS, {"key": key, "settings": flags, **about})
    shutil.rmtree(out / FEATURES)
    print(f"{spots.name}: {count_of(len(spots.barcodes), 'spot')}, {count_of(len(prediction.genes), 'gene')} in {out}")


def predict_request(request: slide_list.Request, run: Run, args: Settings) -> None:
    from utils.prediction import layout

    planned = layout.plan(request, run.members[0].state["spot_pitch_um"])
    key = result_key(planned, run, args)
    if is_done(request.out, key):
        print(f"{request.name}: done already, in {request.out}")
        return
    with exclusive.exclusive(request.out, "--out"):
        predict_one(planned, key, run, args)


def predict_all(requests: list[slide_list.Request], run: Run, args: Settings) -> None:
    """Slides one after the other. Raises ValueError that names those which failed, once the others are done."""
    failed = []
    for request in requests:
        try:
            predict_request(request, run, args)
        except Exception as error:  # one corrupt or large file must not end a night's work on the others
            line = settings.line_of(error)
            if len(requests) == 1 or line is None:
                raise
            failed.append(f"{request.name} ({line})")
            print(f"{request.name}: left out: {line}", flush=True)
    if failed:
        raise ValueError(f"{len(failed)} of {len(requests)} slides could not be predicted: {'; '.join(failed)}")


def main(args: Settings) -> None:
    check_flags(args)
    given = slide_list.Request(Path(), args.um_per_px, args.positions, args.mask, args.spot_pitch_um)
    slides = slide_list.list_slides(args.slides, args.out, given)
    requests = arguments.of_shard(slides, args.shard, "slides")
    if not requests:
        return
    from utils.prediction import members

    states = members.read_checkpoints(args.decoder)
    settings.warn(members.leak_warnings(args.decoder, states))
    with distributed.running(args.device, args.precision) as accelerator:
        loaded = members.load_members(args.decoder, states, accelerator.device)
        del states  # the weights are on the device
        how = (args.precision, args.batch_size, args.workers, args.memory, args.prediction_std)
        predict_all(requests, members.Run(loaded, accelerator, *how), args)


if __name__ == "__main__":
    settings.run(main, parse_args())
