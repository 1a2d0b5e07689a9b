"""Sweeps: a folder for each job, none overwritten, and a killed sweep resumes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import filelock
import lightning as L
import pytest
import torch

from sj_taid.training import run
from sj_taid.training.callbacks import RandomNumbers
from tests.training.conftest import (
    ENVIRONMENT,
    TINY_CLASSIFICATION,
    assert_same_weights,
    exit_code,
    fit,
    start,
    weights,
)

SWEEP = ["neuron=alif,lif"]
JOB = [*TINY_CLASSIFICATION, "trainer.max_epochs=4", "dataset.augment=affine", "~logger"]


class Wait(L.Callback):
    """Lets no job end before its sweep is killed, and a file tells so."""

    def __init__(self, until):
        self.until = Path(until)

    def on_train_epoch_start(self, trainer, module):
        while trainer.current_epoch == 2 and not self.until.exists():
            time.sleep(0.02)


@pytest.fixture(scope="module")
def uninterrupted(one_thread, tmp_path_factory):
    """Metrics and weights of the sweep's jobs, one after the other in this process."""
    ended = {}
    for neuron in ("alif", "lif"):
        folder = tmp_path_factory.mktemp("job")
        ended[neuron] = fit(folder, *JOB, f"neuron={neuron}"), weights(folder)
    return ended


CORES, SUBMITIT = ["cores", "hydra.launcher.n_jobs=2"], ["submitit_local"]
RAY = ["gpus", "hydra.launcher.ray.remote.num_gpus=0"]


@pytest.mark.parametrize(
    ("first", "then"),
    [
        pytest.param(CORES, SUBMITIT, marks=pytest.mark.slow),
        pytest.param(RAY, RAY, marks=pytest.mark.ray),
    ],
    ids=["cores", "ray"],
)
def test_killed_sweep_resumes_and_ends_as_an_uninterrupted_one(
    uninterrupted, tmp_path, first, then
):
    """By the same launcher, or by another."""
    wait = f"++callbacks.progress_bar={{_target_: {__name__}.Wait, until: {tmp_path / 'killed'}}}"
    sweep, resumed = (
        ["train", "-m", *SWEEP, *JOB, "callbacks=quiet", wait, f"trust=[{__name__}.Wait]",
         f"hydra.sweep.dir={tmp_path}", f"hydra/launcher={name}", *more]
        for name, *more in (first, then)
    )  # fmt: skip
    process = start(tmp_path, *sweep)
    while process.is_alive() and not list(tmp_path.glob(f"*/{run.CHECKPOINTS}/last.ckpt")):
        time.sleep(0.02)
    assert process.is_alive(), (tmp_path / "stderr").read_text()
    os.killpg(process.pid, signal.SIGKILL)
    process.join()
    for lock in tmp_path.glob(f"*/{run.LOCK}"):  # a cluster's processes outlive the launcher
        filelock.FileLock(lock).acquire(timeout=300).lock.release()
    assert not list(tmp_path.glob(f"*/{run.METRICS}"))

    (tmp_path / "killed").touch()
    assert exit_code(tmp_path, *resumed) == 0, (tmp_path / "stderr").read_text()
    folders = [path.parent for path in tmp_path.glob(f"*/{run.CONFIG}")]
    assert len(folders) == 2  # both sweeps' alike
    for folder in folders:
        metrics = run.Run(folder).metrics
        alone, expected = uninterrupted[metrics["choices"]["neuron"]]
        assert metrics["loss"] == alone["loss"] and metrics["epochs"] == 4
        assert f"neuron={metrics['choices']['neuron']}" in metrics["command"]
        assert "hydra" not in metrics["command"]
        assert_same_weights(folder, expected)


#: a sweep of two workers: one has a job that does not end, and there is none for the other
SWEEP_OF_WORKERS = """
from joblib import Parallel, delayed
from sj_taid.training.cli import end_workers_with_sweep

end_workers_with_sweep()
job = "print(1, flush=True); import threading; threading.Event().wait()"
Parallel(2)([delayed(exec)("", {}), delayed(exec)(job, {})])
"""


@pytest.mark.slow
def test_workers_end_with_their_parent():
    command, environment = [sys.executable, "-c", SWEEP_OF_WORKERS], os.environ | ENVIRONMENT
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout.readline() == b"1\n"
        process.kill()
        process.communicate(timeout=300)  # to the end of the output, which a worker holds open


def test_random_numbers_restores_this_devices_state(monkeypatch):
    state, taken = torch.arange(3), []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: state)
    monkeypatch.setattr(torch.cuda, "set_rng_state", taken.append)
    saved = RandomNumbers().state_dict()
    resumed = RandomNumbers()
    resumed.load_state_dict(saved)
    expected = torch.rand(3)
    for _ in range(2):
        resumed.on_fit_start(None, None)
    assert taken == [state] and torch.equal(torch.rand(3), expected)
