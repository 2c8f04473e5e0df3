"""What a model reads of a slice: tiles and panels per spot, features of frozen encoders, neighbours.

dataset         a slice with its tiles and panels; batches of tiles     cache  frozen features, keyed by content
neighbourhoods  features of a spot beside those around it
"""
