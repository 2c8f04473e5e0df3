"""Evaluate stage one: does a image find its own expression profile among others?

    python get_accuracy_image.py --encoder encoder_model/best_epoch_weights.pth --part test

Reads the checkpoint, tiles and input genes of the part's slices, and of the train and validation slices for the cheap
row `depth`. Writes results/retrieval/: metrics.json, spots.csv, predictions.h5ad (vectors, and for each image the ten
most similar profiles of its slice), retrieval_curve.png, report.html with the table and examples.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from utils import distributed, settings
from utils.features import dataset
from utils.files.atomic import write_record
from utils.files.exclusive import exclusive_folder
from utils.slices import export
from utils.training import checkpoint, split

ROWS = ("depth", "contrastive", "matching", "reranked")
SPOTS_AT_ONCE = 32  # neighbours in the file are often neighbours in the tissue, and share candidates
NEAREST = 10
SHOWN = 6  # of them beside an example


def parse_args(argv=None):
    parser = settings.shared(__doc__, part="test")
    group = settings.add_evaluation(parser, out="results/retrieval")
    group.add_argument("--encoder", type=Path, default=Path("encoder_model/best_epoch_weights.pth"), help="stage one")
    group.add_argument("--neighbours", type=settings.count, default=8, help="nearest spots that stand as candidates")
    settings.add_memory(parser)
    return parser.parse_args(argv)


def load_model(args, state: dict, device):
    from model.stage_one import StageOne, StageOneSizes

    model = StageOne(StageOneSizes(**state["sizes"]))
    checkpoint.fit(model, state["model"], args.encoder, "--encoder")
    return model.to(device).eval()


def match_scores(model, encoded, candidates: np.ndarray, accelerator) -> np.ndarray:
    """Fusion logit of each spot's image with each candidate's profile: (S, K); 0 where it is padding."""
    import torch

    order, device = dataset.in_turn(len(candidates), SPOTS_AT_ONCE), accelerator.device

    def own():
        for rows in distributed.own_batches(order):
            profiles, place = np.unique(np.maximum(candidates[rows], 0), return_inverse=True)
            with torch.no_grad(), accelerator.autocast():
                genes = model.fusion.precompute_genes(encoded.gene_tokens[profiles].to(device))
                genes = genes[torch.from_numpy(place.reshape(candidates[rows].shape)).to(device)]
                images = model.fusion.precompute_images(encoded.image_tokens[rows].to(device))
                yield (model.fusion.score(genes, images).float(),)

    logits = np.concatenate([found.cpu().numpy() for (found,) in distributed.in_order(own(), order)])
    return np.where(candidates >= 0, logits, 0)


def nearest_profiles(encoded, device) -> np.ndarray:
    """Rows of the profiles most similar to each image, best first: (S, NEAREST), -1 where there are fewer."""
    import torch

    from utils.evaluation.gallery import top_k

    image, gene = map(torch.from_numpy, encoded.vectors())
    rows = top_k(image.to(device), gene, min(NEAREST, len(gene)))[1].cpu().numpy()
    return np.pad(rows, ((0, 0), (0, NEAREST - rows.shape[1])), constant_values=-1)


def gallery_scores(model, encoded, predicted_depth, log_depth, candidates, accelerator) -> dict[str, np.ndarray]:
    """Scores (S, K) of all rows. `reranked` adds the log odds of matching to the log share of the contrast."""
    from utils.evaluation import retrieval

    image, gene = encoded.vectors()
    scale = model.contrast.logit_scale.exp().item()
    similarity = np.stack([np.einsum("sd,sd->s", image, gene[column]) for column in candidates.T], axis=1) * scale
    matching = match_scores(model, encoded, candidates, accelerator)
    shown = np.where(candidates >= 0, similarity, -np.inf)
    top = shown.max(1, keepdims=True)
    log_share = similarity - top - np.log(np.exp(shown - top).sum(1, keepdims=True))
    return {
        "depth": retrieval.depth_scores(predicted_depth, log_depth[candidates]),
        "contrastive": similarity,
        "matching": matching,
        "reranked": matching + log_share,
    }


def predicted_depths(args, state: dict, slices, taught, accelerator) -> list[np.ndarray]:
    """Log total counts, relative to the slice's mean, that ridge reads off the pretrained encoder's features."""
    from utils.evaluation import baselines
    from utils.features import cache

    several, inference = [*taught, *slices], cache.Inference(accelerator, args.batch_size, args.workers)
    found = cache.pretrained_features(state, state["settings"], several, inference, args.image_weights)
    found = [baselines.standardise(f) for f in found]

    def images(part, some, some_features):
        seen = [cache.as_images(one, f, part) for one, f in zip(some, some_features, strict=True)]
        return [p for p in seen if len(p["log_depth"])]

    train, val = (images(part, taught, found[: len(taught)]) for part in ("train", "val"))
    x_train, x_val = ([baselines.rings(p) for p in part] for part in (train, val))
    ridge = baselines.fit_depth(x_train, [p["log_depth"] for p in train], x_val, [p["log_depth"] for p in val])
    return [ridge.predict(baselines.rings(p))[:, 0] for p in images(args.part, slices, found[len(taught) :])]


def score_slice(model, one, predicted_depth, accelerator, args) -> dict:
    """Everything measured on one slice: galleries, scores, blocks, ranks, nearest profiles, vectors."""
    from utils.evaluation import bootstrap, retrieval
    from utils.features import cache
    from utils.files.arrays import ArrayStore

    rows = one.rows_of(args.part)
    store, inference = ArrayStore(args.memory, args.out), cache.Inference(accelerator, args.batch_size, args.workers)
    encoded = cache.encode_pairs(model, one, one.bins(), rows, inference, store)
    image, gene = encoded.vectors()
    log_depth = np.log(one.total_counts[rows])
    galleries = {
        "neighbours": retrieval.neighbour_candidates(one.xy_fullres_px[rows], args.neighbours, args.seed),
        "random10": retrieval.random_candidates(len(rows), 9, args.seed),
    }
    return {
        "rows": rows,
        "galleries": galleries,
        "scores": {
            name: gallery_scores(
                model, encoded, predicted_depth, log_depth - log_depth.mean(), gallery.candidates, accelerator
            )
            for name, gallery in galleries.items()
        },
        "blocks": bootstrap.blocks(one.xy_fullres_px[rows], one.pitch_fullres_px),
        "ranks": (retrieval.ranks_from_embeddings(image, gene), retrieval.ranks_from_embeddings(gene, image)),
        "nearest": nearest_profiles(encoded, accelerator.device),
        "vectors": (image, gene),
    }


def figures_of(scored: list[dict], seed: int) -> dict:
    """The body of metrics.json for one or several slices."""
    from utils.evaluation import retrieval

    result: dict = {"n_spots": sum(len(one["rows"]) for one in scored)}
    for name in ("neighbours", "random10"):
        scores = {row: [one["scores"][name][row] for one in scored] for row in ROWS}
        galleries = [one["galleries"][name] for one in scored]
        result[name] = retrieval.evaluate_gallery(scores, galleries, [one["blocks"] for one in scored], seed=seed)
    result["slice"] = retrieval.mean_slice_figures([retrieval.slice_figures(*one["ranks"]) for one in scored])
    return result


def examples_of(one, scored: dict, seed: int) -> list:
    """Images of one slice with the profiles most similar to them, by the rule that the page states."""
    from utils.report import html, parts

    rows, ranks, (image, gene) = scored["rows"], scored["ranks"][0], scored["vectors"]
    found = []
    for kind, spot in parts.choose_examples(ranks, NEAREST, seed):
        places = {int(other): rank for rank, other in enumerate(scored["nearest"][spot][:SHOWN], 1) if other >= 0}
        places.setdefault(spot, int(ranks[spot]))
        tiles = one.pack.read(one.tile_rows[rows[[spot, *places]]])
        candidates = [
            (tile, f"rank {rank}: {one.barcodes[rows[other]]}", float(image[spot] @ gene[other]), other == spot)
            for tile, (other, rank) in zip(tiles[1:], places.items(), strict=True)
        ]
        words = f"{parts.KINDS[kind]} (rank {ranks[spot]} of {len(rows)})"
        title = f"{one.name}, {one.barcodes[rows[spot]]}: {words}"
        found.append(html.RetrievalExample(tiles[0], title, candidates))
    return found


def write_page(path: Path, metrics: dict, slices, scored: list[dict], state: dict, args) -> None:
    from utils.report import html, parts

    report = html.Report(
        title=f"Retrieval: {args.part} slices",
        unit="",
        genes=[],
        slices=[],
        gene_columns={},
        tables=parts.retrieval_tables(metrics),
        examples=[e for one, s in zip(slices, scored, strict=True) for e in examples_of(one, s, args.seed)],
        examples_note=parts.EXAMPLES_NOTE.format(seed=args.seed, n=SHOWN),
        settings=vars(args) | {f"training: {key}": value for key, value in state["settings"].items()},
    )
    html.write_report(path, report)


def write_results(out: Path, metrics: dict, slices, scored: list[dict], genes: list[str]) -> None:
    import pandas as pd

    from utils.evaluation import expression, plotting, retrieval

    out.mkdir(parents=True, exist_ok=True)
    obs = {
        f"{name}_{row}": np.concatenate(
            [
                retrieval.hits(s["scores"][name][row], s["galleries"][name].truth, s["galleries"][name].candidates)
                for s in scored
            ]
        )
        for name in ("neighbours", "random10")
        for row in ROWS
    }
    obs["rank_image_to_gene"], obs["rank_gene_to_image"] = (
        np.concatenate([s["ranks"][i] for s in scored]) for i in (0, 1)
    )
    parts = [
        (one.name, one.root, one.barcodes[s["rows"]], one.xy_fullres_px[s["rows"]])
        for one, s in zip(slices, scored, strict=True)
    ]
    x = np.concatenate([one.bins()[s["rows"]] for one, s in zip(slices, scored, strict=True)])
    adata = export.spots_anndata(parts, x, pd.DataFrame(index=genes), obs)
    for i, kind in enumerate(("image", "gene")):
        adata.obsm[f"X_{kind}"] = np.concatenate([s["vectors"][i] for s in scored])
    first = np.cumsum([0, *(len(s["rows"]) for s in scored)])
    adata.obsm["nearest_profiles"] = np.concatenate(
        [np.where(s["nearest"] < 0, -1, s["nearest"] + start) for s, start in zip(scored, first, strict=False)]
    )
    adata.uns["magic"] = {
        "X": "bins of log2(1 + counts per 10,000), as the gene encoder reads them",
        "nearest_profiles": "rows of this file whose profiles are most similar to the image, within the slice",
    }
    export.write_anndata(out / "predictions.h5ad", adata)
    adata.obs.to_csv(out / "spots.csv.part", index_label="spot")
    (out / "spots.csv.part").replace(out / "spots.csv")
    k = np.unique(np.geomspace(1, max(len(s["rows"]) for s in scored), 30).astype(int))
    recall = {
        way: np.mean([[retrieval.recall_at(s["ranks"][i], n) for n in k] for s in scored], axis=0)
        for i, way in enumerate(("image to gene", "gene to image"))
    }
    chance = np.mean([np.minimum(k / len(s["rows"]), 1) for s in scored], axis=0)
    plotting.save(plotting.retrieval_curve(k, recall, chance), out / "retrieval_curve.png")
    write_record(out / "metrics.json", expression.plain(metrics))


def summary(metrics: dict) -> str:
    lines = [f"{metrics['n_spots']} spots            " + "".join(f"{row:>24}" for row in ("chance", *ROWS))]
    for name in ("neighbours", "random10"):
        cells = [f"{metrics[name]['chance']:.3f}"]
        cells += [
            f"{metrics[name][r]:.3f} [{low:.3f}, {high:.3f}]"
            for r in ROWS
            for low, high in [metrics[name]["interval"][r]]
        ]
        lines.append(f"{name:<20}" + "".join(f"{cell:>24}" for cell in cells))
    for way in ("chance", "image_to_gene", "gene_to_image"):
        lines.append(
            f"slice, {way:<14} " + ", ".join(f"{key} {value:.3g}" for key, value in metrics["slice"][way].items())
        )
    return "\n".join(lines)


@exclusive_folder("out")
def main(args):
    checkpoint.require_checkpoint(args.encoder, "--encoder", "run train_mymodel.py first")
    state = checkpoint.load(args.encoder, "stage_one", "--encoder")
    slices, taught = split.load_evaluation(args, state, "--encoder", ("input",))
    with distributed.running(args.device, args.precision) as accelerator:
        model = load_model(args, state, accelerator.device)
        depths = predicted_depths(args, state, slices, taught, accelerator)
        scored = [score_slice(model, one, depth, accelerator, args) for one, depth in zip(slices, depths, strict=True)]
        if not distributed.go_on_alone():
            return
    metrics = figures_of(scored, args.seed)
    metrics["per_slice"] = {one.name: figures_of([s], args.seed) for one, s in zip(slices, scored, strict=True)}
    write_results(args.out, metrics, slices, scored, state["genes"])
    write_page(args.out / "report.html", metrics, slices, scored, state, args)
    print(summary(metrics))
    print(f"results in {args.out}")


if __name__ == "__main__":
    settings.run(main, parse_args())
