"""plotting.py: what is drawn, in which range, and that pyplot is left alone."""

import subprocess
import sys

import numpy as np
from PIL import Image

from utils.evaluation import plotting
from utils.files.atomic import write_figure


def lines(axes):
    return {line.get_label(): line for line in axes.lines}


def test_loss_curves_show_every_loss_and_its_chance_dashed():
    rows = [{"epoch": i, "loss": 5.0 - i, "contrast_loss": 3.0 - i / 2, "lr": 1e-4} for i in range(4)]
    rows[1]["val_loss"], rows[3]["val_loss"], rows[2]["val_loss"] = 4.0, 3.0, None
    axes = plotting.loss_curves(rows, chance={"contrast_loss": np.log(32)}).axes[0]
    drawn = lines(axes)
    assert set(drawn) == {"loss", "contrast loss", "val loss", "chance: 3.47"}
    assert drawn["val loss"].get_xdata().tolist() == [1, 3]
    chance = drawn["chance: 3.47"]
    assert chance.get_linestyle() == "--" and chance.get_color() == drawn["contrast loss"].get_color()
    assert axes.get_xlabel() == "Epoch" and "nats" in axes.get_ylabel()


def test_loss_curves_of_no_epoch_at_all(tmp_path):
    write_figure(tmp_path / "loss.png", plotting.loss_curves([]))


def test_histogram_counts_all_defined_genes_of_every_method():
    pcc = {"model": np.array([-0.2, 0.1, 0.1, 0.65, np.nan]), "knn": np.array([0.0, 0.3]), "mean": np.full(3, np.nan)}
    figure = plotting.pcc_histogram(pcc)
    counted = [sum(patch.get_height() for patch in axes.patches) for axes in figure.axes]
    assert counted == [4, 2, 0]
    assert len({axes.get_xlim() for axes in figure.axes}) == len({axes.get_ylim() for axes in figure.axes}) == 1
    assert "mean 0.163" in [text.get_text() for text in figure.axes[0].texts]


def test_retrieval_curve_draws_both_directions_and_chance():
    k = np.array([1, 5, 10])
    axes = plotting.retrieval_curve(k, {"image_to_gene": k / 12, "gene_to_image": k / 15}, k / 100).axes[0]
    assert set(lines(axes)) == {"image to gene", "gene to image", "chance"}
    assert axes.get_xscale() == "log"


def test_figures_are_whole_files_of_the_kind_their_name_says(tmp_path):
    path = tmp_path / "new" / "curve.png"
    figure = plotting.retrieval_curve(np.array([1, 2]), {}, np.array([0.1, 0.2]))
    assert write_figure(path, figure) == path
    assert Image.open(path).format == "PNG"
    write_figure(tmp_path / "new" / "curve.svg", figure)
    assert sorted(p.name for p in path.parent.iterdir()) == ["curve.png", "curve.svg"]


def test_pyplot_is_never_imported():
    code = (
        "import sys; from utils.evaluation import plotting; assert 'matplotlib' not in sys.modules;"
        "plotting.loss_curves([{'epoch': 0, 'loss': 1.0}]); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
