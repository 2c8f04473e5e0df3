"""Stage two: decode the frozen image encoder's features into the expression of the target genes.

    python train_decoder.py --encoder encoder_model/best_epoch_weights.pth
    python train_decoder.py --target residuals --resume

Reads tiles and target genes of the train and validation slices; the features of a tile are computed once and kept in
<out>/features/. Writes decoder_model/{best,last,previous}_epoch_weights.pth, slices.csv beside them, and
logs/stage_two/<time>/.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from utils import arguments, distributed
from utils import settings as flags
from utils.features import dataset
from utils.files.arrays import ArrayStore
from utils.files.atomic import write_figure
from utils.files.exclusive import exclusive_folder
from utils.settings import StageTwoSettings
from utils.slices import splits
from utils.training import checkpoint, split, targets

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor

    from model.stage_two import StageTwo
    from utils.features.neighbourhoods import FeatureBank, Moments
    from utils.training.cross_validation import Predict
    from utils.training.loop import EpochOrder
    from utils.training.trainer import Row, Trainer


def parse_args(argv: list[str] | None = None) -> StageTwoSettings:
    parser = flags.shared(__doc__)
    flags.add_training(parser, out="decoder_model")
    flags.add_memory(parser)
    group = parser.add_argument_group("method")
    group.add_argument(
        "--encoder", type=Path, default=Path("encoder_model/best_epoch_weights.pth"), help="checkpoint of stage one"
    )
    group.add_argument(
        "--target",
        choices=["lognorm", "residuals", "counts"],
        default="residuals",
        help="scale that is predicted: Pearson residuals, log1p of counts per 10,000, or counts per 10,000",
    )
    group.add_argument(
        "--context", type=arguments.count_or_zero, default=18, help="nearest spots that the decoder attends to"
    )
    group.add_argument(
        "--decoder_layers",
        type=arguments.count_or_zero,
        default=6,
        help="Transformer blocks; 0: ridge and linear expansion alone",
    )
    group.add_argument(
        "--decoder_width", type=arguments.count, default=64, help="width of the Transformer, a multiple of 4"
    )
    group.add_argument(
        "--tta",
        type=int,
        choices=[1, 2, 4, 8],
        default=1,
        help="test-time augmentation: average features over rotations and flips",
    )
    group.add_argument(
        "--cross_validate",
        action="store_true",
        help="also refit the initialisation without each train patient in turn: PCC per gene on left-out patients",
    )
    return StageTwoSettings(**flags.parse_training(parser, argv))


@dataclass(frozen=True)
class Data:
    """The spots of the train and validation part as the decoder sees them.

    S spots of all slices in turn, n train spots, v validation spots of a slice, G target genes.
    """

    slices: list[dataset.SliceData]
    bank: FeatureBank
    target: np.ndarray  # (S, G), standardised
    train_spots: np.ndarray  # (n,) numbers in the bank
    truth: list[np.ndarray]  # per slice residuals of validation spots (v, G)


def load_slices(
    encoder: dict[str, Any], settings: StageTwoSettings
) -> tuple[list[dataset.SliceData], list[splits.SliceRow]]:
    """Slices of the train and validation part, and the rows of the table."""
    rows, warnings = split.read_split(settings)
    flags.warn(warnings)
    print(splits.format_table(rows))
    slices = split.load_training(rows, settings, ("target",))
    first = slices[0]
    split.check_tiles(first.pack.folder, dataset.tile_scale(first), tuple(encoder["tile_scale"]), "--encoder")
    split.check_unseen(rows, encoder, "--encoder", settings.allow_leak)
    return slices, rows


def check_patients(slices: list[dataset.SliceData], settings: StageTwoSettings) -> None:
    """--cross_validate needs patients to leave out."""
    least, patients = 3, {slice_.patient for slice_ in slices if len(slice_.rows_of("train"))}
    if settings.cross_validate and len(patients) < least:
        raise ValueError(
            f"--cross_validate: expected {least} train patients at least, found {len(patients)} "
            f"({', '.join(sorted(patients))}); leave the flag out, or name the patients in slices.csv"
        )


def build_model(encoder: dict[str, Any], n_genes: int, n_train_spots: int, settings: StageTwoSettings) -> StageTwo:
    """Stage two around the image encoder of a stage-one checkpoint."""
    from model.stage_two import StageTwo, StageTwoSizes
    from utils.training.decoder_initialisation import LANDMARKS

    sizes = StageTwoSizes(
        n_genes=n_genes,
        landmarks=min(LANDMARKS, n_train_spots),
        bandwidths=list(StageTwoSizes.bandwidths) if settings.context else [],
        **{name: encoder["sizes"][name] for name in ("image_encoder", "image_size", "crop_scales", "width")},
        **{name: getattr(settings, name) for name in ("decoder_layers", "decoder_width", "context", "tta")},
    )
    model = StageTwo(sizes)
    prefix = "image_encoder."
    weights = {name.removeprefix(prefix): t for name, t in encoder["model"].items() if name.startswith(prefix)}
    model.image_encoder.load_state_dict(weights)
    return model


def all_features(
    model: StageTwo, slices: list[dataset.SliceData], accelerator: Accelerator, settings: StageTwoSettings
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Per slice features (S, V + T, D) memory-mapped from --out/features, computed where they are not there already,
    and statistics of the tiles (S, K)."""
    from utils.features import cache, domain

    def encode(tiles: Tensor) -> Tensor:
        with accelerator.autocast():
            features = model.encode(tiles)
        return domain.with_statistics(features, tiles)

    size, folder = model.sizes.image_size, settings.out / "features"
    encoder = cache.TileEncoder(encode, size, accelerator.device, settings.batch_size, settings.workers)
    key = f"{checkpoint.model_hash(settings.encoder)} {accelerator.mixed_precision} pooled, tta {settings.tta}"
    key = f"{key}, {domain.CONTENT},"
    kept = [
        cache.kept_features(
            folder, f"{key} {slice_.pack.content}", slice_, partial(cache.encode_slice, encoder, slice_)
        )
        for slice_ in slices
    ]
    features, statistics = zip(*map(domain.split_statistics, kept), strict=True)
    return list(features), list(statistics)


def train_one_epoch(
    trainer: Trainer, model: StageTwo, data: Data, order: EpochOrder, settings: StageTwoSettings
) -> float:
    """Mean loss over the epoch's steps: squared error of standardised genes; the mean profile has 1."""
    import torch

    from model import losses
    from utils.training import loop

    model.train()
    epoch, accelerator = trainer.epoch, trainer.accelerator
    figures = loop.StepFigures(epoch, trainer.sums, accelerator.device)
    order.epoch, order.first = epoch, trainer.n_steps
    bar = tqdm(order, desc=f"epoch {epoch}", unit="step", initial=order.first, disable=None)
    for step, numbers in enumerate(bar, start=order.first):
        distributed.seed_everything(settings.seed, epoch, step)
        spots = data.train_spots[numbers]
        with distributed.decoder_autocast(accelerator, settings.precision):
            predicted = model.decoder(**data.bank.batch(spots))
        target = distributed.to_device(torch.from_numpy(data.target[spots]), accelerator.device)
        loss = losses.expression_loss(predicted, target)
        figures.add(step, {"loss": loss})
        trainer.backward(loss)
        trainer.step()
        trainer.after_step(step + 1, figures)
    return trainer.means(figures, len(order))["loss"]


def predictor(data: Data, accelerator: Accelerator, settings: StageTwoSettings) -> Predict:
    """Predicts spots (n,) of the bank by a model: (n, G) in the units of the target."""
    from utils.features.neighbourhoods import predict

    autocast = partial(distributed.decoder_autocast, accelerator, settings.precision)
    return lambda model, spots: predict(model, data.bank, spots, autocast, settings.batch_size)


def validate(model: StageTwo, data: Data, predict: Predict) -> tuple[np.ndarray, dict[str, Tensor]]:
    """PCC per gene against residuals on validation spots (G,), mean over slices, NaN for a gene that none measured; and
    what intervals of the measured values are made of (`intervals_of`)."""
    from utils.evaluation import metrics

    model.eval()
    per_slice, predictions, numbers = [], [], []
    for spots, true in zip(data.bank.spots_of(data.slices, "val"), data.truth, strict=True):
        if len(spots):
            predictions.append(predict(model, spots))
            numbers.append(spots)
            pcc = metrics.scored_pearson_per_gene(predictions[-1], np.nan_to_num(true))
            per_slice.append(np.where(np.isfinite(true).all(0), pcc, np.nan))
    known = np.isfinite(per_slice).sum(0)
    if not known.any():
        names = ", ".join(slice_.name for slice_ in data.slices if len(slice_.rows_of("val")))
        raise ValueError(
            f"{names}: expected target genes that validation measured, found none of the {len(known)}; validate "
            "on another slice, or let make_decoder_data.py take target genes that it measured"
        )
    pcc = np.where(known > 0, np.nansum(per_slice, axis=0) / np.maximum(known, 1), np.nan)
    mean, sd = model.target_mean.cpu().numpy(), model.target_sd.cpu().numpy()
    measured = data.target[np.concatenate(numbers)] * sd + mean
    return pcc, intervals_of(measured, np.concatenate(predictions))


def intervals_of(measured: np.ndarray, predicted: np.ndarray) -> dict[str, Tensor]:
    """Of all validation spots (n, G), in the units of the target: ends of the interval relative to a prediction, and
    ends of the interval that uses no prediction, (G,) each."""
    import torch

    from utils.evaluation import intervals

    low, high = intervals.conformal_offsets(measured - predicted)
    measured_low, measured_high = intervals.conformal_offsets(measured)
    ends = {"low": low, "high": high, "measured_low": measured_low, "measured_high": measured_high}
    return {name: torch.from_numpy(values) for name, values in ends.items()} | {
        "level": torch.tensor(intervals.LEVEL),
        "n_spots": torch.tensor(len(measured)),
    }


def report(row: Row) -> str:
    return (
        f"epoch {row['epoch']}: loss {row['loss']:.4f} (mean profile 1), validation PCC per gene against residuals "
        f"{row['val_pcc_residuals']:.4f} (chance 0), {row['seconds']:.1f} s"
    )


def describe(
    model: StageTwo,
    encoder: dict[str, Any],
    slices: list[dataset.SliceData],
    rows: list[splits.SliceRow],
    moments: Moments,
    settings: StageTwoSettings,
) -> dict[str, Any]:
    """All that the model needs to be used elsewhere, beside its weights, domain and intervals."""
    import torch

    depth, fraction = targets.train_depth(slices)
    return {
        "sizes": asdict(model.sizes),
        "genes": slices[0].panels["target"].genes,
        "target": settings.target,
        "train_depth": depth,
        "gene_fraction": torch.from_numpy(fraction),
        "tile_scale": list(dataset.tile_scale(slices[0])),
        "table": [asdict(row) for row in rows],
        "counts_hashes": encoder["counts_hashes"] | dataset.counts_hashes(slices),
        "pretrain_hashes": encoder["pretrain_hashes"],
        "encoder_hash": checkpoint.model_hash(settings.encoder),
        "encoder_settings": encoder["settings"],
        "encoder_table": encoder["table"],
        "feature_moments": {"mean": torch.from_numpy(moments.mean), "sd": torch.from_numpy(moments.sd)},
        **layout_of(slices),
    }


def layout_of(slices: list[dataset.SliceData]) -> dict[str, Any]:
    """How the train slices lie and were scanned: pitch of the spots in um and kind of their grid (of the first one),
    and um per pixel of the coarsest image that tiles were cut from; None where a slice has no scale."""
    train = [slice_ for slice_ in slices if len(slice_.rows_of("train"))]
    first, um_per_px = train[0], dataset.um_per_fullres_px(train[0])
    return {
        "spot_pitch_um": um_per_px and round(first.pitch_fullres_px * um_per_px, 3),
        "grid": dataset.grid_kind(first),
        "scan_um_per_px": max((dataset.um_per_source_px(slice_) or 0 for slice_ in train), default=0) or None,
    }


def begin(trainer: Trainer, model: StageTwo, data: Data, predict: Predict, settings: StageTwoSettings) -> None:
    """Start the decoder at a kernel ridge, and validate that, the first candidate for the best epoch."""
    import torch

    from utils.training.decoder_initialisation import warm_start_decoder

    size, seed = settings.batch_size, settings.seed
    print(warm_start_decoder(model, data.bank, data.slices, data.target, data.truth, size, seed))
    val_pcc, interval = validate(model, data, predict)
    row = {"epoch": settings.Init_Epoch - 1, "val_pcc_residuals": float(np.nanmean(val_pcc))}
    trainer.begin(row["val_pcc_residuals"], row=row, val_pcc=torch.from_numpy(val_pcc), interval=interval)


def cross_validate(model: StageTwo, data: Data, predict: Predict, settings: StageTwoSettings) -> dict[str, Tensor]:
    """What --cross_validate adds to the checkpoint: each gene's PCC on left-out patients (G,)."""
    import torch

    from utils.training import cross_validation

    if not settings.cross_validate:
        return {}
    parts = (model, data.bank, data.slices, data.target, predict, settings.batch_size, settings.seed)
    return {"left_out_pcc": torch.from_numpy(cross_validation.left_out_pcc(*parts))}


def make_trainer(
    model: StageTwo, order: EpochOrder, about: dict[str, Any], accelerator: Accelerator, settings: StageTwoSettings
) -> Trainer:
    """The run with its optimiser, resumed if asked."""
    from utils.training import loop
    from utils.training.trainer import Trainer

    optimizer = loop.make_optimizer(model.decoder.parameters(), settings)
    schedule = loop.schedule(optimizer, len(order) * (settings.Epoch - settings.Init_Epoch), settings)
    trainer = Trainer(settings, "stage_two", about, accelerator, model, optimizer, schedule, order.n_spots)
    return trainer.resume_if_asked()


def train(
    encoder: dict[str, Any],
    slices: list[dataset.SliceData],
    rows: list[splits.SliceRow],
    accelerator: Accelerator,
    settings: StageTwoSettings,
) -> None:
    """From kept features to the last epoch, or on from where a run was interrupted."""
    import torch

    from utils.evaluation import plotting
    from utils.features import domain, neighbourhoods
    from utils.training import loop

    distributed.seed_everything(settings.seed)
    store = ArrayStore(settings.memory, settings.out)
    target, mean, sd = targets.standardised(slices, settings.target, store)
    places = dataset.spots_of(slices, "train")
    model = build_model(encoder, len(mean), len(places), settings).to(accelerator.device)
    model.set_target_scale(torch.from_numpy(mean), torch.from_numpy(sd))
    features, statistics = all_features(model, slices, accelerator, settings)
    if not distributed.go_on_alone():  # on kept features one process trains
        return
    moments = neighbourhoods.moments(features, model.n_vectors, [slice_.rows_of("train") for slice_ in slices])
    around = (model.sizes.context, model.sizes.bandwidths)
    bank = neighbourhoods.FeatureBank(slices, features, moments, *around, accelerator.device, store)
    train_spots = bank.first[places[:, 0]] + places[:, 1]
    data = Data(slices, bank, target, train_spots, targets.validation_residuals(slices))

    order = loop.EpochOrder(len(train_spots), settings.batch_size, settings.seed)
    about = describe(model, encoder, slices, rows, moments, settings)
    about["domain"], about["domain_calibration"] = domain.fit(slices, statistics, settings.seed)
    predict = predictor(data, accelerator, settings)
    about |= cross_validate(model, data, predict, settings)
    with make_trainer(model, order, about, accelerator, settings) as trainer:
        if settings.compile:
            model.decoder.compile()
        splits.write_table(rows, settings.out / "slices.csv")
        if not settings.resume:
            begin(trainer, model, data, predict, settings)
        for _ in trainer.epochs():
            loss = train_one_epoch(trainer, model, data, order, settings)
            with trainer.interruptible():
                val_pcc, interval = validate(model, data, predict)
            row = trainer.log({"loss": loss, "val_pcc_residuals": float(np.nanmean(val_pcc))})
            print(report(row), flush=True)
            trainer.after_epoch(row["val_pcc_residuals"], val_pcc=torch.from_numpy(val_pcc), interval=interval)
    log = trainer.run_log
    write_figure(log.folder / "epoch_loss.png", plotting.loss_curves(log.rows, {"loss": 1.0}, "Stage two"))
    print(f"{settings.out / checkpoint.BEST}: validation PCC per gene {trainer.best:.4f}; log in {log.folder}")


@exclusive_folder("out")
def main(settings: StageTwoSettings) -> None:
    flags.check_training(settings)
    checkpoint.require_checkpoint(settings.encoder, "--encoder", "run train_mymodel.py first")
    encoder = checkpoint.load(settings.encoder, "stage_one", "--encoder")
    slices, rows = load_slices(encoder, settings)
    check_patients(slices, settings)
    with distributed.running(settings.device, settings.precision) as accelerator:
        train(encoder, slices, rows, accelerator, settings)
    if settings.export is not None:
        from utils.sharing import export

        export.export_best(settings)


if __name__ == "__main__":
    flags.run(main, parse_args())
