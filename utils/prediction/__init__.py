"""Prediction on slides that were never measured: slides (which), layout (where spots lie), predict (how), outputs
(files); measured reads what a slice with counts measured."""
