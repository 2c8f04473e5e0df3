"""distributed.py: where and how precisely a run computes."""

import ctypes
from types import SimpleNamespace

import pytest
import torch

from utils import distributed
from utils.features import dataset


def test_freed_memory_is_kept_where_the_c_library_can(monkeypatch):
    told = []
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=lambda *option: told.append(option)))
    distributed.keep_freed_memory()
    assert dict(told) == {-4: 0, -1: -1, -2: 2**28}  # no mmap, no trimming, a quarter of a GiB at a time


def test_other_c_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace())
    distributed.keep_freed_memory()


@pytest.mark.parametrize(("gpu", "given", "expected"), [(False, None, 0), (False, 3, 3), (True, 1, 1), (True, None, 2)])
def test_reading_processes_are_for_gpus_or_for_who_asks(monkeypatch, gpu, given, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    seen = {}
    monkeypatch.setattr("torch.utils.data.DataLoader", lambda data, **flags: seen.update(flags))
    dataset.loader(dataset.TileBatches([], []), [], given)
    assert seen["num_workers"] == expected and seen["persistent_workers"] == (expected > 0)
