"""Figures for the results folders: arrays in, matplotlib Figure out, never pyplot's global state.

Shapes: G genes. Colours are Okabe and Ito's (told apart by colour-blind readers). Curves differ in marker too, so that
a grey print still reads; the level of chance is dashed.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # matplotlib takes half a second: it is imported by the functions that draw
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
INK, FAINT = "#333333", "#8c8c8c"


def loss_curves(
    rows: Sequence[Mapping[str, float]],
    chance: Mapping[str, float] | None = None,
    title: str = "Loss",
    unit: str = "nats",
) -> "Figure":
    """Every loss over the epochs, with its chance level dashed in the same colour.

    Parameters
    ----------
    rows : one per epoch
        "epoch" and any keys that contain "loss"; missing keys, None and NaN are left out.
    chance : key of `rows` -> loss at chance, in `unit`
        Such as ln(number of candidates) for a contrast.
    """
    figure, axes = new_figure(6.4, 4.0)
    keys = list(dict.fromkeys(key for row in rows for key in row if "loss" in key))
    for i, key in enumerate(keys):
        known = [(row["epoch"], row[key]) for row in rows if row.get(key) is not None]
        curve(axes, i, key, *np.reshape(known, (-1, 2)).T)
        if chance and key in chance:
            axes.axhline(chance[key], color=COLOURS[i % 7], lw=1, ls="--", label=f"chance: {chance[key]:.2f}")
    label(axes, "Epoch", f"Loss ({unit})", title)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if keys:
        legend(axes)
    return figure


def pcc_histogram(pcc_by_method: Mapping[str, np.ndarray], title: str = "Correlation per gene") -> "Figure":
    """Histogram of the correlation per gene of each method, one panel a method on shared axes.

    Parameters
    ----------
    pcc_by_method : method -> (G,)
        Pearson r per gene over spots, signs kept; NaN (not measured) is left out. The first method is the model.
    """
    figure, panels = new_figure(6.4, 1.0 + 0.85 * len(pcc_by_method), rows=len(pcc_by_method))
    values = {row: np.asarray(pcc)[np.isfinite(pcc)] for row, pcc in pcc_by_method.items()}
    joint = np.concatenate([*values.values(), [0.0]])
    bins = np.arange(np.floor(joint.min() * 20), np.ceil(joint.max() * 20) + 1.5) / 20 - 1e-9
    for i, (axes, (method, pcc)) in enumerate(zip(np.ravel(panels), values.items(), strict=True)):
        colour = COLOURS[0] if i == 0 else FAINT
        axes.hist(pcc, bins=bins, color=colour, alpha=0.85, edgecolor="white", lw=0.5)
        axes.axvline(0, color=INK, lw=0.8)
        axes.text(1.01, 0.6, method.replace("_", " "), transform=axes.transAxes, color=INK, fontsize=9)
        if len(pcc):
            axes.axvline(pcc.mean(), color=COLOURS[1], lw=1.6)
            mean = f"mean {pcc.mean():.3f}"
            axes.text(1.01, 0.35, mean, transform=axes.transAxes, color=COLOURS[1], fontsize=9)
        label(axes, "", "", "")
    panels = np.ravel(panels)
    panels[0].set_title(title, loc="left", color=INK, fontsize=11)
    panels[-1].set_xlabel("Pearson r over spots", color=INK)
    figure.supylabel("Genes", color=INK, fontsize=10)
    return figure


def retrieval_curve(
    k: np.ndarray, recall: Mapping[str, np.ndarray], chance: np.ndarray, title: str = "Retrieval in the whole slice"
) -> "Figure":
    """Fraction of spots whose true partner is among the first k, against k.

    Parameters
    ----------
    k : (n,)
        Numbers of candidates.
    recall : direction -> (n,)
        Recall at each k, 0..1.
    chance : (n,)
        Recall at chance.
    """
    figure, axes = new_figure(5.6, 4.0)
    for i, (direction, values) in enumerate(recall.items()):
        curve(axes, i, direction, k, values)
    axes.plot(k, chance, color=FAINT, lw=1.2, ls="--", label="chance")
    axes.set(xscale="log", ylim=(0, 1.02))
    axes.xaxis.set_major_formatter("{x:g}")
    label(axes, "First k candidates", "Recall (fraction of spots)", title)
    legend(axes)
    return figure


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1):
    """A Figure of `width` x `height` inches and its axes."""
    from matplotlib.figure import Figure

    # "compressed" also packs panels of a fixed aspect, the maps, and makes room for their labels
    figure = Figure(figsize=(width, height), layout="compressed")
    return figure, figure.subplots(rows, columns, sharex=rows > 1, sharey=rows > 1)


def curve(axes: "Axes", i: int, name: str, x: np.ndarray, y: np.ndarray) -> None:
    (line,) = axes.plot(x, y, color=COLOURS[i % 7], lw=1.8, label=name.replace("_", " "))
    line.set(marker=MARKERS[i % 7], markersize=4.5, markevery=max(1, len(x) // 8))


def label(axes: "Axes", x: str, y: str, title: str) -> None:
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    axes.set_title(title, loc="left", color=INK, fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=INK, labelsize=9, color=FAINT)


def legend(axes: "Axes") -> None:
    axes.legend(frameon=False, fontsize=9, labelcolor=INK, handlelength=3, loc="upper left", bbox_to_anchor=(1.0, 1.0))
