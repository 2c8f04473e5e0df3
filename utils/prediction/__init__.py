"""Prediction on slides that were never measured.

slides   which slides a call names                 layout          where their spots lie
members  trained models and how they are run       slide_features  features of a slide, kept on disk by content
predict  expression, its deviation, domain score   measured        what a slice with counts measured, and the metrics
outputs  the files of a slide                      geojson         spots for QuPath
trust    what is flagged and warned of
Tiles are cut by utils.images.tiles, as for training; features are kept by utils.features.cache.
"""
