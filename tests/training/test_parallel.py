"""Several processes (gloo, on this machine) against one: gradients, whole trainings, evaluations."""

import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import parallel_run
import pytest
import torch
from tiny_runs import BEST, EVALUATION, STAGES, Work

ROOT = Path(__file__).resolve().parents[2]


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def free_ports(n: int) -> list[str]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
        for free in sockets:
            free.bind(("127.0.0.1", 0))
        return [str(free.getsockname()[1]) for free in sockets]


def started(n: int, *words) -> list[subprocess.Popen]:
    """parallel_run.py in n processes that nothing watches, as Slurm starts them."""
    ports = free_ports(1 + words.count("then"))
    command = [sys.executable, str(ROOT / "tests" / "parallel_run.py"), *map(str, words)]
    where = {"WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": ports[0], "PORTS": ",".join(ports)}
    ranks = [ENVIRONMENT | where | {"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(n)]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [subprocess.Popen(command, cwd=ROOT, env=env, **pipe) for env in ranks]


def launch(n: int, *words) -> str:
    """What n processes of parallel_run.py print, each of which must end well."""
    processes, printed = started(n, *words), ""
    try:
        for process in processes:
            out, error = process.communicate(timeout=500)
            assert process.returncode == 0, error[-2000:]
            printed += out
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    return printed


def relative_error(found: dict, expected: dict) -> float:
    """Of all gradients as one vector."""
    assert found.keys() == expected.keys()
    difference = sum((found[name] - expected[name]).square().sum() for name in expected)
    return float((difference / sum(one.square().sum() for one in expected.values())).sqrt())


def test_loss_gradients_and_queue_of_three_processes_are_those_of_one(tmp_path):
    """And would not be, were no gradient passed through the gather."""
    parallel_run.gradients(tmp_path / "one.pt")
    launch(3, "gradients", tmp_path / "three.pt")
    alone, three = (torch.load(tmp_path / name, weights_only=True) for name in ("one.pt", "three.pt"))
    expected, found = alone["right"], three["right"]
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert relative_error(found["gradients"], expected["gradients"]) < 1e-5
    assert relative_error(three["detached"]["gradients"], expected["gradients"]) > 0.1
    for name, rows in expected["queue"].items():
        torch.testing.assert_close(found["queue"][name], rows, rtol=1e-5, atol=1e-6)
    assert three["mean"] == pytest.approx(1.1, rel=1e-15), "in double precision: sums go on after a resume"


# ---- whole scripts


@pytest.fixture(scope="module")
def by_two(trained, tmp_path_factory):
    """Where two processes trained both stages as `trained` was, and evaluated it; what they printed. The evaluations
    read 70 spots in batches of 16: five batches for two processes, the last one of six spots."""
    work = Work(trained.data, trained.tiles, trained.panels, tmp_path_factory.mktemp("by_two"))
    epoch = ("--Epoch", 1, "--Init_lr", 1e-3)
    words = ["train_mymodel", *work.argv("train_mymodel", *epoch)]
    words += ["then", "train_decoder", *work.argv("train_decoder", "--encoder", trained.encoder, *epoch)]
    for script in EVALUATION:
        models = ("--encoder", trained.encoder) if script == "get_accuracy_image" else ("--decoder", trained.decoder)
        words += ["then", script, *work.argv(script, *models, "--batch_size", 16)]
    return work, launch(2, *words)


@pytest.mark.parametrize("folder", STAGES.values())
def test_training_by_two_processes_ends_near_that_of_one(trained, by_two, folder):
    work, _ = by_two
    one, two = (torch.load(runs.out / folder / BEST, weights_only=True) for runs in (trained, work))
    assert two["row"]["epoch"] == one["row"]["epoch"]
    for name, tensor in one["model"].items():  # Adam's first steps have the size of the rate, whatever the gradient
        torch.testing.assert_close(two["model"][name], tensor, rtol=0.05, atol=5e-3, msg=name)
    assert len(list((work.out / "logs").rglob("log.jsonl"))) == 2, "one writer for each stage"


@pytest.mark.parametrize("folder", ["retrieval", "similarity"])
def test_evaluation_by_two_processes_is_that_of_one(evaluated, by_two, folder):
    work, printed = by_two
    assert printed.count("results in") == 2, "one writer for each evaluation"
    paths = [one.out / "results" / folder / "metrics.json" for one in (evaluated, work)]
    expected, found = (json.loads(path.read_text()) for path in paths)
    assert_near(found, expected)


def assert_near(found, expected):
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_near(found[key], expected[key])
    elif isinstance(expected, list):
        for a, b in zip(found, expected, strict=True):
            assert_near(a, b)
    elif isinstance(expected, float):
        np.testing.assert_allclose(found, expected, atol=1e-4)
    else:
        assert found == expected


def test_a_batch_that_cannot_be_shared_out_is_refused(trained, tmp_path):
    """By torchrun, as a user calls it."""
    work = Work(trained.data, trained.tiles, trained.panels, tmp_path)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--"]
    command += ["tests/parallel_run.py", "train_mymodel"]  # behind --, as torchrun takes --logs for its own
    command += work.argv("train_mymodel", "--batch_size", 15, "--Epoch", 1)
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=500)
    assert done.returncode != 0
    assert "--batch_size: expected a multiple of the 2 processes, which share a batch equally, found 15" in done.stderr


# ---- the end of a process is the end of the others


@pytest.mark.parametrize(
    ("how", "code"),
    [("killed", -signal.SIGKILL), ("raises", 1), ("refuses", 2), ("terminated", 143), ("stopped", None)],
)
def test_a_process_whose_peer_is_gone_ends_with_a_line(how, code):
    """The second one ends in each way, or is silent; the first waits for it."""
    first, second = started(2, "ends", how)
    try:
        error = first.communicate(timeout=250)[1]
        if code is not None:
            second.communicate(timeout=250)
            assert second.returncode == code
    finally:
        for process in (first, second):
            process.kill()
            process.communicate()
    assert first.returncode == 2, error
    last = error.splitlines()[-1]
    assert last.startswith("parallel_run.py: process 0 of 2: expected an answer of the others, found one of them gone")
    assert "Traceback" not in error
