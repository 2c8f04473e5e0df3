"""Slices of tissue as they lie on disk. Imports images, genes and files; nothing here trains, evaluates or predicts.

visium         a slice folder opened once: positions, scale factors, lattice, counts, images
folders        which folder is a slice, and what others are in its place
spatial_files  positions and scale factors
checks         an image checked against its slice
matrix         count matrices in HDF5 or as a folder, read and written; what is a raw count
splits         slices.csv: patient, part, spot pitch and image of each slice; the split and the leak guard
lattice        array places measured from the pixels of the spots; distances of neighbours
content        the hash of what a slice counted
"""
