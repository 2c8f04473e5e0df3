"""Units of length in image files, and which sizes of a pixel are those of a microscope."""

UM_PER_INCH = 25400.0
UM = {"m": 1e6, "cm": 1e4, "mm": 1e3, "µm": 1.0, "μm": 1.0, "um": 1.0, "micron": 1.0, "microns": 1.0, "nm": 1e-3}
UM |= {"inch": UM_PER_INCH, "in": UM_PER_INCH, "\\u00B5m": 1.0}  # micro sign, Greek mu, and what ImageJ writes
PLAUSIBLE_UM_PER_PX = (0.02, 20.0)  # beyond it, a resolution is a screen's or a printer's
RESOLUTION_UM = {2: UM_PER_INCH, 3: 1e4, 4: 1e3, 5: 1.0}  # TIFF tag ResolutionUnit


def plausible(um_per_px: float | None) -> bool:
    """Whether a size is stated and is one of a microscope."""
    return um_per_px is not None and PLAUSIBLE_UM_PER_PX[0] <= um_per_px <= PLAUSIBLE_UM_PER_PX[1]
