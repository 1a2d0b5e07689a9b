"""What may happen to a run, done to it: it says what happened, and ends as if it had not."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import lightning as L
import pytest
import torch

from sj_taid.training import load_model, run
from sj_taid.training.commands import train
from tests.data.made_up import cut
from tests.training.conftest import CONF, script, write_images

#: what draws random numbers: the order, augmentation, dropped steps, the posterior's samples
JOB = [
    "task=autoencoding", "model=fsvae_small", "model.T=3", "model.hidden_channels=[4,6]",
    "model.latent_channels=5", "model.k=3", "dataset.image_size=8", "dataset.augment=affine",
    "trainer.max_epochs=4", "trainer.accelerator=cpu", "trainer.limit_train_batches=3",
    "trainer.limit_val_batches=1", "trainer.limit_test_batches=1", "callbacks=quiet",
]  # fmt: skip

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(CONF.parent)}


class Strike(L.Callback):
    """Does something to the run in its third epoch."""

    def on_train_batch_start(self, trainer, task, batch, index):
        if trainer.current_epoch == 2 and index == 1:
            self.strike(trainer)


class Kill(L.Callback):
    """Kills the process within an epoch, or while it writes."""

    def __init__(self, within):
        self.within = within

    def on_train_batch_end(self, trainer, *_):
        if self.within == "epoch" and trainer.global_step == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        if trainer.global_step == 8 and self.within == "checkpoint":
            torch.save = lambda content, path: self.half(path)

    def on_test_end(self, trainer, task):
        if self.within == "metrics":
            Path.replace = lambda path, target: self.half(path)

    def half(self, path):
        path.write_bytes(b"{half")
        os.kill(os.getpid(), signal.SIGKILL)


class DamageFile(Strike):
    def strike(self, trainer):
        for path in Path(trainer.datamodule.root).glob("*"):
            cut(path)


class KillLoader(Strike):
    def strike(self, trainer):
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGKILL)
            worker.join()


class SetClockBack(Strike):
    def strike(self, trainer):
        now = time.time
        time.time = lambda: now() - 86400


def weights(folder):
    return load_model(folder).state_dict()


def assert_same(folder, expected):
    for name, value in weights(folder).items():
        assert torch.equal(value, expected[name]), name


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def small(tiny):
    return lambda *overrides: tiny(*JOB, *overrides, tiny=False)


@pytest.fixture
def files(small, tmp_path):
    """A run on files that a process loads, and what it ends with undisturbed."""
    write_images(tmp_path / "images", 12, size=(8, 8), mode="L")
    of_files = [
        "dataset=image_folder", f"dataset.root={tmp_path / 'images'}", "dataset.channels=1",
        "dataset.batch_size=2", "dataset.num_workers=1",
    ]  # fmt: skip
    train(small(*of_files), tmp_path / "undisturbed")
    return lambda *overrides: small(*of_files, *overrides), weights(tmp_path / "undisturbed")


def with_callback(cls):
    return f"+callbacks.fault._target_={__name__}.{cls.__name__}"


def test_killed_three_times_it_ends_as_if_undisturbed(small, tmp_path):
    train(small(), tmp_path / "undisturbed")
    folder = tmp_path / "killed"
    for within, epoch in (("epoch", 1), ("checkpoint", 1), ("metrics", 3)):
        command = script(
            "train.py", *JOB, f"hydra.run.dir={folder}", with_callback(Kill),
            f"+callbacks.fault.within={within}",
        )  # fmt: skip
        done = subprocess.run(
            command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False
        )
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert torch.load(run.Run(folder).checkpoint, weights_only=True)["epoch"] == epoch
        assert not (folder / run.METRICS).exists()
        assert len(list(folder.rglob(".*.tmp"))) == (within != "epoch")
    with run.Run(folder).lock():
        train(small(), folder)
    assert_same(folder, weights(tmp_path / "undisturbed"))
    assert not list(folder.rglob(".*.tmp"))
    assert json.loads((folder / run.METRICS).read_text())["epochs"] == 4


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (DamageFile, r"\.png cannot be read .*neither can .*\.png"),
        (KillLoader, r"DataLoader worker .*(killed by signal|exited unexpectedly)"),
    ],
)
def test_a_fault_while_loading_is_named_and_the_run_goes_on(files, tmp_path, fault, message):
    cfg, undisturbed = files
    kept = {path: path.read_bytes() for path in (tmp_path / "images").iterdir()}
    with pytest.raises(RuntimeError, match=message):
        train(cfg(with_callback(fault)), tmp_path / "run")
    for path, content in kept.items():
        path.write_bytes(content)
    train(cfg(), tmp_path / "run")
    assert_same(tmp_path / "run", undisturbed)


def test_a_clock_set_back_changes_nothing(small, tmp_path, monkeypatch):
    train(small(), tmp_path / "undisturbed")
    monkeypatch.setattr(time, "time", time.time)  # is put back
    metrics = train(small(with_callback(SetClockBack)), tmp_path / "run")
    assert 0 <= metrics["training_seconds"] < 3600
    assert_same(tmp_path / "run", weights(tmp_path / "undisturbed"))


def test_a_read_only_folder_is_named(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir(0o555)
    if os.geteuid() == 0:  # who may write everywhere but where nobody may
        mount = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)]
        if subprocess.run(mount, check=False).returncode != 0:
            pytest.skip("needs mount, for a folder that root cannot write")
    try:
        message = rf"{folder} cannot be written .*choose another folder with hydra\.run\.dir="
        with pytest.raises(OSError, match=message), run.Run(folder).lock():
            pytest.fail("locked")
    finally:
        if os.geteuid() == 0:
            subprocess.run(["umount", str(folder)], check=True)


class KillSecondRank(Strike):
    def strike(self, trainer):
        if trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_dead_rank_ends_the_run_with_a_message(tmp_path):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
        *script("train.py", *JOB, f"hydra.run.dir={tmp_path / 'run'}")[1:], "trainer.devices=2",
        with_callback(KillSecondRank),
    ]  # fmt: skip
    with subprocess.Popen(
        command, cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
    ) as process:
        checkpoint = run.Run(tmp_path / "run").checkpoint
        while process.poll() is None and not checkpoint.is_file():
            time.sleep(0.1)
        said = process.communicate(timeout=60)[1]
    assert process.returncode != 0 and "Signal 9 (SIGKILL)" in said, said
    assert torch.load(checkpoint, weights_only=True)["epoch"] <= 1
