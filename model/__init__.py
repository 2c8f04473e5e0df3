"""The two models of Magic and their parts: tensors in, tensors out; no paths, devices or seeds."""
