"""Files and folders, whatever they hold. Nothing here knows what a slice, an image or a model is.

atomic     whole_file, write_whole, write_record: write to `<name>.part`, then rename; plain: values for JSON and torch
hashing    content_hash of an image and its companions (sampled above 1 GiB), file_hash of all bytes
tensors    read_tensors, read_weights: weights files of others, read without running code in them
arrays     ArrayStore: arrays in memory up to a budget, beyond it memory-mapped
exclusive  exclusive, exclusive_folder: the lock of a folder that a run writes to
"""
