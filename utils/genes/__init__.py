"""Genes by name: what they are called, which of them a model reads and predicts.

names         symbols, Ensembl ids and aliases, matched
panels        gene panels: selection, panel files, binning; the order of the genes lives there
downsampling  counts thinned to a common depth
"""
