"""Maps of genes over the H&E: arrays in, matplotlib Figure out.

Shapes: S spots.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from utils.evaluation import plotting
from utils.report.spots import SpotsOnImage

if TYPE_CHECKING:  # matplotlib takes half a second: it is imported by the functions that draw
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAP = "viridis"  # perceptually uniform
BARS_UM = (10, 20, 50, 100, 200, 500, 1000, 2000, 5000)


def spot_maps(
    spots: SpotsOnImage,
    panels: Mapping[str, np.ndarray],
    title: str,
    unit: str,
    prediction_std: np.ndarray | None = None,
) -> Figure:
    """The H&E where there is one, and beside it each panel over it; all panels share one range of colours.

    Parameters
    ----------
    panels : name -> (S,)
        In `unit`. NaN is left out.
    prediction_std : (S,) or None
        In the same unit, a last panel in a range of its own that starts at 0.
    """
    xy, radius = spots.xy_fullres_px * spots.image_scale, spots.spot_diameter_px / 2 * spots.image_scale
    um_per_px = None if spots.um_per_fullres_px is None else spots.um_per_fullres_px / spots.image_scale
    (left, top), (right, bottom) = xy.min(0) - 3 * radius, xy.max(0) + 3 * radius  # a margin of two spots
    shown = dict(panels) if prediction_std is None else {**panels, "prediction std": prediction_std}
    names = [*([] if spots.image is None else ["H&E"]), *shown]
    height = 3.6 * np.clip((bottom - top) / (right - left), 0.4, 1.8)
    n_bars = 1 if prediction_std is None else 2
    figure, axes = plotting.new_figure(3.6 * len(names) + 0.9 * n_bars, height + 0.6, columns=len(names))
    axes = np.atleast_1d(axes)
    shared = _colour_range(np.concatenate(list(panels.values())))
    drawn = {}
    for i, (panel, name) in enumerate(zip(axes, names, strict=True)):
        if spots.image is not None:
            panel.imshow(spots.image, interpolation="antialiased", alpha=0.5 if name in shown else 1)
        if name in shown:
            limits = shared if name in panels else (0.0, _colour_range(shown[name])[1])
            drawn[name] = _draw_spots(panel, xy, radius, shown[name], limits)
        plotting.label(panel, "", "", name)
        panel.set(xlim=(left, right), ylim=(bottom, top), aspect="equal")
        _draw_scale(panel, um_per_px, first=i == 0)
    _colour_bar(figure, drawn[next(iter(panels))], axes[: len(axes) + 1 - n_bars], unit)
    if prediction_std is not None:
        _colour_bar(figure, drawn["prediction std"], axes[-1:], unit)
    figure.suptitle(title, x=0.01, ha="left", color=plotting.INK, fontsize=12)
    return figure


def _colour_range(values: np.ndarray) -> tuple[float, float]:
    """From the least to the 99th percentile: a few bright spots would darken all others."""
    known = values[np.isfinite(values)]
    low, high = (float(v) for v in np.percentile(known, [0, 99])) if len(known) else (0.0, 1.0)
    return low, max(high, low + 1e-9)


def _draw_spots(axes: Axes, xy: np.ndarray, radius: float, values: np.ndarray, limits: tuple[float, float]) -> Any:
    """Discs of a true size: markers of a scatter would keep their size when the figure is scaled."""
    from matplotlib.collections import EllipseCollection

    known = np.isfinite(values)
    side = np.full(known.sum(), 2 * radius)
    discs = EllipseCollection(
        side, side, 0 * side, units="xy", offsets=xy[known], offset_transform=axes.transData, cmap=MAP
    )
    discs.set_array(values[known])
    discs.set_clim(*limits)
    axes.add_collection(discs)
    return discs


def _draw_scale(axes: Axes, um_per_px: float | None, first: bool) -> None:
    """A scale bar under the first panel where the scale is known, pixels on the axes where it is not."""
    if um_per_px is None:
        plotting.label(axes, "x (image px)", "y (image px)" if first else "", axes.get_title(loc="left"))
        return
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    if first:
        width_um = abs(np.subtract(*axes.get_xlim())) * um_per_px
        bar_um = max(step for step in BARS_UM if step <= max(width_um / 4, 10))
        edges = [0.02, 0.02 + bar_um / width_um]
        axes.plot(edges, [-0.03, -0.03], color=plotting.INK, lw=3, transform=axes.transAxes, clip_on=False)
        axes.set_xlabel(f"{bar_um} µm", loc="left", labelpad=12, fontsize=9)  # a label: the layout leaves room for it


def _colour_bar(figure: Figure, discs: Any, axes: np.ndarray, unit: str) -> None:
    bar = figure.colorbar(discs, ax=axes, fraction=0.03, pad=0.01, extend="max")
    bar.outline.set_visible(False)
    bar.set_label(unit, color=plotting.INK)
    bar.ax.tick_params(colors=plotting.INK, labelsize=9, color=plotting.FAINT)
