"""Slices of tissue as they lie on disk. Imports images, genes and files; nothing here trains, evaluates or predicts.

visium       Space Ranger folders: positions and scale factors, matched to the counts
matrix       count matrices in HDF5 or as a folder (visium passes them on)
splits       slices.csv: which slice is whose, its part, its spot pitch and image; the split and the leak guard
lattice      array places measured from the pixels of the spots
content      the hash of what a slice counted
export       results as AnnData that scanpy and squidpy plot; geojson for QuPath
simulate     simulated slices with a known truth; simulate_tissue, _picture, _counts and _files are its steps
"""
