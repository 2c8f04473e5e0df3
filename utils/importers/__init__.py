"""Other formats into slice folders: legacy_st, visium_hd, h5ad and spatialdata read, base checks and writes."""
