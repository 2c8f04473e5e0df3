"""Stage one: align images and expression profiles by contrast with momentum distillation, and learn to match them.

    python train_mymodel.py --data data/Breast_cancer --image_weights deit_base_patch16_224-b5f2ef4d.pth
    python train_mymodel.py --resume

Reads tiles (image_tilling.py) and input genes (make_decoder_data.py) of the train and validation slices; writes
encoder_model/{best,last}_epoch_weights.pth, slices.csv beside them, and logs/stage_one/<time>/.
"""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from dataclasses import asdict

import numpy as np
from tqdm import tqdm

from model import tuning
from utils import distributed, settings
from utils.features import dataset
from utils.files import atomic
from utils.files.exclusive import exclusive_folder
from utils.slices import splits
from utils.training import checkpoint, gene_weights, split, targets
from utils.training.initialisation import start_from_ridge

MEASURED_SPOTS = 20_000  # tell mean and deviation of each gene's bins well enough
MATCHING_CHANCE = -(math.log(1 / 3) / 3 + 2 * math.log(2 / 3) / 3)  # one pair to two non-pairs, judged by their rate


def parse_args(argv=None):
    parser = settings.shared(__doc__)
    settings.add_training(parser, out="encoder_model")
    settings.add_memory(parser)
    group = settings.add_encoders(parser)
    group.add_argument("--tune", type=tuning.choice, default="all", help="of the image trunk: all, last:N, norm, none")
    group.add_argument(
        "--layer_decay",
        type=settings.share,
        default=1.0,
        help="rate of each lower layer, as a share of the next one's",
    )
    gene_weights.add_flags(parser)
    group = parser.add_argument_group("method")
    group.add_argument("--width", type=settings.count, default=512, help="shared width of images and profiles")
    group.add_argument("--fusion_blocks", type=settings.count, default=3, help="depth of the matching module")
    group.add_argument("--queue_size", type=settings.count_or_zero, default=4096, help="earlier spots as negatives")
    group.add_argument(
        "--alpha", type=settings.fraction, default=0.4, help="weight of soft targets; 0: no distillation"
    )
    group.add_argument("--expression_weight", type=settings.not_negative, default=5.0, help="of the expression loss")
    group.add_argument("--components", type=settings.count, default=10, help="of expression that are learnt")
    group.add_argument("--matching_weight", type=settings.not_negative, default=1.0, help="of the matching loss")
    group.add_argument("--accumulate", type=settings.count, default=1, help="batches of one step, at most an epoch")
    return parser.parse_args(argv)


def check(args):
    """Flags and files, before anything heavy is imported."""
    settings.check_training(args)
    settings.check_encoders(args)
    gene_weights.check(args)
    if args.expression_weight and args.components > args.width:
        raise ValueError(f"--components {args.components}: expected at most --width {args.width}; raise it")


def load_data(args):
    """Slices of the train and validation part, the rows of the table, and what the split left to say."""
    rows, warnings = split.read_split(args)
    settings.say(warnings)
    print(splits.format_table(rows))
    return split.load_training(rows, args, ("input", "target") if args.expression_weight else ("input",)), rows


def tokens_of(slices, store) -> tuple[list[np.ndarray], np.ndarray]:
    """Bins (S, G) uint8 of each slice, and of the train spots of all of them (n, G)."""
    n_genes = len(slices[0].panels["input"].genes)
    bins = [one.bins(store.empty((len(one.barcodes), n_genes), np.uint8)) for one in slices]
    rows = [one.rows_of("train") for one in slices]
    train = store.empty((sum(map(len, rows)), n_genes), np.uint8)
    ends = np.cumsum([0, *map(len, rows)])
    for own, chosen, start, stop in zip(bins, rows, ends, ends[1:], strict=False):
        train[start:stop] = own[chosen]
    return bins, train


def build_model(args, slices, train_bins: np.ndarray, n_components: int):
    import torch

    from model import scbert
    from model.stage_one import StageOne, StageOneSizes
    from utils.features.cache import read_image_weights

    weights = read_image_weights(args.image_weights, "--image_weights")
    queue_size = max(min(args.queue_size, len(train_bins) - args.batch_size), 0)
    sizes = StageOneSizes(
        n_genes=len(slices[0].panels["input"].genes),
        image_pretrained=weights is not None,
        queue_size=queue_size,
        momentum_encoders=args.alpha > 0 or queue_size > 0,
        n_components=n_components,
        **{
            name: getattr(args, name)
            for name in StageOneSizes.__dataclass_fields__
            if hasattr(args, name) and name != "queue_size"
        },
    )
    model = StageOne(sizes, weights)
    panel, folders = slices[0].panels["input"].genes, [one.root for one in slices]
    gene_weights.load(model.gene_encoder, scbert, args, panel, folders)
    some = torch.from_numpy(train_bins[:: -(-len(train_bins) // MEASURED_SPOTS)]).float()
    model.gene_encoder.linear_path[0].measure(some.mean(0), some.std(0, correction=0))
    if model.image_encoder.weights_report:
        print(model.image_encoder.weights_report)
    tuning.tune(model.image_encoder, args.tune)
    model.reset_momentum_encoders()
    return model


def losses_of(replica, batch: dict, epoch: int, number: int, alpha: float, device, args):
    """Forward pass on this process' part of the run's batch of that number, which with the seed says what is drawn."""
    import torch

    from utils.training.augment import augment

    batch = {name: rows.to(device, non_blocking=True) for name, rows in batch.items()}
    tiles = augment(batch["tiles"], batch["spot"].cpu().numpy(), args.seed, epoch, args.image_size)
    return replica(
        tiles,
        batch["bins"],
        batch["spot"],
        alpha,
        torch.Generator(device).manual_seed(args.seed * 1_000_003 + number),
        batch.get("expression"),
        args.expression_weight,
        args.matching_weight,
    )


def log_row(out, candidates: int) -> dict[str, float]:
    """Every loss of a batch beside its chance level."""
    return {
        "loss": out.loss.item(),
        "contrast_loss": out.contrast.item(),
        "contrast_chance": math.log(candidates),
        "matching_loss": out.matching.item(),
        "matching_chance": MATCHING_CHANCE,
        "matching_accuracy": out.matching_accuracy.item(),
        "expression_loss": out.expression.item(),
    }


def train_one_epoch(replica, model, loader, optimizer, schedule, accelerator, progress, args) -> dict[str, float]:
    """Means over the epoch's batches of every loss. The gradients of `order.accumulate` batches make a step."""
    from utils.training import loop

    model.train()
    order, epoch, sums, pairs_m = loader.batch_sampler, progress.epoch, progress.sums, []
    order.epoch, order.first = epoch, progress.step
    with tqdm(loader, desc=f"epoch {epoch}", unit="step", initial=order.first, disable=None) as bar:
        for i, batch in enumerate(bar, start=order.first):
            distributed.seed_everything(args.seed, epoch, i, distributed.rank())
            number = (epoch - args.Init_Epoch) * len(order) + i
            alpha = args.alpha * min((number + 1) / len(order), 1.0)
            candidates = args.batch_size + int(model.queue.state[0])
            last = (i + 1) % order.accumulate == 0
            with nullcontext() if last else accelerator.no_sync(replica):
                out = losses_of(replica, batch, epoch, number, alpha, accelerator.device, args)
                loop.stop_if_not_finite(out.loss.item(), epoch, i)
                accelerator.backward(out.loss / order.accumulate)
            pairs_m.append(out.pair_m)
            row = log_row(out, candidates)
            sums = {name: sums.get(name, 0.0) + value for name, value in row.items()}
            bar.set_postfix_str(
                f"contrast {row['contrast_loss']:.3f} (chance {row['contrast_chance']:.3f})", refresh=False
            )
            if last:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                schedule.step()
                model.after_step(*pairs_m)
                pairs_m = []
                progress.after_step(i + 1, sums)
    return distributed.mean({name: value / len(order) for name, value in sums.items()})


def validate(model, slices, bins, accelerator, args) -> dict[str, float]:
    """R@5 in whole slices, mean of both directions and of slices, beside its chance."""
    from utils.evaluation import retrieval
    from utils.features.cache import Inference, encode_pairs

    model.eval()
    inference, found, chances = Inference(accelerator, args.batch_size, args.workers), [], []
    for one, tokens in zip(slices, bins, strict=True):
        rows = one.rows_of("val")
        if not len(rows):
            continue
        image, gene = encode_pairs(model, one, tokens, rows, inference).vectors()
        ranks = retrieval.ranks_from_embeddings(image, gene), retrieval.ranks_from_embeddings(gene, image)
        found.append(np.mean([retrieval.recall_at(r, 5) for r in ranks]))
        chances.append(min(5 / len(rows), 1.0))
    return {"val_R@5": float(np.mean(found)), "val_R@5_chance": float(np.mean(chances))}


def report(row: dict[str, float]) -> str:
    return (
        f"epoch {row['epoch']}: contrast {row['contrast_loss']:.3f} (chance {row['contrast_chance']:.3f}), "
        f"matching {row['matching_loss']:.3f} (chance {row['matching_chance']:.3f}), accuracy "
        f"{row['matching_accuracy']:.3f} (chance 0.5), R@5 {row['val_R@5']:.3f} (chance {row['val_R@5_chance']:.3f}), "
        f"{row['seconds']:.0f} s"
    )


def draw_losses(log) -> None:
    from utils.evaluation import plotting

    chance = {f"{part}_loss": log.rows[-1][f"{part}_chance"] for part in ("contrast", "matching")}
    figure = plotting.loss_curves(log.rows, chance, "Stage one")
    plotting.save(figure, log.folder / "epoch_loss.png")


def train(slices, rows, accelerator, args) -> None:
    """From the encoders' start to the last epoch, or on from where a run was interrupted."""
    from model.masked_bins import MaskedBins
    from utils.files import arrays
    from utils.training import count_tables, loop, pretrain
    from utils.training.progress import Progress

    distributed.seed_everything(args.seed)
    memory = arrays.ArrayStore(args.memory, args.out)
    spots = dataset.spots_of(slices, "train")
    bins, train_bins = tokens_of(slices, memory)
    expression = targets.components(slices, args.components) if args.expression_weight else None
    n_components = len(expression.weights) if expression else 0
    model = build_model(args, slices, train_bins, n_components).to(accelerator.device)
    tables = (
        count_tables.read_tables(args.pretrain_data, slices, rows, args, args.downsample_counts)
        if args.pretrain_data
        else []
    )
    if args.pretrain_genes and not args.resume:
        pretrain.pretrain(
            MaskedBins(model.gene_encoder).to(accelerator.device), slices, bins, tables, accelerator, args
        )
        model.reset_momentum_encoders()
    extra = {"bins": train_bins}
    if expression:
        extra["expression"] = targets.train_scores(slices, expression, memory)
    if expression and not args.resume:
        print(start_from_ridge(model, slices, bins, expression, accelerator, args))
        model.reset_momentum_encoders()
    order = loop.EpochOrder(len(spots), args.batch_size, args.seed, args.accumulate)
    if order.accumulate < args.accumulate:
        settings.say([f"--accumulate {args.accumulate}: an epoch has {order.n_batches} batches, which make one step"])
    shares = tuning.rate_fractions(model.image_encoder, args.layer_decay)
    optimizer = loop.make_optimizer(model.parameters(), args, shares)
    schedule = loop.schedule(optimizer, len(order) // order.accumulate * (args.Epoch - args.Init_Epoch), args)
    about = {
        "sizes": asdict(model.sizes),
        "genes": slices[0].panels["input"].genes,
        "tile_scale": list(dataset.tile_scale(slices[0])),
        "table": [asdict(row) for row in rows],
        "counts_hashes": dataset.counts_hashes(slices),
        "pretrain_hashes": {one.name: one.counts_hash for one in tables},
        "settings": atomic.plain(vars(args)),
        "conditions": distributed.conditions(accelerator, args),
    }
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule, "scaler": accelerator.scaler}
    with (
        Progress(args, "stage_one", about, **parts) as progress,
        dataset.loader(dataset.TileBatches(slices, spots, extra), order, args.workers) as loader,
        loop.RunLog(args.logs, "stage_one", vars(args) | {"n_train_spots": len(spots)}) as log,
    ):
        replica, optimizer = accelerator.prepare(model, optimizer)
        if args.compile:
            model.compile_encoders()
        if distributed.is_main():
            splits.write_table(rows, args.out / "slices.csv")
        if not args.resume:
            progress.begin()
        for epoch in range(progress.epoch, args.Epoch):
            began = time.monotonic()
            row = {"epoch": epoch}
            row |= train_one_epoch(replica, model, loader, optimizer, schedule, accelerator, progress, args)
            with progress.interruptible():
                row |= validate(model, slices, bins, accelerator, args) | {"lr": schedule.get_last_lr()[0]}
            row["seconds"] = time.monotonic() - began
            log.add(row)
            print(report(row), flush=True)
            if distributed.is_main():
                draw_losses(log)
            progress.after_epoch(row["val_R@5"], row=row)
    print(f"{args.out / checkpoint.BEST}: R@5 {progress.best:.3f}; log in {log.folder}")


@exclusive_folder("out")
def main(args):
    check(args)
    slices, rows = load_data(args)
    with distributed.running(args.device, args.precision) as accelerator:
        train(slices, rows, accelerator, args)
    if args.export is not None and distributed.is_main():
        from utils.sharing import folder

        folder.export(args.out / checkpoint.BEST, args.export)
        print(f"{args.export}: to share")


if __name__ == "__main__":
    settings.run(main, parse_args())
