"""What lies on disk, from the folders a sequencing centre delivers to the arrays a model sees.

reader       Space Ranger folders: positions and scale factors, matched to the counts
matrix       count matrices in HDF5 or as a folder (reader passes them on)
table        slices.csv: which slice is whose, its part, its spot pitch and image; the split and the leak guard
content      the hash of what a slice counted
tiles        one tile per spot: cut, packed, read back
whole_slide  any part of a slide at any scale, tiles streamed; tiff_levels reads its TIFFs
tissue       tissue mask, spot grid, spots on tissue
layout       where the tiles of a slide lie: positions, slice folders, grids; slide_list: which slides; measured: counts
importers    other formats -> slice folders; importers_* read each of them and write
genes        gene panels: normalise, choose, bin; the order of the genes lives here
gene_names   genes matched by symbol, alias and id; depth thins counts to a common depth
export       results as AnnData that scanpy and squidpy plot; geojson for QuPath
simulate     made-up slices with a known truth; simulate_tissue, _picture, _counts and _files are its steps
"""
