"""Stage two: decode the frozen image encoder's features into the expression of the target genes.

    python train_decoder.py --encoder encoder_model/best_epoch_weights.pth
    python train_decoder.py --target residuals --resume

Reads tiles and target genes of the train and validation slices; the features of a tile are computed once and kept in
<out>/features/. Writes decoder_model/{best,last}_epoch_weights.pth, slices.csv beside them, and logs/stage_two/<time>/.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from utils import distributed, settings
from utils.features import dataset
from utils.files import atomic
from utils.files.exclusive import exclusive_folder
from utils.slices import splits
from utils.training import checkpoint, split, targets
from utils.training.decoder_initialisation import LANDMARKS, start_from_ridge
from utils.training.decoder_validation import validate


def parse_args(argv=None):
    parser = settings.shared(__doc__)
    settings.add_training(parser, out="decoder_model")
    settings.add_memory(parser)
    group = parser.add_argument_group("method")
    group.add_argument("--encoder", type=Path, default=Path("encoder_model/best_epoch_weights.pth"), help="stage one")
    group.add_argument(
        "--target", choices=["lognorm", "residuals", "counts"], default="residuals", help="what is learnt"
    )
    group.add_argument("--context", type=settings.count_or_zero, default=18, help="nearest spots the decoder sees")
    group.add_argument("--decoder_layers", type=settings.count_or_zero, default=6, help="0: ridge and expansion alone")
    group.add_argument("--decoder_width", type=settings.count, default=64, help="a multiple of 4, its heads")
    group.add_argument(
        "--tta", type=int, choices=[1, 2, 4, 8], default=1, help="of a tile that its features are averaged over"
    )
    return parser.parse_args(argv)


def load_data(args, encoder: dict):
    """Slices of the train and validation part, and the rows of the table."""
    rows, warnings = split.read_split(args)
    settings.say(warnings)
    print(splits.format_table(rows))
    slices = split.load_training(rows, args, ("target",))
    first = slices[0]
    split.check_tiles(first.pack.folder, dataset.tile_scale(first), tuple(encoder["tile_scale"]), "--encoder")
    split.check_unseen(rows, encoder, "--encoder", args.allow_leak)
    return slices, rows


def build_model(args, encoder: dict, n_genes: int, n_train_spots: int):
    """Stage two around the image encoder of a stage-one checkpoint."""
    from model.stage_two import StageTwo, StageTwoSizes

    sizes = StageTwoSizes(
        n_genes=n_genes,
        landmarks=min(LANDMARKS, n_train_spots),
        bandwidths=list(StageTwoSizes.bandwidths) if args.context else [],
        **{name: encoder["sizes"][name] for name in ("image_encoder", "image_size", "crop_scales", "width")},
        **{name: getattr(args, name) for name in ("decoder_layers", "decoder_width", "context", "tta")},
    )
    model = StageTwo(sizes)
    prefix = "image_encoder."
    own = {name.removeprefix(prefix): t for name, t in encoder["model"].items() if name.startswith(prefix)}
    model.image_encoder.load_state_dict(own)
    return model


def all_features(model, slices, accelerator, args) -> list[np.ndarray]:
    """Per slice features (S, V + T, D) memory-mapped from --out/features, computed where they are not there already."""
    from utils.features import cache

    def encode(tiles):
        with accelerator.autocast():
            return model.encode(tiles)

    size, folder = model.sizes.image_size, args.out / "features"
    how = cache.TileEncoder(encode, size, accelerator.device, args.batch_size, args.workers)
    key = f"{checkpoint.model_hash(args.encoder)} {accelerator.mixed_precision} pooled, tta {args.tta}"
    return [
        cache.kept_features(folder, f"{key} {one.pack.content}", one, partial(cache.encode_slice, how, one))
        for one in slices
    ]


def train_one_epoch(model, bank, spots, target, optimizer, schedule, accelerator, order, progress, args) -> float:
    """Mean loss over the epoch's steps: squared error of standardised genes; 1 is the mean profile's."""
    import torch

    from model import losses
    from utils.training import loop

    model.train()
    epoch, total = progress.epoch, progress.sums.get("loss", 0.0)
    order.epoch, order.first = epoch, progress.step
    bar = tqdm(order, desc=f"epoch {epoch}", unit="step", initial=order.first, disable=None)
    for step, numbers in enumerate(bar, start=order.first):
        distributed.seed_everything(args.seed, epoch, step)
        chosen = spots[numbers]
        with distributed.decoder_autocast(accelerator, args.precision):
            predicted = model.decoder(**bank.batch(chosen))
        loss = losses.expression_loss(predicted, torch.from_numpy(target[chosen]).to(accelerator.device))
        loop.stop_if_not_finite(loss.item(), epoch, step)
        optimizer.zero_grad(set_to_none=True)
        accelerator.backward(loss)
        optimizer.step()
        schedule.step()
        total += loss.item()
        progress.after_step(step + 1, {"loss": total})
    return total / len(order)


def report(row: dict[str, float]) -> str:
    return (
        f"epoch {row['epoch']}: loss {row['loss']:.4f} (mean profile 1), validation PCC per gene against residuals "
        f"{row['val_pcc_residuals']:.4f} (chance 0), {row['seconds']:.1f} s"
    )


def describe_domain(slices, kept, n_vectors: int, seed: int) -> dict:
    """Mean and covariance of the train features, and validation quantiles of the out-of-domain score."""
    import torch

    from model.stage_two import domain_score, fit_domain
    from utils.features.neighbourhoods import domain_vectors

    mean, covariance = fit_domain(domain_vectors(slices, kept, n_vectors, "train", seed))
    score = domain_score(domain_vectors(slices, kept, n_vectors, "val", seed), mean, covariance)
    levels = torch.tensor([0.5, 0.9, 0.95, 0.99])
    return {"mean": mean, "covariance": covariance, "levels": levels, "quantiles": torch.quantile(score, levels)}


def describe(args, model, encoder: dict, slices, rows, kept, moments) -> dict:
    """All that the model needs to be used elsewhere, beside its weights."""
    import torch

    return {
        "sizes": asdict(model.sizes),
        "genes": slices[0].panels["target"].genes,
        "target": args.target,
        "tile_scale": list(dataset.tile_scale(slices[0])),
        "table": [asdict(row) for row in rows],
        "counts_hashes": encoder["counts_hashes"] | dataset.counts_hashes(slices),
        "settings": atomic.plain(vars(args)),
        "pretrain_hashes": encoder["pretrain_hashes"],
        "encoder_hash": checkpoint.model_hash(args.encoder),
        "encoder_settings": encoder["settings"],
        "encoder_table": encoder["table"],
        "feature_moments": {"mean": torch.from_numpy(moments.mean), "sd": torch.from_numpy(moments.sd)},
        "domain": describe_domain(slices, kept, moments.n_vectors, args.seed),
    }


def train(encoder: dict, slices, rows, accelerator, args) -> None:
    """From kept features to the last epoch, or on from where a run was interrupted."""
    import torch

    from utils.evaluation import plotting
    from utils.features import neighbourhoods
    from utils.files import arrays
    from utils.training import loop
    from utils.training.progress import Progress

    distributed.seed_everything(args.seed)
    memory = arrays.ArrayStore(args.memory, args.out)
    target, mean, sd = targets.standardised(slices, args.target, memory)
    chosen = dataset.spots_of(slices, "train")
    model = build_model(args, encoder, len(mean), len(chosen)).to(accelerator.device)
    model.set_target_scale(torch.from_numpy(mean), torch.from_numpy(sd))
    features = all_features(model, slices, accelerator, args)
    if not distributed.go_on_alone():  # on kept features one process trains
        return
    moments = neighbourhoods.moments(features, model.n_vectors, [one.rows_of("train") for one in slices])
    around = (model.sizes.context, model.sizes.bandwidths)
    bank = neighbourhoods.FeatureBank(slices, features, moments, *around, accelerator.device, memory)
    truth = targets.validation_residuals(slices)
    spots = bank.first[chosen[:, 0]] + chosen[:, 1]
    order = loop.EpochOrder(len(spots), args.batch_size, args.seed)
    optimizer = loop.make_optimizer(model.decoder.parameters(), args)
    schedule = loop.schedule(optimizer, len(order) * (args.Epoch - args.Init_Epoch), args)
    about = describe(args, model, encoder, slices, rows, features, moments)
    about["conditions"] = distributed.conditions(accelerator, args)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule, "scaler": accelerator.scaler}
    with (
        Progress(args, "stage_two", about, **parts) as progress,
        loop.RunLog(args.logs, "stage_two", vars(args) | {"n_train_spots": len(spots)}) as log,
    ):
        optimizer = accelerator.prepare(optimizer)
        if args.compile:
            model.decoder.compile()
        splits.write_table(rows, args.out / "slices.csv")
        if not args.resume:
            print(start_from_ridge(model, bank, slices, target, truth, args))
            val_pcc = validate(model, bank, slices, truth, accelerator, args)
            row = {"epoch": args.Init_Epoch - 1, "val_pcc_residuals": float(val_pcc.mean())}
            progress.begin(row["val_pcc_residuals"], row=row, val_pcc=torch.from_numpy(val_pcc))
        for epoch in range(progress.epoch, args.Epoch):
            start = time.monotonic()
            loss = train_one_epoch(model, bank, spots, target, optimizer, schedule, accelerator, order, progress, args)
            with progress.interruptible():
                val_pcc = validate(model, bank, slices, truth, accelerator, args)
            row = {"epoch": epoch, "loss": loss, "val_pcc_residuals": float(val_pcc.mean())}
            row |= {"lr": schedule.get_last_lr()[0], "seconds": time.monotonic() - start}
            log.add(row)
            print(report(row), flush=True)
            progress.after_epoch(row["val_pcc_residuals"], row=row, val_pcc=torch.from_numpy(val_pcc))
    plotting.save(plotting.loss_curves(log.rows, {"loss": 1.0}, "Stage two"), log.folder / "epoch_loss.png")
    print(f"{args.out / checkpoint.BEST}: validation PCC per gene {progress.best:.4f}; log in {log.folder}")


@exclusive_folder("out")
def main(args):
    settings.check_training(args)
    checkpoint.require_checkpoint(args.encoder, "--encoder", "run train_mymodel.py first")
    encoder = checkpoint.load(args.encoder, "stage_one", "--encoder")
    slices, rows = load_data(args, encoder)
    with distributed.running(args.device, args.precision) as accelerator:
        train(encoder, slices, rows, accelerator, args)
    if args.export is not None and distributed.is_main():
        from utils.sharing import folder

        folder.export(args.out / checkpoint.BEST, args.export)
        print(f"{args.export}: to share")


if __name__ == "__main__":
    settings.run(main, parse_args())
