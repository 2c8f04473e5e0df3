"""Files: written whole, hashed by content. Nothing here knows what a slice, an image or a model is."""
