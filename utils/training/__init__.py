"""What training and prediction need around a model.

arguments      the flags that scripts share, and how a script ends with an error
datasets       slices as training sees them; overlap fits a slice of another panel, leaks what was held out
augment        histology-safe, in batch, on the device
features       of frozen encoders, kept on disk; feature_bank gives them out, slide_features streams a slide's
loop           seeds, schedules, optimiser, log; progress saves a run and goes on with it; folder keeps others out
checkpoint     save, load, resume; sharing makes a folder of it, model_card its card
distributed    device, precision, processes and what they gather
pretrain       the gene encoder by masked bins; count_tables reads counts without pictures for it
frozen, spill  what frozen blocks give, and arrays beyond memory, on disk
"""
