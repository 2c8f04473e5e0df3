"""ArrayStore: what fits the budget is plain memory, what does not lies in a file without a name."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from utils.files.arrays import ArrayStore, _reserve


def test_the_budget_is_spent_and_then_files_are_mapped(tmp_path):
    store = ArrayStore(gib=1000 / 2**30, folder=tmp_path / "new")
    first, second = store.empty((100,), np.float64), store.empty((100, 3), np.float16)
    third = store.empty((25, 2), np.float32)  # 200 bytes are left
    assert type(first) is np.ndarray and type(third) is np.ndarray
    assert isinstance(second, np.memmap) and second.shape == (100, 3) and second.dtype == np.float16
    second[:] = np.arange(300).reshape(100, 3)
    assert np.array_equal(second[[7, 3]], [[21, 22, 23], [9, 10, 11]])
    assert list((tmp_path / "new").iterdir()) == []  # nothing stays, whatever ends the process


def test_nothing_is_written_where_all_fits(tmp_path):
    ArrayStore(gib=1, folder=tmp_path / "new").empty((100,), np.float64)
    assert not (tmp_path / "new").exists()


def test_a_full_disk_is_named_before_anything_is_mapped(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"expected 3\.0 GiB of disk .* --memory, found too little \(No space left"):
        ArrayStore(gib=1, folder=tmp_path).empty((3 * 2**30,), np.uint8)


@pytest.mark.parametrize("how", ["missing", errno.EOPNOTSUPP, errno.EINVAL])
def test_without_posix_fallocate_zeros_take_the_room(tmp_path, monkeypatch, how):
    """macOS lacks it, ZFS and some network file systems refuse it."""

    def refused(*_):
        raise OSError(how, os.strerror(how))

    if how == "missing":
        monkeypatch.delattr(os, "posix_fallocate")
    else:
        monkeypatch.setattr(os, "posix_fallocate", refused)
    n = 2**20 + 12345  # two writes, the second one of less
    array = ArrayStore(gib=0, folder=tmp_path).empty((n,), np.uint8)
    assert array.shape == (n,) and array._mmap.size() == n and not array.any()
    array[-1] = 7
    assert array[-1] == 7


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_zeros_that_find_no_room_are_an_error(monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate")
    with Path("/dev/full").open("wb") as file, pytest.raises(OSError, match="No space left"):
        _reserve(file, 2**21)
