"""Stage one: align images and expression profiles by contrast with momentum distillation, and learn to match them.

    python train_mymodel.py --data data/Breast_cancer --image_weights deit_base_patch16_224-b5f2ef4d.pth
    python train_mymodel.py --resume

Reads tiles (image_tilling.py) and input genes (make_decoder_data.py) of the train and validation slices; writes
encoder_model/{best,last,previous}_epoch_weights.pth, slices.csv beside them, and logs/stage_one/<time>/.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from model import tuning
from utils import arguments, distributed
from utils import settings as flags
from utils.features import dataset
from utils.files.arrays import ArrayStore
from utils.files.atomic import write_figure
from utils.files.exclusive import exclusive_folder
from utils.settings import StageOneSettings
from utils.slices import splits
from utils.training import checkpoint, gene_weights, split, targets

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor, nn

    from model.stage_one import StageOne, StepOutput
    from utils.training.loop import EpochOrder
    from utils.training.trainer import Row, Trainer

MATCHING_CHANCE = math.log(3) - 2 / 3 * math.log(2)  # one pair to two non-pairs, scored by their rate
MEASURED_SPOTS = 20_000  # are enough for mean and deviation of each gene's bins
SIZES = (  # of the model, by the name of their flag
    "image_encoder image_size crop_scales gene_depth gene_width gene_heads gene_tokens fusion_blocks image_tokens width"
).split()


def parse_args(argv: list[str] | None = None) -> StageOneSettings:
    parser = flags.shared(__doc__)
    flags.add_training(parser, out="encoder_model")
    flags.add_memory(parser)
    group = flags.add_encoders(parser)
    group.add_argument(
        "--tune",
        type=tuning.choice,
        default="all",
        metavar="WHAT",
        help="what of the image encoder trains: all, last:N, norm, none",
    )
    group.add_argument(
        "--layer_decay",
        type=arguments.fraction_above_zero,
        default=1.0,
        help="factor of the learning rate from a layer of the image encoder to the one below; 1: none",
    )
    gene_weights.add_flags(parser)
    group = parser.add_argument_group("method")
    group.add_argument("--width", type=arguments.count, default=512, help="width of the space of images and profiles")
    group.add_argument("--fusion_blocks", type=arguments.count, default=3, help="blocks of the fusion module")
    group.add_argument(
        "--queue_size",
        type=arguments.count_or_zero,
        default=4096,
        help="earlier spots that are kept as negatives; 0: none",
    )
    group.add_argument(
        "--alpha", type=arguments.fraction, default=0.4, help="weight of the momentum encoders' soft targets; 0: none"
    )
    group.add_argument(
        "--expression_weight", type=arguments.not_negative, default=5.0, help="weight of the expression loss; 0: none"
    )
    group.add_argument(
        "--components", type=arguments.count, default=10, help="principal components that this loss predicts"
    )
    group.add_argument(
        "--matching_weight", type=arguments.not_negative, default=1.0, help="weight of the matching loss"
    )
    group.add_argument(
        "--batch_neighbours",
        type=arguments.count_or_zero,
        default=8,
        help="half of a batch are spots at random, each with one of so many nearest spots; 0: all at random",
    )
    group.add_argument("--accumulate", type=arguments.count, default=1, help="batches per step of the optimiser")
    return StageOneSettings(**flags.parse_training(parser, argv))


def check(settings: StageOneSettings) -> None:
    """Flags and files, before anything heavy is imported."""
    flags.check_training(settings)
    flags.check_encoders(settings)
    gene_weights.check(settings)
    if settings.expression_weight and settings.components > settings.width:
        raise ValueError(
            f"--components: expected at most --width {settings.width}, found {settings.components}; lower it"
        )


def load_data(settings: StageOneSettings) -> tuple[list[dataset.SliceData], list[splits.SliceRow]]:
    """Slices of the train and validation part, and the rows of the table."""
    rows, warnings = split.read_split(settings)
    flags.warn(warnings)
    print(splits.format_table(rows))
    roles = ("input", "target") if settings.expression_weight else ("input",)
    return split.load_training(rows, settings, roles, settings.downsample_counts), rows


def tokens_of(slices: list[dataset.SliceData], store: ArrayStore) -> tuple[list[np.ndarray], np.ndarray]:
    """Bins (S, G) uint8 of each slice, and of the train spots of all of them (n, G)."""
    n_genes = len(slices[0].panels["input"].genes)
    bins = [slice_.bins(store.empty((len(slice_.barcodes), n_genes), np.uint8)) for slice_ in slices]
    rows = [slice_.rows_of("train") for slice_ in slices]
    train = store.empty((sum(map(len, rows)), n_genes), np.uint8)
    ends = np.cumsum([0, *map(len, rows)])
    for of_slice, of_train, start, stop in zip(bins, rows, ends, ends[1:], strict=False):
        train[start:stop] = of_slice[of_train]
    return bins, train


def build_model(
    slices: list[dataset.SliceData], train_bins: np.ndarray, n_components: int, settings: StageOneSettings
) -> StageOne:
    """Both encoders with their pretrained weights, and what of them trains."""
    import torch

    from model.stage_one import StageOne, StageOneSizes
    from utils.features.cache import read_image_weights

    weights = read_image_weights(settings.image_weights, "--image_weights")
    panel = slices[0].panels["input"].genes
    queue_size = max(min(settings.queue_size, len(train_bins) - settings.batch_size), 0)
    sizes = StageOneSizes(
        n_genes=len(panel),
        image_pretrained=weights is not None,
        queue_size=queue_size,
        momentum_encoders=settings.alpha > 0 or queue_size > 0,
        n_components=n_components,
        **{name: getattr(settings, name) for name in SIZES},
    )
    model = StageOne(sizes, weights)
    gene_weights.load(model.gene_encoder, settings, panel, [slice_.root for slice_ in slices])
    model.gene_encoder.measure(torch.from_numpy(train_bins[:: -(-len(train_bins) // MEASURED_SPOTS)]).float())
    if model.image_encoder.weights_report:
        print(model.image_encoder.weights_report)
    tuning.tune(model.image_encoder, settings.tune)
    model.reset_momentum_encoders()
    return model


def initialise(
    model: StageOne,
    slices: list[dataset.SliceData],
    bins: list[np.ndarray],
    tables: list,
    expression: targets.Components | None,
    accelerator: Accelerator,
    settings: StageOneSettings,
) -> None:
    """Pretrain the gene encoder, and start both encoders at components of expression, as far as flags ask for it."""
    from model.masked_bins import MaskedBins
    from utils.features.cache import Inference
    from utils.training import initialisation, pretrain

    if settings.pretrain_genes:
        masked = MaskedBins(model.gene_encoder).to(accelerator.device)
        pretrain.pretrain(masked, slices, bins, tables, accelerator, settings)
    if expression:
        inference = Inference(accelerator, settings.batch_size, settings.workers)
        print(initialisation.warm_start_stage_one(model, slices, bins, expression, inference, settings.seed))
    model.reset_momentum_encoders()


def losses_of(
    trainer: Trainer,
    replica: nn.Module,
    batch: dict,
    spots: np.ndarray,
    number: int,
    alpha: float,
    settings: StageOneSettings,
) -> StepOutput:
    """Forward pass on this process' part of the run's batch of that number, which seeds its draws; `spots` are the
    batch's, on the host."""
    import torch

    from utils.training.augment import augment

    tiles = augment(batch["tiles"], spots, settings.seed, trainer.epoch, settings.image_size)
    return replica(
        tiles,
        batch["bins"],
        batch["spot"],
        alpha,
        torch.Generator().manual_seed(settings.seed * 1_000_003 + number),
        batch.get("expression"),
        settings.expression_weight,
        settings.matching_weight,
    )


def figures_of(out: StepOutput) -> dict[str, Tensor]:
    """Every loss of a batch, on the device."""
    return {
        "loss": out.loss,
        "contrast_loss": out.contrast,
        "matching_loss": out.matching,
        "matching_auc": out.matching_auc,
        "expression_loss": out.expression,
    }


def train_one_epoch(
    trainer: Trainer,
    model: StageOne,
    replica: nn.Module,
    loader: dataset.Loader,
    order: EpochOrder,
    settings: StageOneSettings,
) -> Row:
    """Means over the epoch's batches of every loss. The gradients of `order.accumulate` batches make a step."""
    from utils.training import loop

    model.train()
    epoch, pairs_m, device = trainer.epoch, [], trainer.accelerator.device
    figures = loop.StepFigures(epoch, trainer.sums, device)
    order.epoch, order.first = epoch, trainer.n_steps
    batches = dataset.ahead(loader, device)
    with tqdm(batches, f"epoch {epoch}", len(order), unit="step", initial=order.first, disable=None) as bar:
        for i, (batch, spots) in enumerate(bar, start=order.first):
            distributed.seed_everything(settings.seed, epoch, i, distributed.rank())
            number = (epoch - settings.Init_Epoch) * len(order) + i
            alpha = settings.alpha * min((number + 1) / len(order), 1.0)
            chances = {
                "contrast_chance": model.contrast_chance(settings.batch_size),
                "matching_chance": MATCHING_CHANCE,
            }
            last = (i + 1) % order.accumulate == 0
            with nullcontext() if last else trainer.accelerator.no_sync(replica):
                out = losses_of(trainer, replica, batch, spots, number, alpha, settings)
                figures.add(i, figures_of(out), chances)
                trainer.backward(out.loss / order.accumulate)
            pairs_m.append(out.pair_m)
            if figures.last:
                contrast, chance = (figures.last[name] for name in ("contrast_loss", "contrast_chance"))
                bar.set_postfix_str(f"contrast {contrast:.3f} (chance {chance:.3f})", refresh=False)
            if last:
                trainer.step()
                model.after_step(*pairs_m)
                pairs_m = []
                trainer.after_step(i + 1, figures)
    return trainer.means(figures, len(order))


def validate(
    model: StageOne,
    slices: list[dataset.SliceData],
    bins: list[np.ndarray],
    accelerator: Accelerator,
    settings: StageOneSettings,
) -> Row:
    """R@5 in whole slices, mean of both directions and of slices, beside its chance."""
    from utils.evaluation import retrieval
    from utils.features.cache import Inference, encode_pairs

    model.eval()
    inference = Inference(accelerator, settings.batch_size, settings.workers)
    recalls, chances = [], []
    for slice_, tokens in zip(slices, bins, strict=True):
        rows = slice_.rows_of("val")
        if not len(rows):
            continue
        image, gene = encode_pairs(model, slice_, tokens, rows, inference).vectors()
        ranks = retrieval.ranks_from_embeddings(image, gene), retrieval.ranks_from_embeddings(gene, image)
        recalls.append(np.mean([retrieval.recall_at(r, 5) for r in ranks]))
        chances.append(min(5 / len(rows), 1.0))
    return {"val_R@5": float(np.mean(recalls)), "val_R@5_chance": float(np.mean(chances))}


def report(row: Row) -> str:
    matching = (
        f"matching {row['matching_loss']:.3f} (chance {row['matching_chance']:.3f}), AUC {row['matching_auc']:.3f} "
        "(chance 0.5), "
    )
    return (
        f"epoch {row['epoch']}: contrast {row['contrast_loss']:.3f} (chance {row['contrast_chance']:.3f}), "
        f"{matching if row['matching_loss'] else ''}R@5 {row['val_R@5']:.3f} (chance {row['val_R@5_chance']:.3f}), "
        f"{row['seconds']:.0f} s"
    )


def draw_losses(trainer: Trainer) -> None:
    """epoch_loss.png of the log."""
    from utils.evaluation import plotting

    rows = trainer.run_log.rows
    chance = {f"{name}_loss": rows[-1][f"{name}_chance"] for name in ("contrast", "matching")}
    write_figure(trainer.run_log.folder / "epoch_loss.png", plotting.loss_curves(rows, chance, "Stage one"))


def make_trainer(
    model: StageOne,
    order: EpochOrder,
    slices: list[dataset.SliceData],
    about: dict,
    accelerator: Accelerator,
    settings: StageOneSettings,
) -> Trainer:
    """The run with its optimiser, resumed if asked, and what a checkpoint holds of the data."""
    from utils.training import loop
    from utils.training.trainer import Trainer

    if order.accumulate < settings.accumulate:
        n = order.n_batches
        flags.warn([f"--accumulate {settings.accumulate}: an epoch has {n} batches, which make one step"])
    fractions = tuning.rate_fractions(model.image_encoder, settings.layer_decay)
    optimizer = loop.make_optimizer(model.parameters(), settings, fractions)
    n_steps = len(order) // order.accumulate * (settings.Epoch - settings.Init_Epoch)
    schedule = loop.schedule(optimizer, n_steps, settings)
    about |= {
        "sizes": asdict(model.sizes),
        "genes": slices[0].panels["input"].genes,
        "tile_scale": list(dataset.tile_scale(slices[0])),
        "counts_hashes": dataset.counts_hashes(slices),
    }
    trainer = Trainer(settings, "stage_one", about, accelerator, model, optimizer, schedule, order.n_spots)
    return trainer.resume_if_asked()


def train(
    slices: list[dataset.SliceData],
    rows: list[splits.SliceRow],
    accelerator: Accelerator,
    settings: StageOneSettings,
) -> None:
    """From the pretrained encoders to the last epoch, or on from where a run was interrupted."""
    from utils.training import count_tables, loop

    distributed.seed_everything(settings.seed)
    store = ArrayStore(settings.memory, settings.out)
    bins, train_bins = tokens_of(slices, store)
    expression = targets.components(slices, settings.components) if settings.expression_weight else None
    model = build_model(slices, train_bins, len(expression.weights) if expression else 0, settings)
    model = model.to(accelerator.device)
    folder, depth = settings.pretrain_data, settings.downsample_counts
    tables = count_tables.read_tables(folder, slices, rows, settings, depth) if folder else []
    extra = {"bins": train_bins}
    if expression:
        extra["expression"] = targets.train_scores(slices, expression, store)
    if not settings.resume:
        initialise(model, slices, bins, tables, expression, accelerator, settings)

    spots = dataset.spots_of(slices, "train")
    near = dataset.nearest_spots(slices, spots, settings.batch_neighbours) if settings.batch_neighbours else None
    order = loop.EpochOrder(len(spots), settings.batch_size, settings.seed, settings.accumulate, near)
    pretrain_hashes = {table.name: table.counts_hash for table in tables}
    about = {"table": [asdict(row) for row in rows], "pretrain_hashes": pretrain_hashes}
    with (
        make_trainer(model, order, slices, about, accelerator, settings) as trainer,
        dataset.loader(dataset.TileBatches(slices, spots, extra), order, settings.workers) as loader,
    ):
        replica = accelerator.prepare(model)
        if settings.compile:
            model.compile_encoders(settings.batch_size)
        if distributed.is_main():
            splits.write_table(rows, settings.out / "slices.csv")
        if not settings.resume:
            trainer.begin()
        for _ in trainer.epochs():
            row = train_one_epoch(trainer, model, replica, loader, order, settings)
            with trainer.interruptible():
                row |= validate(model, slices, bins, accelerator, settings)
            row = trainer.log(row)
            print(report(row), flush=True)
            if distributed.is_main():
                draw_losses(trainer)
            trainer.after_epoch(row["val_R@5"])
    print(f"{settings.out / checkpoint.BEST}: R@5 {trainer.best:.3f}; log in {trainer.run_log.folder}")


@exclusive_folder("out")
def main(settings: StageOneSettings) -> None:
    check(settings)
    slices, rows = load_data(settings)
    with distributed.running(settings.device, settings.precision) as accelerator:
        train(slices, rows, accelerator, settings)
    if settings.export is not None:
        from utils.sharing import export

        export.export_best(settings)


if __name__ == "__main__":
    flags.run(main, parse_args())
