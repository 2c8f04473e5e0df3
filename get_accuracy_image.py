"""Evaluate stage one: is an image's own expression profile found among others?

    python get_accuracy_image.py --encoder encoder_model/best_epoch_weights.pth --part test

Reads the checkpoint, tiles and input genes of the part's slices, and of the train and validation slices for the
baseline `depth`. Writes results/retrieval/: metrics.json, spots.csv, predictions.h5ad (vectors, and for each image the
ten most similar profiles of its slice), retrieval_curve.png, report.html with the table and examples.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from utils import arguments, distributed, settings
from utils.features import dataset
from utils.files.atomic import write_figure, write_record, write_whole
from utils.files.exclusive import exclusive_folder
from utils.report.tables import GALLERIES, RETRIEVAL_METHODS, leak_note, retrieval_lines
from utils.training import checkpoint, split
from utils.words import count_of

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from model.stage_one import StageOne
    from utils.evaluation.retrieval import Gallery
    from utils.features.cache import EncodedPairs
    from utils.features.dataset import SliceData
    from utils.report.page import RetrievalExample

SPOTS_AT_ONCE = 32  # neighbours in the file are often neighbours in the tissue, and share candidates
NEAREST = 10
SHOWN = 6  # of them beside an example


@dataclass(kw_only=True)
class Settings(settings.EvaluationSettings):
    encoder: Path
    neighbours: int


@dataclass(frozen=True)
class ScoredSlice:
    """All that is evaluated of one slice. S spots of the part, K candidates, D width, G input genes."""

    rows: np.ndarray  # (S,) of the slice
    bins: np.ndarray  # (S, G)
    image: np.ndarray  # (S, D) unit vectors
    gene: np.ndarray  # (S, D)
    galleries: dict[str, Gallery]  # by name of the gallery
    scores: dict[str, dict[str, np.ndarray]]  # by name of the gallery and of the method, (S, K)
    blocks: np.ndarray  # (S,) of the bootstrap
    ranks: tuple[np.ndarray, np.ndarray]  # (S,) of the own profile for each image, of the own image for each profile
    nearest: np.ndarray  # (S, NEAREST), most similar profiles, best first


def parse_args(argv: list[str] | None = None) -> Settings:
    parser = settings.shared(__doc__, part="test")
    group = settings.add_evaluation(parser, out="results/retrieval")
    group.add_argument(
        "--encoder", type=Path, default=Path("encoder_model/best_epoch_weights.pth"), help="checkpoint of stage one"
    )
    group.add_argument("--neighbours", type=arguments.count, default=8, help="nearest spots that are candidates")
    settings.add_memory(parser)
    return Settings(**vars(parser.parse_args(argv)))


def load_model(path: Path, state: dict[str, Any], device: torch.device) -> StageOne:
    from model.stage_one import StageOne, StageOneSizes

    model = StageOne(StageOneSizes(**state["sizes"]))
    checkpoint.fit(model, state["model"], path, "--encoder")
    return model.to(device).eval()


def match_scores(
    model: StageOne, encoded: EncodedPairs, candidates: np.ndarray, accelerator: Accelerator
) -> np.ndarray:
    """Fusion logit of each spot's image with each candidate's profile: (S, K); 0 where it is padding."""
    import torch

    order, device = dataset.in_turn(len(candidates), SPOTS_AT_ONCE), accelerator.device
    gene_tokens, image_tokens = encoded.gene_tokens, encoded.image_tokens
    assert gene_tokens is not None and image_tokens is not None, "encoded with a store for the tokens"

    def batches_of_process() -> Iterator[tuple]:
        for rows in distributed.own_batches(order):
            profiles, place = np.unique(np.maximum(candidates[rows], 0), return_inverse=True)
            with torch.no_grad(), accelerator.autocast():
                genes = model.fusion.precompute_genes(distributed.to_device(gene_tokens[profiles], device))
                genes = genes[distributed.to_device(torch.from_numpy(place.reshape(candidates[rows].shape)), device)]
                images = model.fusion.precompute_images(distributed.to_device(image_tokens[rows], device))
                yield (model.fusion.score(genes, images).float(),)

    logits = [batch.cpu().numpy() for (batch,) in distributed.in_order(batches_of_process(), order)]
    return np.where(candidates >= 0, np.concatenate(logits), 0)


def nearest_profiles(encoded: EncodedPairs, device: torch.device) -> np.ndarray:
    """Rows of the profiles most similar to each image, best first: (S, NEAREST), -1 where there are fewer."""
    import torch

    from utils.evaluation.gallery import top_k

    image, gene = map(torch.from_numpy, encoded.vectors())
    rows = top_k(image.to(device), gene, min(NEAREST, len(gene)))[1].cpu().numpy()
    return np.pad(rows, ((0, 0), (0, NEAREST - rows.shape[1])), constant_values=-1)


def contrastive_scores(model: StageOne, encoded: EncodedPairs, candidates: np.ndarray) -> np.ndarray:
    """Similarity s of each spot's image to each candidate's profile: (S, K)."""
    image, gene = encoded.vectors()
    scale = model.contrast.logit_scale.exp().item()
    return np.stack([np.einsum("sd,sd->s", image, gene[column]) for column in candidates.T], axis=1) * scale


def gallery_scores(
    model: StageOne,
    encoded: EncodedPairs,
    predicted_depth: np.ndarray,
    log_depth: np.ndarray,
    candidates: np.ndarray,
    weight: float,
    accelerator: Accelerator,
) -> dict[str, np.ndarray]:
    """Scores (S, K) of all methods. `reranked` is the log softmax of the similarity plus `weight` times the matching
    logit."""
    from utils.evaluation import retrieval

    similarity = contrastive_scores(model, encoded, candidates)
    matching = match_scores(model, encoded, candidates, accelerator)
    return {
        "depth": retrieval.depth_scores(predicted_depth, log_depth[candidates]),
        "contrastive": similarity,
        "matching": matching,
        "reranked": retrieval.log_softmax(similarity, candidates) + weight * matching,
    }


def encode(
    model: StageOne, slice_: SliceData, rows: np.ndarray, bins: np.ndarray, accelerator: Accelerator, args: Settings
) -> EncodedPairs:
    """Vectors and tokens of some spots (n,) of a slice, whose bins are (S, G)."""
    from utils.features import cache
    from utils.files.arrays import ArrayStore

    store, inference = ArrayStore(args.memory, args.out), cache.Inference(accelerator, args.batch_size, args.workers)
    return cache.encode_pairs(model, slice_, bins, rows, inference, store)


def fit_reranking(model: StageOne, slices: list[SliceData], accelerator: Accelerator, args: Settings) -> float:
    """Weight of matching in `reranked`, for which the own profile ranks best among neighbours, on the validation
    spots."""
    from utils.evaluation import retrieval

    similarity, matching, galleries = [], [], []
    for slice_ in slices:
        rows = slice_.rows_of("val")
        if len(rows):
            print(f"{slice_.name}: re-ranking fitted on {count_of(len(rows), 'validation spot')}", flush=True)
            encoded = encode(model, slice_, rows, slice_.bins(), accelerator, args)
            galleries.append(retrieval.neighbour_candidates(slice_.xy_fullres_px[rows], args.neighbours, args.seed))
            similarity.append(contrastive_scores(model, encoded, galleries[-1].candidates))
            matching.append(match_scores(model, encoded, galleries[-1].candidates, accelerator))
    return retrieval.reranking_weight(similarity, matching, galleries)


def predict_depths(
    state: dict[str, Any],
    slices: list[SliceData],
    trained_on: list[SliceData],
    accelerator: Accelerator,
    args: Settings,
) -> list[np.ndarray]:
    """Log total counts, relative to the slice's mean, by ridge on the pretrained encoder's features: (S,) per slice."""
    from utils.evaluation import baselines
    from utils.features import cache, neighbourhoods

    several, inference = [*trained_on, *slices], cache.Inference(accelerator, args.batch_size, args.workers)
    features = cache.pretrained_features(state, state["settings"], several, inference, args.image_weights)
    features = baselines.standardise(features, len(trained_on), neighbourhoods.MIN_SPOTS)

    def rings(part: str, some_slices: list[SliceData], some_features: list[np.ndarray]) -> list[np.ndarray]:
        return [
            baselines.ring_features(of_slice, slice_.xy_fullres_px, slice_.pitch_fullres_px)[rows]
            for slice_, of_slice in zip(some_slices, some_features, strict=True)
            if len(rows := slice_.rows_of(part))
        ]

    x_train, x_val = (rings(part, trained_on, features[: len(trained_on)]) for part in ("train", "val"))
    y_train, y_val = (
        [np.log(slice_.total_counts[rows]) for slice_ in trained_on if len(rows := slice_.rows_of(part))]
        for part in ("train", "val")
    )
    ridge = baselines.fit_depth(x_train, y_train, x_val, y_val)
    return [ridge.predict(x)[:, 0] for x in rings(args.part, slices, features[len(trained_on) :])]


def score_slice(
    model: StageOne,
    slice_: SliceData,
    predicted_depth: np.ndarray,
    weight: float,
    accelerator: Accelerator,
    args: Settings,
) -> ScoredSlice:
    from utils.evaluation import bootstrap, retrieval

    rows, bins = slice_.rows_of(args.part), slice_.bins()
    print(f"{slice_.name}: retrieval of {count_of(len(rows), 'spot')}", flush=True)
    encoded = encode(model, slice_, rows, bins, accelerator, args)
    image, gene = encoded.vectors()
    xy, log_depth = slice_.xy_fullres_px[rows], np.log(slice_.total_counts[rows])
    log_depth = log_depth - log_depth.mean()
    neighbours = retrieval.neighbour_candidates(xy, args.neighbours, args.seed)
    galleries = dict(zip(GALLERIES, (neighbours, retrieval.random_candidates(len(rows), 9, args.seed)), strict=True))
    scores = {
        name: gallery_scores(model, encoded, predicted_depth, log_depth, gallery.candidates, weight, accelerator)
        for name, gallery in galleries.items()
    }
    return ScoredSlice(
        rows=rows,
        bins=bins[rows],
        image=image,
        gene=gene,
        galleries=galleries,
        scores=scores,
        blocks=bootstrap.blocks(xy, slice_.pitch_fullres_px),
        ranks=(retrieval.ranks_from_embeddings(image, gene), retrieval.ranks_from_embeddings(gene, image)),
        nearest=nearest_profiles(encoded, accelerator.device),
    )


def compute_metrics(scored: list[ScoredSlice], seed: int) -> dict[str, Any]:
    """The body of metrics.json for one or several slices."""
    from utils.evaluation import expression, retrieval

    metrics: dict = {"n_spots": sum(len(s.rows) for s in scored)}
    for name in GALLERIES:
        scores = {method: [s.scores[name][method] for s in scored] for method in RETRIEVAL_METHODS}
        galleries = [s.galleries[name] for s in scored]
        metrics[name] = retrieval.evaluate_gallery(scores, galleries, [s.blocks for s in scored], seed=seed)
    metrics["slice"] = retrieval.mean_slice_figures([retrieval.slice_figures(*s.ranks) for s in scored])
    return expression.json_values(metrics)


def retrieval_examples(slice_: SliceData, scored: ScoredSlice, seed: int) -> list[RetrievalExample]:
    """Images of one slice with the profiles most similar to them, by the rule that the page states."""
    from utils.report import page, page_parts

    rows, ranks = scored.rows, scored.ranks[0]
    examples = []
    for kind, spot in page_parts.choose_examples(ranks, NEAREST, seed):
        rank_of = {int(other): rank for rank, other in enumerate(scored.nearest[spot][:SHOWN], 1) if other >= 0}
        rank_of.setdefault(spot, int(ranks[spot]))
        tiles = slice_.pack.read(slice_.tile_rows[rows[[spot, *rank_of]]])
        cosines = scored.gene[list(rank_of)] @ scored.image[spot]
        candidates = [
            (tile, f"rank {rank}: {slice_.barcodes[rows[other]]}", float(cosine), other == spot)
            for tile, cosine, (other, rank) in zip(tiles[1:], cosines, rank_of.items(), strict=True)
        ]
        title = f"{slice_.name}, {slice_.barcodes[rows[spot]]}: its own profile has rank {ranks[spot]} of {len(rows)}"
        examples.append(page.RetrievalExample(tiles[0], f"{title} ({page_parts.KINDS[kind]})", candidates))
    return examples


def write_page(
    path: Path, metrics: dict, slices: list[SliceData], scored: list[ScoredSlice], state: dict, args: Settings
) -> None:
    from utils.report import page, page_parts

    examples = [retrieval_examples(slice_, s, args.seed) for slice_, s in zip(slices, scored, strict=True)]
    report = page.Report(
        title=f"Retrieval: {args.part} slices{leak_note(metrics)}",
        tables=page_parts.retrieval_tables(metrics),
        examples=[example for of_slice in examples for example in of_slice],
        examples_note=page_parts.EXAMPLES_NOTE.format(seed=args.seed, n=SHOWN),
        settings=vars(args) | {f"training: {key}": value for key, value in state["settings"].items()},
    )
    page.write_report(path, report)


def write_spots(out: Path, slices: list[SliceData], scored: list[ScoredSlice], genes: list[str], weight: float) -> None:
    """predictions.h5ad, and its table of spots as spots.csv: hits of every method, ranks, vectors, nearest profiles."""
    import pandas as pd

    from utils.evaluation import retrieval
    from utils.report import anndata_files
    from utils.report.spots import spots_on_image

    obs = {}
    for name in GALLERIES:
        for method in RETRIEVAL_METHODS:
            galleries = [(s.scores[name][method], s.galleries[name]) for s in scored]
            obs[f"{name}_{method}"] = np.concatenate([retrieval.hits(x, g.truth, g.candidates) for x, g in galleries])
    for i, way in enumerate(("image_to_gene", "gene_to_image")):
        obs[f"rank_{way}"] = np.concatenate([s.ranks[i] for s in scored])
    spots = [spots_on_image(slice_, s.rows) for slice_, s in zip(slices, scored, strict=True)]
    bins = np.concatenate([s.bins for s in scored])
    adata = anndata_files.spots_anndata(spots, bins, pd.DataFrame(index=genes), obs)
    adata.obsm["X_image"] = np.concatenate([s.image for s in scored])
    adata.obsm["X_gene"] = np.concatenate([s.gene for s in scored])
    first = np.cumsum([0, *(len(s.rows) for s in scored[:-1])])
    adata.obsm["nearest_profiles"] = np.concatenate(
        [np.where(s.nearest < 0, -1, s.nearest + start) for s, start in zip(scored, first, strict=True)]
    )
    adata.uns["magic"] = {
        "X": "bins of log2(1 + counts per 10,000), as the gene encoder reads them",
        "reranking_weight": weight,
        "nearest_profiles": "rows of this file whose profiles are most similar to the image, within the slice",
    }
    anndata_files.write_anndata(out / "predictions.h5ad", adata)
    write_whole(out / "spots.csv", adata.obs.to_csv(index_label="spot").encode())


def draw_recall(path: Path, scored: list[ScoredSlice]) -> None:
    from utils.evaluation import plotting, retrieval

    k = np.unique(np.geomspace(1, max(len(s.rows) for s in scored), 30).astype(int))
    recall = {
        way: np.mean([[retrieval.recall_at(s.ranks[i], n) for n in k] for s in scored], axis=0)
        for i, way in enumerate(("image to gene", "gene to image"))
    }
    chance = np.mean([np.minimum(k / len(s.rows), 1) for s in scored], axis=0)
    write_figure(path, plotting.retrieval_curve(k, recall, chance))


@exclusive_folder("out")
def main(args: Settings) -> None:
    checkpoint.require_checkpoint(args.encoder, "--encoder", "run train_mymodel.py first")
    state = checkpoint.load(args.encoder, "stage_one", "--encoder")
    slices, trained_on = split.load_evaluation(args, state, "--encoder", ("input",))
    with distributed.running(args.device, args.precision) as accelerator:
        model = load_model(args.encoder, state, accelerator.device)
        depths = predict_depths(state, slices, trained_on, accelerator, args)
        weight = fit_reranking(model, trained_on, accelerator, args)
        scored = [
            score_slice(model, slice_, depth, weight, accelerator, args)
            for slice_, depth in zip(slices, depths, strict=True)
        ]
        if not distributed.go_on_alone():
            return
    metrics = compute_metrics(scored, args.seed)
    metrics["per_slice"] = {
        slice_.name: compute_metrics([s], args.seed) for slice_, s in zip(slices, scored, strict=True)
    }
    metrics["leak"] = split.leaked_slices(slices, state)
    out = args.out
    out.mkdir(parents=True, exist_ok=True)
    write_spots(out, slices, scored, state["genes"], weight)
    draw_recall(out / "retrieval_curve.png", scored)
    write_page(out / "report.html", metrics, slices, scored, state, args)
    write_record(out / "metrics.json", metrics)
    print("\n".join([count_of(metrics["n_spots"], "spot"), *retrieval_lines([metrics])]))
    same = ", which are those evaluated here" if args.part == "val" else ""
    print(f"reranked: matching weighs {weight:g}, fitted on the validation spots{same}")
    print(f"results in {out}")


if __name__ == "__main__":
    settings.run(main, parse_args())
