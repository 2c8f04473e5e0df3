"""Inputs of the models: tiles and panels of a slice, features of frozen encoders. Nothing here trains a model.

dataset         a slice with its tiles and panels; batches of tiles     cache  features of frozen encoders, by content
neighbourhoods  standardised features of a spot and of those around it  domain  out-of-domain score and its limits
"""
