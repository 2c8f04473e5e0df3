"""The batch files of docs/cluster: their syntax and flags, and two nodes stopped, killed and queued again."""

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import LAST, Work, different, progress, state

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "docs" / "cluster").glob("*.sbatch"))
RUN = f"{ROOT / 'tests' / 'node_run.py'} train_mymodel"


def launched(text: str) -> list[str]:
    """Words of the command that srun starts."""
    joined = re.sub(r"\\\n\s*", " ", text)
    (line,) = re.findall(r"(?m)^srun (.*?)(?: &)?$", joined)
    values = {"SLURM_ARRAY_TASK_ID": "1", "out": "encoder_model"}
    return shlex.split(re.sub(r"\$(\w+)", lambda name: values.get(name[1], name[0]), line))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_batch_files_are_bash_with_flags_that_exist(path):
    subprocess.run(["bash", "-n", path], check=True)
    words = launched(path.read_text())
    (i,) = (i for i, word in enumerate(words) if re.fullmatch(r"\w+\.py", word))
    flags = [word for word in words[i + 1 :] if "$" not in word]
    if words[i] == "predict_slide.py":
        flags = ["cohort.csv", "--out", "predicted", *flags]  # which the user adds
    args = importlib.import_module(words[i].removesuffix(".py")).parse_args(flags)
    array = re.search(r"--array=1-(\d+)", path.read_text())
    assert not array or args.shard == (0, int(array[1]))
    assert "$@" in words, "flags of the user"


def test_the_page_shows_the_batch_files_as_they_are():
    page = (ROOT / "docs" / "cluster.md").read_text()
    assert len(FILES) == 4
    for path in FILES:
        assert f"[cluster/{path.name}](cluster/{path.name})" in page
    assert f"```bash\n{(ROOT / 'docs/cluster/two_nodes.sbatch').read_text()}```" in page


# ---- two nodes, with stand-ins for Slurm's programs

STAND_INS = {
    "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
    "scontrol": 'case $1 in show) echo localhost;; *) echo "$@" >> "$SLURM_LOG";; esac',
    # both nodes on this machine; the step's processes are listed for scancel
    "srun": 'export BATCH_PID=$PPID; "$@" & a=$!; "$@" & b=$!; echo $a $b > "$SLURM_LOG.pids"\n'
    "wait $a; first=$?; wait $b; exit $(( first > $? ? first : $? ))",
    # launchers and what they launched, as Slurm signals a step
    "scancel": 'for pid in $(cat "$SLURM_LOG.pids"); do kill -TERM $pid $(cat /proc/$pid/task/$pid/children); done',
}


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bin")
    for name, text in STAND_INS.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    return folder


@pytest.fixture
def job(trained, stand_ins, tmp_path):
    """`job(folder, stop)` runs two_nodes.sbatch, two processes a node: its folders, exit code and what it printed. Of
    eight steps four are an epoch."""
    text = (ROOT / "docs" / "cluster" / "two_nodes.sbatch").read_text()
    batch = tmp_path / "two_nodes.sbatch"
    batch.write_text(text.replace(" train_mymodel.py ", f" {RUN} "))

    def run(folder, stop=""):
        work = Work(trained.data, trained.tiles, trained.panels, tmp_path / folder)
        slurm = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "2"}
        slurm |= {"SLURM_JOB_NODELIST": "nodes", "SLURM_CPUS_PER_TASK": "1", "SLURM_LOG": str(tmp_path / "slurm")}
        env = os.environ | slurm | {"PATH": f"{stand_ins}:{os.environ['PATH']}", "STOP": stop}
        env |= {"OUT": str(work.encoder.parent), "CUDA_VISIBLE_DEVICES": ""}
        flags = work.argv("train_mymodel", "--Epoch", 2, "--Init_lr", 1e-3, "--save_every", 1)
        done = subprocess.run(["bash", batch, *flags], cwd=ROOT, env=env, capture_output=True, text=True, timeout=3000)
        return work, done

    return run


def place(work) -> tuple[int, int]:
    last = state(work, "train_mymodel", LAST)
    return last["next_epoch"], last["step"]


@pytest.mark.slow
@pytest.mark.timeout(9000)
def test_two_nodes_stopped_and_killed_within_epochs_end_in_the_same_weights(job, tmp_path):
    unbroken, done = job("unbroken")
    assert done.returncode == 0, done.stderr[-3000:]
    broken, done = job("broken", "usr1 2")
    assert done.returncode != 0 and "stopped by SIGTERM and saved before epoch 0, step 2" in done.stdout, done.stderr
    requeued = f"requeue {os.getpid()}\n"
    assert (tmp_path / "slurm").read_text() == requeued and place(broken) == (0, 2)
    broken, done = job("broken", "dies 2")
    assert done.returncode != 0 and "found one of them gone" in done.stderr and place(broken) == (0, 3)
    broken, done = job("broken")
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "slurm").read_text() == requeued  # Slurm itself queues the job of a lost node again
    assert not different(progress(broken, "train_mymodel"), progress(unbroken, "train_mymodel"))
