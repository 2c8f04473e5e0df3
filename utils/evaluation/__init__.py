"""How good is it? Arrays in, numbers out: nothing here knows files, models or devices, or the rest of the project.

metrics.py     correlations, errors and the three scales expression is judged on
expression.py  the figures of predicted expression: per slice, mean over slices, pooled, per gene
retrieval.py   galleries of candidates, hits, ranks, recall and chance
bootstrap.py   intervals that respect that neighbouring spots are alike
baselines.py   the cheap predictors that stand beside every model: mean, depth, ridge, ridge with neighbours, kNN
plotting.py    figures (arrays in, matplotlib Figure out)
"""
