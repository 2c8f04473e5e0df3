"""H&E images and their tiles: pixels, sizes and scales. Nothing here knows what a slice, a gene or a model is.

image   one way to open any image: size, um per px, levels, a region at a scale
tiff    levels of TIFF files
tissue  tissue mask, spot grid, spots on tissue
tiles   one tile per spot: cut, packed, read back
"""
