"""Stage one: align pictures and expression profiles by contrast with momentum distillation, and learn to match them.

    python train_mymodel.py --data data/Breast_cancer --image_weights deit_base_patch16_224-b5f2ef4d.pth
    python train_mymodel.py --resume

Reads tiles (image_tilling.py) and input genes (make_decoder_data.py) of the train and validation slices; writes
encoder_model/{best,last}_epoch_weights.pth, slices.csv beside them, and logs/stage_one/<time>/.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
from tqdm import tqdm

from utils import targets
from utils.slices import genes, table
from utils.start import start_from_ridge
from utils.training import arguments, checkpoint, datasets

MEASURED_SPOTS = 20_000  # tell mean and deviation of each gene's bins well enough
MATCHING_CHANCE = -(math.log(1 / 3) / 3 + 2 * math.log(2 / 3) / 3)  # one pair to two non-pairs, judged by their rate


def parse_args(argv=None):
    parser = arguments.shared(__doc__)
    arguments.add_training(parser, out="encoder_model")
    arguments.add_memory(parser)
    group = parser.add_argument_group("image encoder")
    group.add_argument("--image_encoder", default="deit_base_patch16_224.fb_in1k", help="name of a timm model")
    group.add_argument("--image_size", type=arguments.count, default=224, help="side of its input, pixels")
    group.add_argument(
        "--scales",
        type=arguments.share,
        nargs="+",
        default=[1.0],
        help="squares around the tile's centre that the encoder sees, shares of its side",
    )
    group.add_argument("--image_weights", default="timm", help="timm (downloads), none, or a .pth/.safetensors file")
    group.add_argument(
        "--image_tokens", type=arguments.count, default=50, help="tokens of a tile the fusion sees, most"
    )
    group = parser.add_argument_group("gene encoder")
    group.add_argument("--gene_depth", type=arguments.count, default=6, help="Performer blocks")
    group.add_argument("--gene_width", type=arguments.count, default=200)
    group.add_argument("--gene_heads", type=arguments.count, default=10, help="heads of 64")
    group.add_argument("--gene_tokens", type=arguments.count, default=64, help="tokens the genes are gathered into")
    group.add_argument("--gene_weights", type=Path, help="released scBERT checkpoint, e.g. panglao_pretrain.pth")
    group.add_argument("--gene2vec", type=Path, help="gene positions, e.g. gene2vec_16906.npy; needs --gene_vocab")
    group.add_argument("--gene_vocab", type=Path, help="genes in gene2vec's order: text, one per line, or h5ad")
    group.add_argument(
        "--tune_block", type=arguments.count_or_zero, default=4, help="block that trains on gene_weights"
    )
    group.add_argument(
        "--frozen_budget", type=arguments.not_negative, default=0.0, help="GiB on disk to keep what frozen blocks give"
    )
    group = parser.add_argument_group("method")
    group.add_argument("--width", type=arguments.count, default=512, help="shared width of pictures and profiles")
    group.add_argument("--fusion_blocks", type=arguments.count, default=3)
    group.add_argument("--queue_size", type=arguments.count_or_zero, default=4096, help="earlier spots as negatives")
    group.add_argument("--alpha", type=arguments.fraction, default=0.4, help="share of the twin in the target; 0: none")
    group.add_argument("--expression_weight", type=arguments.not_negative, default=5.0, help="of the expression loss")
    group.add_argument("--components", type=arguments.count, default=10, help="of expression that are learnt")
    group.add_argument("--matching_weight", type=arguments.not_negative, default=1.0, help="of the matching loss")
    return parser.parse_args(argv)


def check(args):
    """Flags and files, before anything heavy is imported."""
    arguments.check_training(args)
    if args.image_weights not in ("timm", "none"):
        arguments.require_file(Path(args.image_weights), "--image_weights", "or use timm or none")
    for flag in ("gene_weights", "gene2vec", "gene_vocab"):
        if getattr(args, flag) is not None:
            arguments.require_file(getattr(args, flag), f"--{flag}", "see README, weights")
    if (args.gene_weights or args.gene2vec) and not args.gene_vocab:
        raise ValueError("--gene_weights and --gene2vec need --gene_vocab: the files do not name their genes")
    if args.expression_weight and args.components > args.width:
        raise ValueError(f"--components {args.components}: expected at most --width {args.width}; raise it")
    if args.gene_weights and args.tune_block >= args.gene_depth:
        raise ValueError(f"--tune_block {args.tune_block}: expected less than --gene_depth {args.gene_depth}")


def load_data(args):
    """Slices of the train and validation part, the rows of the table, and what the split left to say."""
    rows, warnings = datasets.read_split(args)
    arguments.say(warnings)
    print(table.format_table(rows))
    return datasets.load_training(rows, args, ("input", "target") if args.expression_weight else ("input",)), rows


def tokens_of(slices, spill) -> tuple[list[np.ndarray], np.ndarray]:
    """Bins (S, G) uint8 of each slice, and of the train spots of all of them (n, G)."""
    n_genes = len(slices[0].panels["input"].genes)
    bins = [one.bins(spill.empty((len(one.barcodes), n_genes), np.uint8)) for one in slices]
    rows = [one.rows_of("train") for one in slices]
    train = spill.empty((sum(map(len, rows)), n_genes), np.uint8)
    ends = np.cumsum([0, *map(len, rows)])
    for own, chosen, start, stop in zip(bins, rows, ends, ends[1:], strict=False):
        train[start:stop] = own[chosen]
    return bins, train


def build_model(args, slices, train_bins: np.ndarray, n_components: int):
    import torch

    from model.stage_one import StageOne, StageOneSizes
    from utils.training.features import read_image_weights

    weights = read_image_weights(args.image_weights, "--image_weights")
    sizes = StageOneSizes(
        n_genes=len(slices[0].panels["input"].genes),
        image_pretrained=weights is not None,
        queue_size=max(min(args.queue_size, len(train_bins) - args.batch_size), 0),
        n_components=n_components,
        **{
            name: getattr(args, name)
            for name in StageOneSizes.__dataclass_fields__
            if hasattr(args, name) and name != "queue_size"
        },
    )
    model = StageOne(sizes, weights)
    load_gene_weights(model.gene_encoder, args, slices[0].panels["input"].genes)
    some = torch.from_numpy(train_bins[:: -(-len(train_bins) // MEASURED_SPOTS)]).float()
    model.gene_encoder.linear_path[0].measure(some.mean(0), some.std(0, correction=0))
    model.make_twins()
    return model


def load_gene_weights(encoder, args, panel: list[str]) -> None:
    """scBERT's trunk and gene2vec positions, as far as flags name them; says what was loaded and what was not."""
    import torch

    from model.gene_encoder import load_scbert, set_gene_positions

    if not (args.gene_weights or args.gene2vec):
        return
    vocabulary = {gene: i for i, gene in enumerate(genes.read_vocabulary(args.gene_vocab))}
    tensors = checkpoint.read_weights(args.gene_weights, "--gene_weights") if args.gene_weights else {}
    if args.gene_weights:
        skipped = load_scbert(encoder, tensors)
        print(f"{args.gene_weights.name}: {len(tensors) - len(skipped)} tensors loaded, 0 missing, skipped: {skipped}")
        encoder.freeze_trunk(args.tune_block)
    positions = torch.from_numpy(np.load(args.gene2vec)) if args.gene2vec else tensors.get("pos_emb.emb.weight")
    if positions is None:
        raise ValueError(f"--gene_weights: {args.gene_weights} has no pos_emb.emb.weight; give --gene2vec")
    found = set_gene_positions(encoder, positions, vocabulary, panel)
    print(f"gene positions: {found} of {len(panel)} panel genes found in {args.gene_vocab.name}")


def train_one_epoch(model, loader, optimizer, schedule, accelerator, epoch: int, args) -> dict[str, float]:
    """Means over the epoch's steps of every loss, each beside its chance level."""
    import torch

    from utils.training import loop
    from utils.training.augment import augment

    model.train()
    loop.seed_everything(args.seed, epoch)
    loader.batch_sampler.epoch = epoch
    n_steps, sums = len(loader), {}
    with tqdm(loader, desc=f"epoch {epoch}", unit="step", disable=None) as bar:
        for step, batch in enumerate(bar):
            number = (epoch - args.Init_Epoch) * n_steps + step
            batch = {name: rows.to(accelerator.device, non_blocking=True) for name, rows in batch.items()}
            tiles = augment(batch["tiles"], batch["spot"].cpu().numpy(), args.seed, epoch, args.image_size)
            alpha = args.alpha * min((number + 1) / n_steps, 1.0)
            draws = torch.Generator(accelerator.device).manual_seed(args.seed * 1_000_003 + number)
            candidates = len(tiles) + int(model.queue.state[0])
            hidden = batch["hidden"].view(torch.bfloat16).float() if "hidden" in batch else None
            out = model(
                tiles,
                batch["bins"],
                batch["spot"],
                alpha,
                draws,
                batch.get("expression"),
                args.expression_weight,
                args.matching_weight,
                hidden,
            )
            loop.stop_if_not_finite(out.loss.item(), epoch, step)
            optimizer.zero_grad(set_to_none=True)
            accelerator.backward(out.loss)
            optimizer.step()
            schedule.step()
            model.after_step(out.twin)
            row = {
                "loss": out.loss.item(),
                "contrast_loss": out.contrast.item(),
                "contrast_chance": math.log(candidates),
                "matching_loss": out.matching.item(),
                "matching_chance": MATCHING_CHANCE,
                "matching_accuracy": out.matching_accuracy.item(),
                "expression_loss": out.expression.item(),
            }
            sums = {name: sums.get(name, 0.0) + value for name, value in row.items()}
            bar.set_postfix_str(
                f"contrast {row['contrast_loss']:.3f} (chance {row['contrast_chance']:.3f})", refresh=False
            )
    return {name: value / n_steps for name, value in sums.items()}


def validate(model, slices, bins, accelerator, args) -> dict[str, float]:
    """R@5 in whole slices, mean of both directions and of slices, beside its chance."""
    from utils.evaluation import retrieval
    from utils.training.features import encode_pairs

    model.eval()
    found, chances = [], []
    for one, tokens in zip(slices, bins, strict=True):
        rows = one.rows_of("val")
        if not len(rows):
            continue
        image, gene = encode_pairs(model, one, tokens, rows, accelerator, args).vectors()
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


def main(args):
    check(args)
    slices, rows = load_data(args)
    from utils.training import distributed, frozen, loop, spill

    accelerator = distributed.start(args.device, args.precision)
    loop.seed_everything(args.seed)
    memory = spill.Spill(args.memory, args.out)
    spots = datasets.spots_of(slices, "train")
    bins, train_bins = tokens_of(slices, memory)
    expression = targets.components(slices, args.components) if args.expression_weight else None
    n_components = len(expression.weights) if expression else 0
    model = build_model(args, slices, train_bins, n_components).to(accelerator.device)
    hidden = frozen.outputs(model.gene_encoder, train_bins, accelerator, args)
    extra = {"bins": train_bins} if hidden is None else {"bins": train_bins, "hidden": hidden}
    if expression:
        extra["expression"] = targets.train_scores(slices, expression, memory)
    if expression and not args.resume:
        print(start_from_ridge(model, slices, bins, expression, accelerator, args))
        model.make_twins()
    order = datasets.EpochOrder(len(spots), args.batch_size, args.seed)
    loader = datasets.loader(datasets.TileBatches(slices, spots, extra), order, args.workers)
    optimizer = loop.make_optimizer(model.parameters(), args)
    schedule = loop.schedule(optimizer, len(order) * (args.Epoch - args.Init_Epoch), args)
    about = {
        "sizes": asdict(model.sizes),
        "genes": slices[0].panels["input"].genes,
        "tile_scale": list(datasets.tile_scale(slices[0])),
        "table": [asdict(row) for row in rows],
        "counts_hashes": datasets.counts_hashes(slices),
        "settings": checkpoint.plain(vars(args)),
    }
    first, best = args.Init_Epoch, -1.0
    if args.resume:
        first, best = checkpoint.resume(args.out / checkpoint.LAST, "stage_one", model, optimizer, schedule, about)
    model, optimizer = accelerator.prepare(model, optimizer)
    if args.compile:
        model.compile_encoders()
    log = loop.RunLog(args.logs, "stage_one", vars(args) | {"n_train_spots": len(spots)})
    args.out.mkdir(parents=True, exist_ok=True)
    table.write_table(rows, args.out / "slices.csv")
    for epoch in range(first, args.Epoch):
        began = time.monotonic()
        row = {"epoch": epoch, **train_one_epoch(model, loader, optimizer, schedule, accelerator, epoch, args)}
        row |= validate(model, slices, bins, accelerator, args) | {"lr": schedule.get_last_lr()[0]}
        row["seconds"] = time.monotonic() - began
        log.add(row)
        print(report(row), flush=True)
        draw_losses(log)
        state = {"model": model.state_dict(), "row": row, **about}
        best = checkpoint.save_epoch(args.out, "stage_one", epoch, row["val_R@5"], best, optimizer, schedule, state)
    log.close()
    print(f"{args.out / checkpoint.BEST}: R@5 {best:.3f}; log in {log.folder}")


if __name__ == "__main__":
    arguments.run(main, parse_args())
