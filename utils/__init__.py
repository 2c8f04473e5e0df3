"""What the scripts share, in packages by the nouns of the method; each names its own files.

A package imports those of its own layer and below (tests/test_imports.py):

doctor
prediction, report, sharing
training, evaluation, simulation
features, importers
images, genes, slices, and model beside utils
files, and the modules settings, arguments, distributed, memory and words
"""
