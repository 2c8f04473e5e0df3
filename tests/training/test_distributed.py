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


@pytest.mark.parametrize(("gpu", "given", "expected"), [(False, None, 0), (False, 2, 2), (True, 1, 1), (True, None, 2)])
def test_reading_processes_are_for_gpus_or_for_who_asks(monkeypatch, gpu, given, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(distributed, "n_cores", lambda: 2)
    seen = {}
    monkeypatch.setattr("torch.utils.data.DataLoader", lambda data, **flags: seen.update(flags))
    dataset.loader(dataset.TileBatches([], []), [], given)
    assert seen["num_workers"] == expected and seen["persistent_workers"] == (expected > 0)


def test_no_more_processes_read_than_there_are_cores_and_one_line_says_so(monkeypatch, capsys):
    monkeypatch.setattr(distributed, "n_cores", lambda: 2)
    assert [dataset.n_workers(asked) for asked in (9, 9, 2)] == [2, 2, 2]
    assert capsys.readouterr().out == "warning: --workers 9: 2 cores may be used, so that 2 read tiles\n"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("fpu avx512f avx512_bf16 amx_tile amx_bf16", {"AMX": True, "avx512_bf16": True}),
        ("fpu avx512f amx_tile avx512_bf16x", {"AMX": False, "avx512_bf16": False}),
    ],
)
def test_bf16_of_a_cpu_is_read_from_the_kernels_list(tmp_path, flags, expected):
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\nbugs\t\t: none\n")
    assert distributed.cpu_bf16(tmp_path / "cpuinfo") == expected
    assert distributed.cpu_bf16(tmp_path / "none") == {"AMX": False, "avx512_bf16": False}
