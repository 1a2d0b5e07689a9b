"""A run small enough for a test, through the real configs."""

import logging
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import sys
from functools import cache
from importlib import import_module
from pathlib import Path
from unittest import mock

import pytest
import torch
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from sj_taid.__main__ import main
from sj_taid.training import load_model, run
from sj_taid.training.config import compose
from sj_taid.training.evaluate import evaluate
from sj_taid.training.files import _LogFile
from sj_taid.training.task import Task
from sj_taid.training.train import train
from tests.metric.pixels import Pixels, classifier

CONF = Path(__file__).resolve().parents[2] / "conf"
#: of commands in processes of their own
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(CONF.parent)}

TINY_TRAINER = [
    "trainer.max_epochs=1",
    "trainer.limit_train_batches=2",
    "trainer.limit_val_batches=1",
    "trainer.limit_test_batches=1",
    "trainer.accelerator=cpu",
    "pictures=false",  # which take most of such a run
]

TINY_FSVAE = [
    "model=fsvae_small",
    "model.T=3",
    "model.hidden_channels=4",
    "model.latent_channels=5",
    "model.k=3",
    "dataset.image_size=8",
    *TINY_TRAINER,
]
#: whose samples are not measured
UNMEASURED = [*TINY_FSVAE, "~metric"]
TINY = [
    *TINY_FSVAE,
    "metric.samples=8",
    "metric.autoencoder.hidden_channels=4",
    "metric.autoencoder.latent_channels=3",
    "metric.autoencoder.epochs=1",
]

# Trained so far that the images depend on the latent.
TINY_ESVAE = [
    "model=esvae",
    "model.sample_from=flow",
    "model.flow_epochs=2",
    *(o for o in TINY[1:] if ".k=" not in o),
    "dataset.batch_size=64",
    "trainer.limit_train_batches=22",
    "optimizer.lr=1e-2",
]

TINY_CLASSIFICATION = [
    "task=classification",
    "model.T=2",
    "model.stages=[[4],[6]]",
    "model.hidden=8",
    "dataset.image_size=8",
    *TINY_TRAINER,
]


def write_images(folder, n, size=(20, 24), mode="RGB", suffix="png"):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        Image.new(mode, size, i).save(folder / f"{i:02}.{suffix}")


def start(folder, *arguments):
    """Start ``python -m sj_taid`` in ``folder``, where its output goes.

    It is forked from a process that has the imports done: see tests/conftest.py.
    """
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=run_command, args=(folder, *arguments))
    process.start()
    return process


def exit_code(folder, *arguments):
    """How a command ends, within five minutes."""
    process = start(folder, *arguments)
    process.join(timeout=300)
    if process.is_alive():
        process.kill()
        process.join()
    return process.exitcode


def run_command(folder, *arguments):
    os.setsid()
    os.chdir(folder)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(name, os.O_CREAT | os.O_APPEND | os.O_WRONLY), descriptor)
    os.environ |= ENVIRONMENT
    rank_zero_only.rank = int(os.environ.get("RANK", 0))  # torchrun's, as Lightning's import reads
    torch.set_num_threads(1)
    multiprocessing.set_start_method(None, force=True)  # the platform's, of what it starts itself
    # What Lightning starts for further devices, and joblib's workers, are of this module.
    sys.modules["__main__"] = import_module("sj_taid.__main__")
    sys.argv = ["sj-taid", *arguments]
    main()


def weights(run_or_checkpoint):
    return load_model(run_or_checkpoint).state_dict()


def assert_same_weights(run_or_checkpoint, expected):
    """Bit for bit."""
    for name, value in weights(run_or_checkpoint).items():
        assert torch.equal(value, expected[name]), name


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory):
    """What metrics and losses train is trained once for all tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SJ_TAID_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def fit(folder, *overrides):
    """Train the job of these overrides in ``folder``; returns its metrics."""
    return train(compose("train", overrides), folder)


def evaluated(run_or_checkpoint, *overrides):
    """The evaluation of a checkpoint, or of a run's last one."""
    return evaluate(compose("evaluate", [f"checkpoint={run_or_checkpoint}", *overrides]))


def stopped_in(epoch):
    """A context in which a training ends in this epoch, as by a cluster's time limit."""

    def stop(task, *_):
        if task.current_epoch == epoch:
            raise SystemExit("stopped")

    return mock.patch.object(Task, "on_train_batch_end", stop)


@pytest.fixture(autouse=True)
def _environment():
    """Lightning and the command line set variables of the process, which end with a test."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture(scope="module")
def one_thread():
    """As the processes have that a test starts: sums of more threads have other last digits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A copy of the finished run of these overrides; each is trained once."""

    @cache
    def finish(*overrides):
        folder = tmp_path_factory.mktemp("finished")
        fit(folder, *overrides)
        return folder

    return lambda *overrides: shutil.copytree(
        finish(*overrides), tmp_path_factory.mktemp("copy") / "run"
    )


@pytest.fixture
def folder(finished, tmp_path):
    """A copy of the run that a module's fixture ``finished`` gives, to do things to."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture(autouse=True)
def close_logs():
    """Close a run's train.log, which lies in a folder that goes with the test."""
    yield
    for handler in [*logging.getLogger().handlers]:
        if isinstance(handler, _LogFile):
            logging.getLogger().removeHandler(handler)
            handler.close()


@pytest.fixture
def sj_taid(monkeypatch):
    """Run a command line in this process; Hydra leaves pytest's logging alone."""

    def execute(*arguments):
        monkeypatch.setattr(sys, "argv", ["sj-taid", *arguments])
        monkeypatch.setattr(sys, "excepthook", sys.excepthook)
        main()

    interrupt = signal.getsignal(signal.SIGINT)
    yield execute
    signal.signal(signal.SIGINT, interrupt)  # which Lightning leaves ignored


class Network(Pixels):
    """What stands in for Inception: 8x8 images seen as four features and four classes."""

    def __init__(self, weights):
        super().__init__()
        assert weights == "weights.pth"
        self.classifier = classifier()

    def forward(self, image):
        return super().forward(image.unflatten(2, (2, 4)).unflatten(4, (2, 4)).mean((3, 5)))


def cells(markdown):
    """The rows of a table, without its padding."""
    return [re.split(r" *\| *", line.strip("| ")) for line in markdown.splitlines()]


ALIF, LIF = ({"neuron": kind, "decoder": "taid", "loss": None} for kind in ("alif", "lif"))


def metrics(command, choices=ALIF, seed=0, **figures):
    told = {"choices": choices, "overrides": [*command], "command": shlex.join(command)}
    costs = {"epochs": 2, "parameters": 830_000, "training_seconds": 90.0}
    origin = {"commit": "0123456789ab", "machine": "a laptop", "threads": 1}
    protocol = {"protocol": {"fad": "by hand"}, "evaluations": []}
    return {**figures, **costs, **told, **origin, **protocol, "seed": seed}


@pytest.fixture
def runs(tmp_path):
    """LIF and ALIF (the default) with two seeds each; one run unfinished, one broken."""
    written = [
        metrics(["experiment=mnist_small_cpu", "neuron=lif", "seed=0"], LIF, 0, fad=10.0),
        metrics(["experiment=mnist_small_cpu", "neuron=lif", "seed=1"], LIF, 1, fad=12.0),
        metrics(["experiment=mnist_small_cpu"], ALIF, 0, fad=7.0, accuracy=0.9978),
        metrics(["experiment=mnist_small_cpu", "seed=1"], ALIF, 1, fad=8.0, accuracy=0.9968),
    ]
    folder = tmp_path / "sweep"
    for number, content in enumerate(written):
        run.Run(folder / str(number)).save_metrics(content)
    (folder / "unfinished").mkdir()
    (folder / "broken").mkdir()
    (folder / "broken" / run.METRICS).write_text('{"fad": 3')
    for place in ("0", "1", "2", "3", "unfinished", "broken"):
        (folder / place / run.CONFIG).write_text("seed: 0\n")
    return folder
