"""The lock of an output folder on file systems that have none, and by shards side by side."""

import errno
import fcntl
import os

import numpy as np
import pytest
from tile_slices import write_slice

import image_tilling
from utils.files import exclusive
from utils.images import tiles


def refuse_locks(monkeypatch, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(exclusive, "_warned", set())


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named_in_one_line(tmp_path, monkeypatch, capsys, number):
    refuse_locks(monkeypatch, number)
    for name in ("one", "two"):
        with exclusive.exclusive(tmp_path / name, "--out"):
            (tmp_path / name / "result").touch()
        assert [path.name for path in (tmp_path / name).iterdir()] == ["result"]
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"warning: {tmp_path / 'one'}: expected a file system with locks (flock), found none")
    assert os.strerror(number) in line


@pytest.mark.parametrize(
    ("number", "kind", "words"),
    [(errno.EACCES, ValueError, "another run writing"), (errno.EIO, OSError, os.strerror(errno.EIO))],
)
def test_other_errors_of_a_lock_end_the_run(tmp_path, monkeypatch, number, kind, words):
    """NFS says EACCES where another machine holds the lock."""
    refuse_locks(monkeypatch, number)
    with pytest.raises(kind, match=words), exclusive.exclusive(tmp_path, "--out"):
        pass


def test_shards_of_tiles_write_side_by_side_what_one_run_writes(tmp_path, capsys):
    data, names = tmp_path / "data", ["a", "b", "c"]
    write_slice(data)
    for name in names:
        (data / name).symlink_to(data / "slice")

    def run(out, shard):
        flags = ["--data", data, "--tiles", tmp_path / out, "--tile_px", 28, "--workers", 1, "--shard", shard]
        image_tilling.main(image_tilling.parse_args([str(flag) for flag in flags]))
        return sorted(folder.name for folder in (tmp_path / out).iterdir())

    with exclusive.exclusive(tmp_path / "shards" / "a", "--tiles"):  # a slice of the other shard is being written
        assert run("shards", "2/2") == ["a", "b", "slice"]
        with pytest.raises(ValueError, match=r"another run writing to .*a; wait for it"):
            run("shards", "1/2")
    assert run("shards", "1/2") == run("one", "1/1") == [*names, "slice"]
    for name in names:
        of_shard, of_one = (tiles.TilePack(tmp_path / out / name) for out in ("shards", "one"))
        assert of_shard.record == of_one.record and (of_shard.read(np.arange(6)) == of_one.read(np.arange(6))).all()
        assert not (of_shard.folder / exclusive.LOCK).exists()
    assert run("one", "5/5") and "shard 5 of 5: none of 4 slices belongs to it" in capsys.readouterr().out
