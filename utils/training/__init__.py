"""Training of both stages: what the scripts' loops are made of. Nothing here predicts slides or writes reports.

split           slices of each part, and checks that they fit a model and were held out from it
augment         histology-safe augmentation, in batch, on the device
targets         standardised expression, residuals and their components
initialisation, decoder_initialisation   warm starts of both stages, solved by ridge
loop            order of the spots, optimiser and learning rate     trainer      place, log and checkpoints of a run
checkpoint      written, read and resumed                           shared_folder   a shared model, read
gene_weights    released weights of the gene encoder
pretrain, count_tables   masked-bin prediction, and count tables without images for it
"""
