"""Predict expression on slides where nothing was measured: whole-slide images, or slice folders with or without counts.

    python predict_slide.py slide.svs --out predicted --decoder decoder_model/best_epoch_weights.pth
    python predict_slide.py slide.tif --out predicted --um_per_px 0.5 --spread
    python predict_slide.py cohort.csv --out predicted            # columns slide,um_per_px,positions,mask,spot_pitch_um

Finds the tissue, lays spots on a grid (or on given positions), cuts, encodes and drops their tiles one batch after the
other. Writes per slide predictions.h5ad, .csv, .geojson (QuPath), maps/, report.html and, last, settings.json: a slide
that has it is not predicted again. Of a slice with counts metrics.json and genes.csv too.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
from pathlib import Path

import numpy as np

from utils import distributed, settings
from utils.files import atomic, exclusive
from utils.files.atomic import write_record, write_whole
from utils.prediction import layout, measured, outputs
from utils.prediction import slides as slide_list
from utils.training import checkpoint

SETTINGS, FEATURES = "settings.json", "features"
RESULT_FLAGS = ("grid", "spread", "maps", "spatialdata", "precision")  # another value of them gives other files


def parse_args(argv=None):
    form = argparse.RawDescriptionHelpFormatter
    parser = settings.Parser(description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.add_argument("slides", nargs="+", type=Path, metavar="SLIDE", help="images, slice folders, tables (.csv)")
    group = parser.add_argument_group("slides")
    group.add_argument("--um_per_px", type=settings.positive, help="of the full-resolution image, if it does not say")
    group.add_argument("--positions", type=Path, help="Space Ranger positions of the spots, in place of a grid")
    group.add_argument("--mask", type=Path, help="image of any size, above zero where there is tissue")
    group.add_argument(
        "--spot_pitch_um", type=settings.positive, help="um between spots (default: 100, a slice's its own)"
    )
    group.add_argument("--huge", action="store_true", help="allow large images that are decoded as a whole")
    group.add_argument("--grid", choices=["hexagonal", "square"], default="hexagonal", help="of the spots (hexagonal)")
    group = parser.add_argument_group("prediction")
    group.add_argument(
        "--decoder",
        type=Path,
        nargs="+",
        default=[Path("decoder_model/best_epoch_weights.pth")],
        help="stage two; of several the mean is predicted, and their deviation is its spread",
    )
    group.add_argument("--spread", action="store_true", help="deviation over 8 turned views of a tile: 9 x the time")
    group.add_argument("--batch_size", type=settings.count, default=32, help="spots encoded at a time")
    group.add_argument("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto")
    group = parser.add_argument_group("results")
    group.add_argument("--out", type=Path, required=True, help="one slide: its folder; several: a folder each below it")
    group.add_argument("--maps", type=settings.count_or_zero, default=12, help="genes drawn, best by validation PCC")
    group.add_argument("--spatialdata", action="store_true", help="predictions.zarr too (needs spatialdata)")
    group = parser.add_argument_group("machine")
    group.add_argument("--shard", help="I/N: every N-th slide from the I-th on (default: Slurm's array, a launcher's)")
    group.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    group.add_argument("--workers", type=settings.count_or_zero, help="that cut tiles (default: up to 4)")
    settings.add_memory(parser)
    group.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    try:
        args.shard = slide_list.shard_of(args.shard, os.environ)
    except ValueError as error:
        parser.error(str(error))
    slide_list.work_alone(os.environ)
    return args


def read_checkpoints(paths: list[Path]) -> list[dict]:
    """Of one panel, in one unit, and of tiles of a stated scale."""
    states = [checkpoint.load(path, "stage_two", "--decoder") for path in paths]
    for path, state in zip(paths, states, strict=True):
        for what in ("genes", "target"):
            if state[what] != states[0][what]:
                raise ValueError(f"--decoder: {path} has other {what} than {paths[0]}; an ensemble shares them")
        if state["tile_scale"][1] is None:
            raise ValueError(
                f"--decoder: {path} was trained on tiles without scale (--crop_size), which cannot be cut from another "
                "slide; train on tiles of image_tilling.py --tile_um"
            )
    return states


def load_run(states: list[dict], accelerator, args):
    """All models on the device, and how they are run."""
    from model.stage_two import StageTwo, StageTwoSizes, domain_score
    from utils.prediction.predict import Member, Run

    members = []
    for path, state in zip(args.decoder, states, strict=True):
        model = StageTwo(StageTwoSizes(**state["sizes"]))
        checkpoint.fit(model, state.pop("model"), path, "--decoder")
        members.append(Member(model.to(accelerator.device).eval(), state, checkpoint.model_hash(path)))
    same = (args.precision, args.batch_size, args.workers, args.memory, args.spread)
    return Run(members, domain_score, accelerator, *same)


def run_key(planned: layout.Plan, run, args) -> dict:
    """What the results of a slide depend on: where a record says the same, they are there."""
    from utils.prediction.slide_features import fingerprint

    request = planned.request
    given = {name: getattr(request, name) for name in ("um_per_px", "spot_pitch_um")}
    flags = {name: getattr(args, name) for name in RESULT_FLAGS}
    return {"decoders": [m.file_hash for m in run.members], "files": fingerprint(planned.files), **given, **flags}


def is_done(out: Path, key: dict) -> bool:
    try:
        return json.loads((out / SETTINGS).read_text())["key"] == key
    except (OSError, ValueError, KeyError):
        return False


def compare(planned: layout.Plan, spots: layout.SlideSpots, predicted: np.ndarray, run, args, out: Path):
    """What was measured, and the metrics of the prediction beside the mean profile; None, None without counts."""
    first = run.members[0]
    genes, target = first.state["genes"], first.state["target"]
    if planned.slice_ is None or planned.request.positions is not None:
        return None, None
    found = measured.read_measured(planned.slice_, genes, spots.barcodes, args.memory * 2**30)
    if found is None:
        return None, None
    if any(found.content in m.state["counts_hashes"].values() for m in run.members):
        print(f"warning: {spots.name}: the model was trained with this slice: its metrics say little of new slides")
    from utils.evaluation import expression

    truth = [{"name": spots.name} | {k: getattr(found, k) for k in ("counts", "total_counts", "measured")}]
    mean = np.broadcast_to(first.model.target_mean.cpu().numpy(), predicted.shape)
    metrics = expression.evaluate({"model": [predicted], "mean": [mean]}, truth, target)
    write_record(out / "metrics.json", metrics)
    table = expression.per_gene_table({"model": [predicted]}, truth, genes)
    table.insert(1, "val_pcc", first.state["val_pcc"].numpy())
    write_whole(out / "genes.csv", table.to_csv(index=False).encode())
    return found, metrics


def write_results(one: outputs.Prediction, metrics: dict | None, args, out: Path) -> None:
    adata = outputs.write_anndata(out / "predictions.h5ad", one)
    outputs.write_csv(out, one)
    outputs.write_geojson(out / "predictions.geojson", one)
    outputs.write_maps(out / "maps", one, one.best_genes(args.maps))
    if args.spatialdata:
        outputs.write_spatialdata(out / "predictions.zarr", one, adata)
    outputs.write_report(out / "report.html", one, metrics, atomic.plain(vars(args)) | one.about)


def describe(planned: layout.Plan, spots: layout.SlideSpots, image, found, args) -> dict:
    """Plain values that go with the results."""
    above = float((found.domain_score > found.domain_limit).mean())
    return {
        "slide": str(planned.request.slide),
        "image": str(planned.source.path),
        "image_px": [image.width, image.height],
        "um_per_fullres_px": spots.um_per_fullres_px,
        "spot_pitch_fullres_px": spots.pitch_fullres_px,
        "n_spots": len(spots.barcodes),
        "decoders": [str(path) for path in args.decoder],
        "domain_limit": found.domain_limit,
        "domain_median": float(np.median(found.domain_score)),
        "share_out_of_domain": above,
        "unlike_training": bool(np.median(found.domain_score) > found.domain_limit),
    }


def predict_one(planned: layout.Plan, key: dict, run, args) -> None:
    """One slide, from its image to all its files; the record that says that it is done comes last."""
    from utils.evaluation import metrics as scales
    from utils.images.image import open_image
    from utils.prediction import predict

    out, um_per_px = planned.request.out, planned.um_per_image_px
    with open_image(planned.source.path, um_per_px, args.huge) as image:
        for note in image.notes:
            print(f"{planned.request.name}: {planned.source.path.name}: {note}")
        thumbnail, scale = image.thumbnail()
        spots = layout.lay(planned, image, thumbnail, scale, args.grid)
        found = predict.predict_slide(run, image, spots, out / FEATURES)
        about = describe(planned, spots, image, found, args)
    if about["unlike_training"]:
        print(
            f"warning: {spots.name}: unlike anything the model was trained on: trust nothing here (out-of-domain "
            f"score: median {about['domain_median']:.2f}, of validation spots 99 % lie below {found.domain_limit:.2f})"
        )
    (out / SETTINGS).unlink(missing_ok=True)  # results of two runs never stand under one record
    known, metrics = compare(planned, spots, found.predicted, run, args, out)
    state, extra = run.members[0].state, {}
    if known is not None:
        shown = scales.to_scale(state["target"], known.counts, known.total_counts)
        extra = {"measured": np.where(known.measured, shown, np.nan), "counts": known.counts}
        extra["total_counts"] = known.total_counts
    val_pcc = np.mean([m.state["val_pcc"].numpy() for m in run.members], axis=0)
    one = outputs.Prediction(
        spots=spots,
        genes=state["genes"],
        target=state["target"],
        val_pcc=val_pcc,
        image=thumbnail,
        image_scale=scale * spots.image_scale,
        about=about,
        **vars(found),
        **extra,
    )
    write_results(one, metrics, args, out)
    write_record(out / SETTINGS, {"key": key, "settings": atomic.plain(vars(args)), **about})
    shutil.rmtree(out / FEATURES)
    print(f"{spots.name}: {len(spots.barcodes)} spots, {len(one.genes)} genes in {out}")


def do_slide(request: slide_list.Request, run, args) -> None:
    planned = layout.plan(request)
    key = run_key(planned, run, args)
    if is_done(request.out, key):
        print(f"{request.name}: done already, in {request.out}")
        return
    with exclusive.exclusive(request.out, "--out"):
        predict_one(planned, key, run, args)


def predict_all(own: list, run, args) -> None:
    """Slides one after the other. Raises ValueError that names those which failed, once the others are done."""
    failed = []
    for request in own:
        try:
            do_slide(request, run, args)
        except Exception as error:  # one corrupt or large file must not end a night's work on the others
            line = settings.line_of(error)
            if len(own) == 1 or line is None:
                raise
            failed.append(f"{request.name} ({line})")
            print(f"{request.name}: left out: {line}", flush=True)
    if failed:
        raise ValueError(f"{len(failed)} of {len(own)} slides could not be predicted: {'; '.join(failed)}")


def main(args):
    if args.spread and len(args.decoder) > 1:
        raise ValueError("--spread: several decoders give a spread by themselves; leave --spread or the others out")
    if args.spatialdata and importlib.util.find_spec("spatialdata") is None:
        raise ValueError("--spatialdata: expected the package spatialdata, found none; pip install spatialdata")
    for path in args.decoder:
        checkpoint.require_checkpoint(path, "--decoder", "run train_decoder.py first")
    given = slide_list.Request(Path(), args.um_per_px, args.positions, args.mask, args.spot_pitch_um)
    slides = slide_list.list_slides(args.slides, args.out, given)
    index, number = args.shard
    own = slides[index::number]
    if not own:
        print(f"shard {index + 1} of {number}: none of {len(slides)} slides is its own")
        return
    states = read_checkpoints(args.decoder)
    with distributed.running(args.device, args.precision) as accelerator:
        predict_all(own, load_run(states, accelerator, args), args)


if __name__ == "__main__":
    settings.run(main, parse_args())
