"""Training both stages: what the scripts' loops are made of. Nothing here predicts slides or writes reports.

split           the slices of each part, what must not be held out, what model and slices must share
augment         histology-safe augmentation, in batch, on the device
targets         what is learnt from the target panel
initialisation, decoder_initialisation   warm starts of both stages, solved by ridge
decoder_validation   correlation of the decoder's predictions on validation spots
loop            seeds, order of the spots, schedule, optimiser, log     progress    saves a run and resumes it
checkpoint      written, read, resumed                                  shared_folder   a shared model, read
gene_weights    released weights of the gene encoder     pretrain, count_tables   masked bins, and counts for it
"""
