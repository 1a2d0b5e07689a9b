"""Faults done to a run: it says what happened, and ends as if nothing had."""

import os
import re
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import lightning as L
import pytest
import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from sj_taid.training import run
from tests.training.conftest import (
    UNMEASURED,
    assert_same_weights,
    exit_code,
    fit,
    run_command,
    weights,
    write_images,
)

#: what draws random numbers: the order, augmentation, dropped steps, the posterior's samples,
#: scheduled sampling; on files that a process loads
JOB = [
    *(*UNMEASURED, "dataset=image_folder", "dataset.channels=1", "dataset.augment=affine"),
    *("dataset.batch_size=2", "dataset.num_workers=1", "trainer.max_epochs=3"),
    *("trainer.limit_train_batches=3", "callbacks=quiet", "~logger"),
]
QUIET = ["hydra/job_logging=none", "hydra/hydra_logging=none"]


def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def kill_within_checkpoint(trainer):
    def write_half(path, content):
        path.write_text("{half")
        kill()

    Path.write_bytes = write_half


def kill_second_process(trainer):
    if trainer.global_rank == 1:
        kill()


def spoil_loss(trainer):
    nan = {"loss": torch.tensor(torch.nan), "image": None}
    trainer.lightning_module.model.training_loss = lambda *_: nan


def fill_disk(trainer):
    disk = os.statvfs(trainer.default_root_dir)
    size = (disk.f_bavail - 2) * disk.f_frsize
    Path(trainer.default_root_dir, "full").write_bytes(bytes(size))


class Strike(L.Callback):
    """Calls a function of this module in a run's third epoch, but not in a run that resumes.

    It stands in place of the progress bar, since that is no choice, and so the run stays the same.
    """

    def __init__(self, fault):
        self.fault = fault

    def on_load_checkpoint(self, *_):
        self.fault = None

    def on_train_batch_start(self, trainer, task, batch, index):
        if self.fault and trainer.current_epoch == 2 and index == 1:
            globals()[self.fault](trainer)


TRUST = f"trust=[{__name__}.Strike]"  # which the run's config names


def with_fault(fault):
    return [f"++callbacks.progress_bar={{_target_: {__name__}.Strike, fault: {fault}}}", TRUST]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """The overrides of the run that everything happens to."""
    images = tmp_path_factory.mktemp("images")
    write_images(images, 24, size=(8, 8), mode="L")
    return [*JOB, f"dataset.root={images}"]


@pytest.fixture(scope="module")
def undisturbed(job, tmp_path_factory):
    """The metrics and weights of the run that nothing happens to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    metrics = fit(folder, *job)
    assert not {"tensorboard", "csv", "lightning_logs"} & {path.name for path in folder.iterdir()}
    return metrics, weights(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("kill_within_checkpoint", None),
        ("spoil_loss", "the loss is nan in epoch 3, after step 7: the model has diverged"),
        ("fill_disk", r"(?s)No space .*: '.*last\.ckpt'.*Resume with: sj-taid train resume="),
    ],
)
def test_run_ends_as_if_the_fault_had_not_happened(
    fault, says, job, undisturbed, sj_taid, capsys, tmp_path, request
):
    there = run.Run(tmp_path / "run")
    arguments = ["train", *job, f"hydra.run.dir={there.folder}", *with_fault(fault), *QUIET]
    if fault == "fill_disk":
        there.folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", there.folder]
        if os.geteuid() or subprocess.run(mount, check=False).returncode:
            pytest.skip("needs root and mount, for a disk of its own")
        request.addfinalizer(lambda: subprocess.run(["umount", "--lazy", there.folder], check=True))
    if says:
        with pytest.raises(SystemExit) as ended:
            sj_taid(*arguments)
        said = capsys.readouterr().err + str(ended.value)
        assert re.search(says, said), said
    else:
        assert exit_code(tmp_path, *arguments) == -signal.SIGKILL
    left = torch.load(there.checkpoint, weights_only=True)
    assert left["epoch"] == 1 and not there.is_finished
    (there.folder / "full").unlink(missing_ok=True)
    sj_taid("train", f"resume={there.folder}", TRUST, *QUIET)

    metrics, (expected, expected_weights) = there.metrics, undisturbed
    assert_same_weights(there.folder, expected_weights)
    assert metrics["reconstruction"] == expected["reconstruction"]
    assert metrics["epochs"] == 3 and 0 <= metrics["training_seconds"] < 3600
    assert not list(tmp_path.rglob(".*.tmp"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("when", "least", "epochs"),
    [("stopping_threshold: 100", 0, 1), ("min_delta: 100, patience: 1", 3, 3)],
)
def test_run_that_early_stopping_has_ended_stays_ended(when, least, epochs, job, tmp_path):
    options = f"monitor: val/reconstruction, {when}"
    stop = f"{{_target_: lightning.pytorch.callbacks.EarlyStopping, {options}}}"
    length = ["trainer.max_epochs=6", f"+trainer.min_epochs={least}", "dataset.num_workers=0"]
    job = [*job, f"+callbacks.stop={stop}", *length]
    interrupted = mock.patch.object(run.Run, "save_metrics", side_effect=KeyboardInterrupt)
    with interrupted, pytest.raises(KeyboardInterrupt):
        fit(tmp_path, *job)
    left = torch.load(run.Run(tmp_path).checkpoint, weights_only=True)
    assert fit(tmp_path, *job)["epochs"] == left["epoch"] + 1 == epochs


#: torchrun --standalone --nproc-per-node=2, whose processes begin with the imports done
TORCHRUN = LaunchConfig(
    *(1, 1, 2), max_restarts=0, start_method="forkserver",
    run_id="run", rdzv_backend="c10d", rdzv_endpoint="localhost:0",
)  # fmt: skip


@pytest.mark.slow
def test_run_of_two_processes_ends_with_the_death_of_one_and_resumes(job, sj_taid, tmp_path):
    there = run.Run(tmp_path / "run")
    arguments = [
        *job, f"hydra.run.dir={there.folder}",
        "trainer.devices=2", "dataset.num_workers=0",  # a fork among threads may hang
        *with_fault("kill_second_process"),
    ]  # fmt: skip
    launch = elastic_launch(TORCHRUN, run_command)
    # torchrun names the first that it sees end: the killed process, or the one that waits for it
    died = pytest.raises(ChildFailedError, match=r"9 \(SIGKILL\)|by peer")
    with ThreadPoolExecutor(1) as pool, died:
        pool.submit(launch, tmp_path, "train", *arguments).result()
    assert torch.load(there.checkpoint, weights_only=True)["epoch"] <= 1
    sj_taid("train", f"resume={there.folder}", TRUST, "trainer.devices=1", *QUIET)
    assert there.metrics["epochs"] == 3
