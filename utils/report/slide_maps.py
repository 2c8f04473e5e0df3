"""Maps of what was predicted on a slide, in one range of colours: arrays in, matplotlib Figure out.

Shapes: S spots.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from utils.evaluation import plotting

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def colour_range(values: np.ndarray) -> tuple[float, float]:
    """From the least to the 99th percentile: a few bright spots would darken all others."""
    known = values[np.isfinite(values)]
    low, high = (float(v) for v in np.percentile(known, [0, 99])) if len(known) else (0.0, 1.0)
    return low, max(high, low + 1e-9)


def spot_maps(
    image: np.ndarray,
    xy_image_px: np.ndarray,
    spot_radius_px: float,
    panels: Mapping[str, np.ndarray],
    title: str,
    unit: str,
    um_per_px: float | None,
    spread: np.ndarray | None = None,
) -> "Figure":
    """The H&E, and beside it each panel over it; all panels share one range of colours.

    Parameters
    ----------
    image : (height, width, 3)
    xy_image_px : (S, 2)
        Spot centres, column and row in pixels of `image`.
    panels : name -> (S,)
        In `unit`. NaN is left out.
    um_per_px : float or None
        Scale of `image`, for a scale bar.
    spread : (S,) or None
        Uncertainty in the same unit, a last panel in a range of its own that begins at 0.
    """
    left, right, top, bottom = plotting._window(xy_image_px, spot_radius_px)
    height = 3.6 * np.clip((bottom - top) / (right - left), 0.4, 1.8)
    shown = dict(panels) if spread is None else {**panels, "spread": spread}
    names = ["H&E", *shown]
    figure, axes = plotting._figure(
        3.6 * len(names) + 0.9 * (1 + (spread is not None)), height + 0.6, columns=len(names)
    )
    shared = colour_range(np.concatenate(list(panels.values())))
    drawn = {}
    for i, (one, name) in enumerate(zip(axes, names, strict=True)):
        one.imshow(image, interpolation="antialiased", alpha=0.5 if i else 1)
        if i:
            low, high = (0.0, colour_range(shown[name])[1]) if name == "spread" else shared
            drawn[name] = plotting._draw_spots(one, xy_image_px, spot_radius_px, shown[name], low, high)
        plotting._label(one, "", "", name)
        one.set(xlim=(left, right), ylim=(bottom, top), aspect="equal")
        plotting._scale(one, um_per_px, first=i == 0)
    _colour_bar(figure, drawn[next(iter(panels))], axes[: 1 + len(panels)], unit)
    if spread is not None:
        _colour_bar(figure, drawn["spread"], axes[-1:], unit)
    figure.suptitle(title, x=0.01, ha="left", color=plotting.INK, fontsize=12)
    return figure


def _colour_bar(figure: "Figure", spots: Any, axes: Any, unit: str) -> None:
    bar = figure.colorbar(spots, ax=axes, fraction=0.03, pad=0.01, extend="max")
    bar.outline.set_visible(False)
    bar.set_label(unit, color=plotting.INK)
    bar.ax.tick_params(colors=plotting.INK, labelsize=9, color=plotting.FAINT)
