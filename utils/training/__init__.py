"""What training needs around a model: flags, data in batches, augmentation, the loop's parts, checkpoints."""
