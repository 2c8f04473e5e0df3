"""Arrays in, numbers or figures out. Files, slices, models and devices do not belong here.

metrics      correlations, errors and the scales of expression     expression  per slice, mean over slices, pooled
retrieval    galleries of candidates, hits, ranks, recall, chance  gallery     nearest rows of a large gallery
baselines    mean, depth, ridge, ridge with neighbours, kNN        ridge       ridge and reduced-rank ridge
bootstrap    intervals over blocks of neighbouring spots           plotting    matplotlib figures
intervals    split-conformal intervals of measured values
"""
