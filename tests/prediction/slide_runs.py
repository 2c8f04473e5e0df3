"""predict_slide.py as tests run it, and how they read what it wrote."""

import json
import re

import anndata
import pytest

import predict_slide
from utils import settings

FLAGS = ("--device", "cpu", "--precision", "fp32", "--maps", 1, "--workers", 1)


def parsed(slides, decoder, out, *flags):
    slides = slides if isinstance(slides, list | tuple) else [slides]
    decoders = decoder if isinstance(decoder, list) else [decoder]
    argv = [*slides, "--decoder", *decoders, "--out", out, *FLAGS, *flags]
    return predict_slide.parse_args([str(one) for one in argv])


def predict(slides, decoder, out, *flags):
    predict_slide.main(parsed(slides, decoder, out, *flags))
    return out


def exit_code(*args):
    with pytest.raises(SystemExit) as stop:
        settings.run(predict_slide.main, parsed(*args))
    return stop.value.code


def read(out):
    return anndata.read_h5ad(out / "predictions.h5ad")


def record(out):
    return strict((out / "settings.json").read_text())


def page_content(out):
    """The data of report.html."""
    text = (out / "report.html").read_text(encoding="utf-8")
    return strict(re.search(r'<script type="application/json" id="report">(.*?)</script>', text, re.DOTALL)[1])


def strict(text):
    """JSON without NaN."""

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)
