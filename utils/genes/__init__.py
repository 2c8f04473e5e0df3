"""Genes by name: what they are called, which of them a model reads and predicts.

names    symbols, Ensembl ids and aliases, matched; control features; suffixes that made a symbol unique
lists    gene lists, vocabularies and gene2vec tables, read
panels   gene panels: selection, panel files, binning, downsampling; the order of the genes lives there
"""
