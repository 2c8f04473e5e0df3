"""H&E images and their tiles: pixels, sizes and scales. Nothing here knows what a slice, a gene or a model is.

image    one way to open any image: size, um per px, levels, a region at a scale; it chooses one of the readers
flat     JPEG, PNG, WebP, JPEG 2000, BMP, decoded whole
tiff     TIFF by tiles, strips or mapped rows; tiff_series: which of its images is the scan; tiff_samples: what its
         samples mean; tiff_tags: names, depth and size of a pixel
scanner  whole slides through openslide
samples  depth, alpha, palette, CMYK: stored samples to 8-bit RGB on white
units    units of length, and which sizes of a pixel are a microscope's
checks   one line for what cannot be read, the limit of what is decoded whole
tissue   tissue mask, spot grid, spots on tissue
tiles    one tile per spot: cut, packed, read back
"""
