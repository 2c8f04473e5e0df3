"""Interrupted trainings: stopped by a signal, killed, out of minutes or disk, two at once, and gone on with."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_runs import LAST, STAGES, Work, different, progress, state, stderr_line

import make_decoder_data
import train_decoder
import train_mymodel
from utils import settings
from utils.files import exclusive
from utils.training import checkpoint, loop
from utils.training.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
EPOCHS = ("--Epoch", 2, "--Init_lr", 1e-3, "--save_every", 1)  # of four steps each


def flags_of(script, trained):
    return EPOCHS if script == "train_mymodel" else ("--encoder", trained.encoder, *EPOCHS)


@pytest.fixture(scope="module")
def unbroken(trained, tmp_path_factory):
    """`unbroken(script)`: a training of two epochs in one go."""
    found = {}

    def run(script):
        if script not in found:
            found[script] = Work(trained.data, trained.tiles, trained.panels, tmp_path_factory.mktemp("unbroken"))
            found[script].run(script, *flags_of(script, trained))
        return found[script]

    return run


@pytest.fixture
def broken(trained, tmp_path):
    return Work(trained.data, trained.tiles, trained.panels, tmp_path)


def test_sums_that_are_saved_are_those_of_all_processes(monkeypatch):
    """Also those of a whole epoch, which are saved where its validation is interrupted."""
    figures = loop.StepFigures(0, {"loss": 6.0}, torch.device("cpu"))
    monkeypatch.setattr("utils.distributed.mean", lambda sums: {name: 2 * value for name, value in sums.items()})
    trainer = Trainer.__new__(Trainer)
    assert trainer.means(figures, n_steps=4) == {"loss": 3.0}
    assert trainer.sums == {"loss": 12.0}


def after_steps(monkeypatch, n, what):
    """Do `what` in place of the n-th step's end, as seen from inside."""
    left, after_step = [n], Trainer.after_step

    def watched(self, *args):
        left[0] -= 1
        if left[0] == 0:
            what()
        after_step(self, *args)

    monkeypatch.setattr(Trainer, "after_step", watched)


@pytest.mark.parametrize("script", STAGES)
@pytest.mark.parametrize(("step", "number"), [(1, signal.SIGTERM), (4, signal.SIGUSR1), (7, signal.SIGINT)])
def test_a_signal_saves_and_the_run_goes_on_to_the_same_end(
    script, step, number, unbroken, broken, trained, monkeypatch, capsys
):
    with monkeypatch.context() as patch:
        after_steps(patch, step, lambda: os.kill(os.getpid(), number))
        assert broken.exit_code(script, *flags_of(script, trained)) == 128 + number
    told = capsys.readouterr().out.splitlines()[-1]
    epoch, done = divmod(step, 4)
    where = f"epoch {epoch}, step {done}" if done else f"epoch {epoch - 1}, step 4"  # validation is still to do
    assert told == f"stopped by {number.name} and saved before {where}: go on with the same command and --resume"
    last = state(broken, script, LAST)
    assert (last["next_epoch"], last["step"]) == ((epoch, done) if done else (epoch - 1, 4))
    broken.run(script, *flags_of(script, trained), "--resume")
    assert not different(progress(broken, script), progress(unbroken(script), script))


@pytest.mark.parametrize(("script", "module"), [("train_mymodel", train_mymodel), ("train_decoder", train_decoder)])
def test_a_signal_does_not_wait_for_a_validation(script, module, unbroken, broken, trained, monkeypatch):
    def told(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("validation went on")

    validate, calls = module.validate, []

    def second(*args):
        calls.append(1)
        return told() if len(calls) == 2 else validate(*args)

    with monkeypatch.context() as patch:
        patch.setattr(module, "validate", second)
        assert broken.exit_code(script, *flags_of(script, trained)) == 143
    assert state(broken, script, LAST)["step"] == 4
    broken.run(script, *flags_of(script, trained), "--resume")
    assert not different(progress(broken, script), progress(unbroken(script), script))


def test_copies_of_a_signal_do_not_stop_the_save_but_a_later_ctrl_c_does(monkeypatch):
    """A launcher hands on what the queue has sent to all processes."""
    trainer = Trainer.__new__(Trainer)
    trainer.signal, trainer.signalled, trainer.interruptible_now = None, 0.0, False
    clock = [100.0]
    monkeypatch.setattr("utils.training.trainer.time.monotonic", lambda: clock[0])
    for number in (signal.SIGUSR1, signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        trainer._take(number, None)
    trainer.interruptible_now = True  # while it is saved
    clock[0] += 60
    trainer._take(signal.SIGTERM, None)
    assert trainer.signal == signal.SIGUSR1
    with pytest.raises(KeyboardInterrupt):
        trainer._take(signal.SIGINT, None)


def test_signals_do_again_what_they_did(broken):
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    broken.run("train_mymodel", "--Epoch", 1)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == [signal.SIG_DFL] * 2


@pytest.mark.parametrize("script", STAGES)
def test_killed_and_gone_on_with(script, unbroken, broken, trained):
    """SIGKILL in the 10th of the moments that count; tests/torture.py does it at many."""
    command = [sys.executable, ROOT / "tests" / "killed_run.py", 10, script]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(
        [*map(str, command), *broken.argv(script, *flags_of(script, trained))], cwd=ROOT, env=env, capture_output=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    broken.run(script, *flags_of(script, trained), "--resume")
    assert not different(progress(broken, script), progress(unbroken(script), script))


def test_an_epoch_without_interruption_is_saved_as_often_as_asked(broken, trained, monkeypatch):
    seen = []
    monkeypatch.setattr(
        checkpoint, "save_last", lambda out, kind, **state: seen.append((state["next_epoch"], state["step"]))
    )
    broken.run("train_mymodel", "--Epoch", 1, "--save_every", 3)
    assert seen == [(0, 0), (0, 3), (1, 0)]


def test_steps_of_several_batches_are_saved_at_the_next_step(broken, trained, monkeypatch):
    """Eight batches, three to a step: saves are asked for after 2, 4, 6 and 8."""
    seen = []
    monkeypatch.setattr(checkpoint, "save_last", lambda out, kind, **state: seen.append(state["step"]))
    broken.run("train_mymodel", "--Epoch", 1, "--batch_size", 8, "--accumulate", 3, "--save_every", 2)
    assert seen == [0, 3, 6, 0]


def test_a_run_is_gone_on_with_in_half_precision(broken, trained, capsys, monkeypatch):
    """fp16 has a scaler of gradients, which a file of fp32 lacks."""
    broken.run("train_mymodel", "--Epoch", 1)
    init = Trainer.__init__

    def with_scaler(self, *args):
        init(self, *args)
        self.parts["scaler"] = torch.amp.GradScaler("cpu")

    monkeypatch.setattr(Trainer, "__init__", with_scaler)
    broken.run("train_mymodel", "--Epoch", 1, "--resume")
    assert "going on at epoch 1, step 0" in capsys.readouterr().out


def test_a_run_ends_with_its_minutes(broken, unbroken, trained, capsys):
    script = "train_mymodel"
    assert broken.exit_code(script, *flags_of(script, trained), "--max_minutes", 1e-9) == 0
    assert "stopped by --max_minutes 1e-09 and saved before epoch 0, step 1" in capsys.readouterr().out
    broken.run(script, *flags_of(script, trained), "--resume")
    assert not different(progress(broken, script), progress(unbroken(script), script))


def test_other_flags_are_said_at_resume(broken, trained, capsys):
    broken.run("train_mymodel", "--Epoch", 1)
    broken.run("train_mymodel", "--Epoch", 2, "--Init_lr", 2e-4, "--workers", 0, "--resume")
    told = capsys.readouterr().out
    assert "warning: --resume with --Epoch 2, not 1, --Init_lr 0.0002, not 0.0001, --Min_lr" in told


@pytest.mark.parametrize("script", STAGES)
def test_other_conditions_are_said_at_resume(script, broken, trained, capsys, monkeypatch):
    """What the last digits depend on, in one line; nothing where all is the same, or an older file does not tell."""
    flags = ("--Epoch", 1) if script == "train_mymodel" else ("--Epoch", 1, "--encoder", trained.encoder)
    broken.run(script, *flags)
    kept = state(broken, script, LAST)
    now = {"threads": torch.get_num_threads(), "processes": 1, "workers": 0, "precision": "fp32", "compile": False}
    assert kept["conditions"] == now

    def told(**changed):
        torch.save(kept | changed, broken.out / STAGES[script] / LAST)
        capsys.readouterr()
        broken.run(script, *flags, "--resume")
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: --resume with")]

    assert told() == told(conditions={}) == []
    other = {"threads": 32, "processes": 4, "workers": 2, "precision": "bf16", "compile": True}
    (line,) = told(conditions=other)
    assert line == (
        f"warning: --resume with compile False, not True, precision fp32, not bf16, processes 1, not 4, threads "
        f"{now['threads']}, not 32, workers 0, not 2: the end is close to that of an unbroken run, not equal"
    )


def test_other_parameters_at_resume_are_refused(broken, capsys):
    broken.run("train_mymodel", "--Epoch", 1)
    assert broken.exit_code("train_mymodel", "--Epoch", 2, "--tune", "none", "--resume") == 2
    stderr_line(capsys, "--resume: expected the parameters of before, found --Epoch 2, not 1, --tune none, not all")


def test_the_order_does_not_depend_on_the_readers(broken, trained, unbroken):
    broken.run("train_mymodel", *flags_of("train_mymodel", trained), "--workers", 2)
    changed = different(progress(broken, "train_mymodel"), progress(unbroken("train_mymodel"), "train_mymodel"))
    assert all(name.endswith("/conditions/workers") for name in changed) and len(changed) == 2


# ---- figures that are read after several steps, as on a GPU


@pytest.mark.parametrize("script", STAGES)
def test_a_run_that_reads_its_losses_late_ends_alike(script, unbroken, broken, trained, monkeypatch):
    monkeypatch.setitem(loop.READ_EVERY, "cpu", 3)
    flags = flags_of(script, trained)[:-2]  # without a save at every step
    with monkeypatch.context() as patch:
        after_steps(patch, 6, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert broken.exit_code(script, *flags) == 143
    broken.run(script, *flags, "--resume")
    assert not different(progress(broken, script), progress(unbroken(script), script))


@pytest.mark.parametrize("save_every", [0, 2])
def test_a_bad_loss_that_is_found_late_is_not_saved(save_every, broken, trained, monkeypatch, capsys):
    """The loss of the second epoch's second step is not finite; it is found before a save, or at the epoch's end."""
    monkeypatch.setitem(loop.READ_EVERY, "cpu", 20)
    steps, figures_of = [], train_mymodel.figures_of

    def bad(out):
        steps.append(1)
        return figures_of(out) | ({"loss": out.loss * float("nan")} if len(steps) == 6 else {})

    monkeypatch.setattr(train_mymodel, "figures_of", bad)
    assert broken.exit_code("train_mymodel", "--Epoch", 3, "--save_every", save_every) == 2
    stderr_line(capsys, "found nan at epoch 1, step 1; .*the last epoch's weights are kept")
    assert len(steps) == (6 if save_every else 8)
    last = state(broken, "train_mymodel", LAST)
    assert (last["next_epoch"], last["step"]) == (1, 0)


# ---- accumulated gradients


def test_gradients_of_several_batches_make_one_step(broken, trained, monkeypatch):
    """Four batches of 16, two and two: two steps, each of the mean of two gradients."""
    grads, step = [], torch.optim.AdamW.step

    def recorded(self, *args, **more):
        grads.append([p.grad.clone() for group in self.param_groups for p in group["params"]])
        return step(self, *args, **more)

    monkeypatch.setattr(torch.optim.AdamW, "step", recorded)
    backward, single = torch.Tensor.backward, []

    def watched(self, *args, **more):
        single.append(self.item())
        return backward(self, *args, **more)

    monkeypatch.setattr(torch.Tensor, "backward", watched)
    broken.run("train_mymodel", "--Epoch", 1, "--accumulate", 2)
    assert len(grads) == 2 and len(single) == 4
    row = state(broken, "train_mymodel", LAST)["row"]
    assert row["loss"] == pytest.approx(2 * sum(single) / 4, rel=1e-6), "half of each batch's loss, twice"


def test_batches_that_make_no_whole_step_are_left_out():
    order = loop.EpochOrder(70, 10, 0, accumulate=3)
    assert len(order) == 6 == len(list(order))
    order.first = 4
    assert list(order) == list(loop.EpochOrder(70, 10, 0))[4:6]


@pytest.mark.parametrize("accumulate", [7, 8, 1000])
def test_an_epoch_of_fewer_batches_is_one_step(accumulate):
    order = loop.EpochOrder(75, 10, 0, accumulate=accumulate)
    assert (order.accumulate, len(order)) == (7, 7)
    assert list(order) == list(loop.EpochOrder(75, 10, 0))


def test_accumulating_beyond_an_epoch_is_accumulating_over_it(trained, tmp_path, capsys):
    """Four batches of 16: --accumulate 1000 ends with the weights of --accumulate 4, and says so."""
    works = {n: Work(trained.data, trained.tiles, trained.panels, tmp_path / str(n)) for n in (4, 1000)}
    warned = {}
    for n, work in works.items():
        work.run("train_mymodel", "--Epoch", 1, "--accumulate", n)
        warned[n] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert warned == {4: [], 1000: ["warning: --accumulate 1000: an epoch has 4 batches, which make one step"]}
    assert not different(progress(works[1000], "train_mymodel"), progress(works[4], "train_mymodel"))


# ---- two runs in one folder


def test_a_second_run_into_a_folder_is_refused(broken, capsys):
    broken.encoder.parent.mkdir(parents=True)
    with exclusive.exclusive(broken.encoder.parent, "--out"):
        assert broken.exit_code("train_mymodel", "--Epoch", 1) == 2
        stderr_line(
            capsys,
            "--out: expected a folder of this run's own, found another run writing to .*encoder_model; wait for it",
        )
    assert broken.encoder.parent.exists() and not list(broken.encoder.parent.iterdir())
    broken.run("train_mymodel", "--Epoch", 1)


def test_panels_beside_the_counts_are_written_by_one_run_at_a_time(simulated, tmp_path, capsys):
    """Without --panels they go into --data, which is held then."""
    data = shutil.copytree(simulated, tmp_path / "data")
    argv = ["--data", str(data), "--n_input_genes", "50", "--n_top_genes", "20"]

    def code(*flags):
        with pytest.raises(SystemExit) as stop:
            settings.run(make_decoder_data.main, make_decoder_data.parse_args([*argv, *flags]))
        return stop.value.code

    with exclusive.exclusive(data, "--data"):
        assert code() == 2
        stderr_line(capsys, "--data: expected a folder of this run's own, found another run writing to .*data; wait")
        assert not list(data.rglob("*.h5ad.part")) and code("--panels", str(tmp_path / "panels")) == 0
    assert code() == 0 and not (data / exclusive.LOCK).exists()
    assert len(list(data.rglob("filtered_feature_bc_matrix_one.h5ad"))) == 3


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EPERM])
def test_panels_into_read_only_data_are_refused_with_the_flag_to_use(simulated, tmp_path, monkeypatch, capsys, number):
    def refuse(path, *_):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(SystemExit):
        settings.run(make_decoder_data.main, make_decoder_data.parse_args(["--data", str(simulated)]))
    stderr_line(capsys, "--data: expected a folder that can be written to, found .*; fix: name one by --panels")


def test_missing_data_are_not_made_for_a_lock(tmp_path, capsys):
    with pytest.raises(SystemExit):
        settings.run(make_decoder_data.main, make_decoder_data.parse_args(["--data", str(tmp_path / "none")]))
    stderr_line(capsys, "none: expected")
    assert not (tmp_path / "none").exists()


def test_a_killed_process_lets_go(tmp_path):
    code = (
        "import os, signal; from pathlib import Path; from utils.files import exclusive\n"
        f"with exclusive.exclusive(Path({str(tmp_path)!r}), '--out'): os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL and (tmp_path / exclusive.LOCK).exists()
    with exclusive.exclusive(tmp_path, "--out"):
        pass
    assert not list(tmp_path.iterdir())


def test_a_folder_made_for_nothing_goes_again(tmp_path):
    with pytest.raises(ValueError, match="bad input"), exclusive.exclusive(tmp_path / "a" / "b", "--out"):
        raise ValueError("bad input")
    assert not list(tmp_path.iterdir())
    with exclusive.exclusive(tmp_path / "a" / "b", "--out"):
        (tmp_path / "a" / "b" / "result.json").write_text(json.dumps({}))
    assert (tmp_path / "a" / "b" / "result.json").exists() and not (tmp_path / "a" / "b" / exclusive.LOCK).exists()
