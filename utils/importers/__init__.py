"""Other formats into slice folders. Counts and coordinates are copied, never changed; nothing here trains or predicts.

source        a slice as another format holds it, and what all readers share
legacy_st, visium_hd, h5ad, spatialdata    one reader per format: files -> Source
anndata_counts, anndata_sections, anndata_slice, pitch, images    what h5ad and spatialdata share
base          import_slice: checks a Source, writes it, reads it back
slice_folder  the files of a slice folder, and its line of slices.csv
"""
