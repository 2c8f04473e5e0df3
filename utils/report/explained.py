"""What the columns and rows of the tables on report.html mean, by the names that the tables use."""

from __future__ import annotations

from collections.abc import Iterable

_RETRIEVED = "How often the own profile is among the {} most similar profiles of the slice."
EXPLAINED = {
    # table of genes
    "PCC": "Pearson correlation of prediction and measurement over the spots of a slice, from -1 to 1; 0 is chance.",
    "PCC, residuals": "Pearson correlation over spots of the prediction with the gene's measured Pearson residuals, "
    "from which sequencing depth is taken out; mean over slices. The figure to compare genes by. 0 is chance.",
    "PCC, lognorm": "The same with log1p counts per 10,000, which also carry sequencing depth.",
    "validation PCC": "PCC against residuals on the validation slices, measured when the model was trained: the only "
    "figure of a gene that is known before anything is measured on a slide. A gene below 0.1 is greyed.",
    "ridge PCC": "PCC against residuals of a linear baseline (ridge) on the pretrained encoder's features.",
    "mean counts per 10,000": "Mean over spots of the gene's measured counts per 10,000 counts of the spot.",
    "mean predicted": "Mean over spots of the prediction, in the unit of the maps.",
    # figures of expression
    "PCC per gene": "Pearson correlation of each gene over the spots of a slice, mean over genes and slices.",
    "median": "The same, median over genes.",
    "best 50": "The same, mean of the method's own best 50 genes.",
    "given depth": "PCC per gene once the logarithm of the spots' total counts is regressed out of both sides.",
    "Spearman": "Correlation of ranks of each gene over spots, mean over genes.",
    "PCC per spot": "Correlation of each spot over genes, mean over spots. Mostly a matter of which genes are high "
    "everywhere: compare it with the method mean.",
    "MSE": "Mean squared error over spots and genes, in the scale that the method was fitted in.",
    "MAE": "Mean absolute error over spots and genes, in the same scale.",
    "SD ratio": "Standard deviation over spots, predicted over measured, mean over genes. Below 1 predictions are "
    "smoother than measurements: 1 is not expected, as counting noise cannot be predicted.",
    "undefined": "Number of genes whose prediction is constant; they count as 0 in correlations.",
    # methods
    "model": "The trained model.",
    "mean": "Baseline: the mean profile of the train slices, for every spot.",
    "depth": "Baseline: total counts predicted from the image, one column for all genes or profiles.",
    "ridge": "Baseline: linear regression on the pretrained encoder's features of the tile.",
    "ridge_neighbours": "Baseline: the same, with mean features of two rings of neighbouring spots.",
    "knn": "Baseline: mean profile of the train spots with the most similar images.",
    # retrieval
    "gallery": "The candidates among which an image's own profile is looked for.",
    "among its neighbours": "The spot itself and its nearest spots: the hardest candidates.",
    "among ten of the slice": "The spot itself and nine other spots of the slice, drawn at random.",
    "chance": "The figure of a random choice.",
    "contrastive": "Candidates ordered by the cosine between the vectors of image and profile.",
    "matching": "Candidates ordered by the fusion module's score of the pair.",
    "reranked": "Contrastive scores, corrected by the fusion module.",
    "direction": "What is given, and what is looked for.",
    "image to gene": "An image is given, its profile is looked for.",
    "gene to image": "A profile is given, its image is looked for.",
    "R@1": "How often the own profile is the most similar of all profiles of the slice.",
    "R@5": _RETRIEVED.format("five"),
    "R@10": _RETRIEVED.format("ten"),
    "median rank": "Median place of the own profile among all profiles of the slice; 1 is best.",
}


def explanations(names: Iterable[str]) -> dict[str, str]:
    """Of the names that have one, in their order."""
    return {name: EXPLAINED[name] for name in dict.fromkeys(names) if name in EXPLAINED}
