"""How good is it? Arrays in, numbers out: only report.py and html_report.py know files, nothing models or devices.

metrics.py     correlations, errors and the three scales expression is judged on
expression.py  the figures of predicted expression: per slice, mean over slices, pooled, per gene
retrieval.py   galleries of candidates, hits, ranks, recall and chance
gallery.py     the nearest rows of a large gallery, by blocks, for torch tensors on any device
bootstrap.py   intervals that respect that neighbouring spots are alike
baselines.py   the cheap predictors that stand beside every model: mean, depth, ridge, ridge with neighbours, kNN
plotting.py    figures (arrays in, matplotlib Figure out)
html_report.py   report.html: maps, genes, examples and tables on one page, from report_{page,tables,maps}.*
report_data.py   values and pictures as the text that page holds
report_parts.py  what both evaluations put on that page: their tables, and which spots stand as examples
report.py      the table of both evaluations, from the metrics.json of one or several runs
"""
