"""Faults done to a run: it says what happened, and ends as if nothing had."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import lightning as L
import pytest
import torch

from sj_taid.training import run
from sj_taid.training.train import train
from tests.data.made_up import cut
from tests.training.conftest import (
    CONF,
    ENVIRONMENT,
    assert_same_weights,
    exit_code,
    weights,
    write_images,
)

#: what draws random numbers: the order, augmentation, dropped steps, the posterior's samples,
#: scheduled sampling; on files that a process loads
JOB = [
    "task=autoencoding", "model=fsvae_small", "model.T=3", "model.hidden_channels=[4,6]",
    "model.latent_channels=5", "model.k=3", "dataset=image_folder", "dataset.channels=1",
    "dataset.image_size=8", "dataset.augment=affine", "dataset.batch_size=2",
    "dataset.num_workers=1", "trainer.max_epochs=4", "trainer.accelerator=cpu",
    "trainer.limit_train_batches=3", "trainer.limit_val_batches=1", "trainer.limit_test_batches=1",
    "callbacks=quiet", "pictures=false",
]  # fmt: skip
QUIET = ["hydra/job_logging=none", "hydra/hydra_logging=none"]


class Fault(L.Callback):
    """Strikes a run once, in its third epoch, and leaves a run alone that resumes."""

    kills = False  # the process, which is therefore one of its own
    left = 1  # the epoch, from 0, of the checkpoint that is left
    at_end = False  # strikes before the metrics are written
    says = ""  # the message of a run that is stopped
    refused = ""  # the message of a run that resumes from a checkpoint that was cut
    job: tuple[str, ...] = ()

    @staticmethod
    def place(folder):
        """Where the run's folder lies while all this happens."""
        return nullcontext()

    @staticmethod
    def mend(there):
        """Take the cause away."""

    def on_load_checkpoint(self, *_):
        self.strike = lambda trainer: None

    def on_train_batch_start(self, trainer, task, batch, index):
        if not self.at_end and trainer.current_epoch == 2 and index == 1:
            self.strike(trainer)

    def on_test_end(self, trainer, task):
        if self.at_end:
            self.strike(trainer)


class KilledWithinEpoch(Fault):
    kills = True

    def strike(self, trainer):
        os.kill(os.getpid(), signal.SIGKILL)


def half(path):
    path.write_bytes(b"{half")
    os.kill(os.getpid(), signal.SIGKILL)


class KilledWithinCheckpoint(Fault):
    kills = True

    def strike(self, trainer):
        torch.save = lambda content, path: half(path)


class KilledWithinMetrics(Fault):
    kills, at_end, left = True, True, 3

    def strike(self, trainer):
        Path.replace = lambda path, target: half(path)


RESUME = "Resume with: sj-taid train resume="


class CtrlC(Fault):
    says = f"Stopped. {RESUME}"

    def strike(self, trainer):
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's "&" has it ignored
        signal.raise_signal(signal.SIGINT)


class Terminated(Fault):
    """As a cluster does where a job's time is over."""

    says = f"Stopped. {RESUME}"

    def strike(self, trainer):
        signal.raise_signal(signal.SIGTERM)


class TruncatedCheckpoint(CtrlC):
    refused = r"last\.ckpt is not a whole checkpoint .* move it away and give the same command"


class LossNotFinite(Fault):
    says = "the loss is nan in epoch 3, after step 7: the model has diverged"

    def strike(self, trainer):
        trainer.lightning_module.model.training_loss = lambda *_: {"loss": torch.tensor(torch.nan)}


class WeightsNotFinite(Fault):
    says = "a parameter is not finite in epoch 3, after step 9: the model has diverged"

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 9:
            self.strike(trainer)

    def on_train_batch_start(self, *_):
        pass

    def strike(self, trainer):
        next(trainer.lightning_module.parameters()).data.fill_(torch.inf)


class KilledLoader(Fault):
    says = r"DataLoader worker .*(killed by signal|exited unexpectedly)"

    def strike(self, trainer):
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGKILL)
            worker.join()


class FullDisk(Fault):
    says = rf"(?s)last\.ckpt cannot be written .*make room.*{RESUME}"

    @staticmethod
    @contextmanager
    def place(folder):
        folder.mkdir()
        mount("-t", "tmpfs", "-o", "size=4m", "tmpfs", folder)
        yield
        subprocess.run(["umount", "--lazy", folder], check=True)

    def strike(self, trainer):
        disk = os.statvfs(trainer.default_root_dir)
        size = (disk.f_bavail - 2) * disk.f_frsize
        Path(trainer.default_root_dir, "full").write_bytes(bytes(size))

    @staticmethod
    def mend(there):
        (there.folder / "full").unlink()


class ReadOnlyFolder(Fault):
    job = ("~logger",)
    says = rf"(?s)last\.ckpt cannot be written .*{RESUME}"

    def strike(self, trainer):
        make_read_only(Path(trainer.default_root_dir))

    @staticmethod
    def mend(there):
        make_writable(there.folder)


class ReadOnlyForTracker(ReadOnlyFolder):
    job = ()
    says = rf"(?s)run/\.probe cannot be written .*{RESUME}"


class ReadOnlyForMetrics(ReadOnlyFolder):
    at_end, left = True, 3
    says = rf"(?s)metrics\.json cannot be written .*{RESUME}"


def mount(*arguments):
    if os.geteuid() or subprocess.run(["mount", *arguments], check=False).returncode:
        pytest.skip("needs root and mount, for a folder of its own kind")


def make_read_only(folder):
    if os.geteuid() == 0:  # who may write everywhere but where nobody may
        mount("--bind", "-o", "ro", folder, folder)
    else:
        for place in (folder, *folder.rglob("*/")):
            place.chmod(0o555)


def make_writable(folder):
    if os.geteuid() == 0:
        subprocess.run(["umount", "--lazy", folder], check=True)
    else:
        for place in (folder, *folder.rglob("*/")):
            place.chmod(0o755)


@pytest.fixture(autouse=True)
def _no_mount_stays(tmp_path):
    yield
    mounts = Path("/proc/self/mounts")
    lines = mounts.read_text().splitlines() if mounts.is_file() else []
    for place in {line.split()[1] for line in lines if f" {tmp_path}/" in line}:
        subprocess.run(["umount", "--lazy", place], check=True)


def made_up(folder):
    write_images(Path(folder), 24, size=(8, 8), mode="L")


def with_callback(cls):
    """In place of the progress bar, since that is no choice, and so the run stays the same one."""
    return f"++callbacks.progress_bar._target_={__name__}.{cls.__name__}"


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """The overrides of the run that everything happens to."""
    images = tmp_path_factory.mktemp("images")
    made_up(images)
    return [*JOB, f"dataset.root={images}"]


@pytest.fixture(scope="module")
def undisturbed(tiny, job, tmp_path_factory):
    """The metrics and weights of the run that nothing happens to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return train(tiny(*job, tiny=False), folder), weights(folder)


@pytest.fixture
def stopped(sj_taid, capsys):
    """The message of a run that does not come to its end."""

    def execute(*arguments):
        with pytest.raises((SystemExit, RuntimeError)) as ended:
            sj_taid("train", *arguments, *QUIET)
        notes = getattr(ended.value, "__notes__", [])
        return "\n".join([capsys.readouterr().err, str(ended.value), *notes])

    return execute


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault",
    [
        KilledWithinEpoch, KilledWithinCheckpoint, KilledWithinMetrics, CtrlC, Terminated,
        TruncatedCheckpoint, LossNotFinite, WeightsNotFinite, KilledLoader, FullDisk,
        ReadOnlyFolder, ReadOnlyForTracker, ReadOnlyForMetrics,
    ],
    ids=lambda fault: fault.__name__,
)  # fmt: skip
def test_run_ends_as_if_the_fault_had_not_happened(
    fault, job, undisturbed, sj_taid, stopped, tmp_path
):
    there = run.Run(tmp_path / "run")
    arguments = [*job, *fault.job, f"hydra.run.dir={there.folder}"]

    def advised():
        return [f"resume={there.folder}"] if there.checkpoint.is_file() else arguments

    with fault.place(there.folder):
        if fault.kills:
            assert exit_code("train", *arguments, with_callback(fault), *QUIET) == -signal.SIGKILL
        else:
            said = stopped(*arguments, with_callback(fault))
            fault.mend(there)
            assert re.search(fault.says, said), said
        assert torch.load(there.checkpoint, weights_only=True)["epoch"] == fault.left
        assert not (there.folder / run.METRICS).exists()
        if fault.refused:
            cut(there.checkpoint)
            said = stopped(*advised())
            assert re.search(fault.refused, said), said
            there.checkpoint.unlink()
        sj_taid("train", *advised(), *QUIET)

        metrics, (expected, expected_weights) = there.metrics, undisturbed
        assert_same_weights(there.folder, expected_weights)
        assert metrics["reconstruction"] == expected["reconstruction"]
        assert metrics["epochs"] == 4 and 0 <= metrics["training_seconds"] < 3600
        assert not list(tmp_path.rglob(".*.tmp"))


def test_run_names_a_read_only_folder(stopped, job, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    make_read_only(folder)
    said = stopped(*job, f"hydra.run.dir={folder}")
    make_writable(folder)
    message = rf"{folder} cannot be written .*choose another folder with hydra\.run\.dir="
    assert re.search(message, said), said


class KilledSecondRank(Fault):
    def strike(self, trainer):
        if trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_run_of_two_processes_survives_the_death_of_one(job, tmp_path):
    @contextmanager
    def torchrun(folder, *more):
        arguments = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
            CONF.parent / "experiments" / "train.py", *job, f"hydra.run.dir={folder}",
            "trainer.devices=2", *more,
        ]  # fmt: skip
        with subprocess.Popen(
            arguments, cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
        ) as process:
            yield process

    there = run.Run(tmp_path / "run")
    with torchrun(there.folder, with_callback(KilledSecondRank)) as process:
        while process.poll() is None and not there.checkpoint.is_file():
            time.sleep(0.1)
        said = process.communicate(timeout=60)[1]  # no hang
    assert process.returncode != 0 and "Signal 9 (SIGKILL)" in said, said
    assert torch.load(there.checkpoint, weights_only=True)["epoch"] <= 1
    for folder in (there.folder, tmp_path / "undisturbed"):
        with torchrun(folder) as process:
            said = process.communicate()[1]
        assert process.returncode == 0, said
    assert there.metrics["epochs"] == 4
    assert_same_weights(there.folder, weights(tmp_path / "undisturbed"))
