"""Metrics by epoch and set: the last epoch, the best on validation, the best on the test set."""

import json
import shutil
from unittest import mock

import pytest
import torch

from sj_taid.data import Digits
from sj_taid.training import compare, evaluator, run
from sj_taid.training.checkpoint import read_checkpoint
from sj_taid.training.classification import Classification
from tests.training.conftest import (
    TINY,
    TINY_CLASSIFICATION,
    UNMEASURED,
    Network,
    assert_same_weights,
    evaluated,
    fit,
    stopped_in,
    weights,
)

#: It learns something in two epochs.
JOB = [
    *(*TINY_CLASSIFICATION, "model.hidden=32", "model.dropout=[0,0]", "optimizer.lr=1e-2"),
    *("trainer.max_epochs=4", "trainer.limit_train_batches=20"),
    *("trainer.limit_val_batches=null", "trainer.limit_test_batches=null"),
]


def fit_spoiled(folder, *overrides):
    """Train what forgets everything in its third epoch, so the best epoch is not the last."""

    def forget(task):
        if task.current_epoch == 2:
            for parameter in task.parameters():
                parameter.data.zero_()

    with mock.patch.object(Classification, "on_train_epoch_start", forget):
        return fit(folder, *JOB, *overrides)


def logged(folder, name):
    checkpoint = torch.load(run.Run(folder).checkpoint, weights_only=True)
    return [epoch[name] for epoch in checkpoint["callbacks"]["History"]["epochs"]]


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory):
    """A finished run, and in which functions of the trainer it read the test set."""
    folder, tested_in = tmp_path_factory.mktemp("spoiled"), set()
    with pytest.MonkeyPatch.context() as patch:
        test_dataloader = Digits.test_dataloader
        patch.setattr(
            Digits,
            "test_dataloader",
            lambda self: tested_in.add(self.trainer.state.fn.value) or test_dataloader(self),
        )
        fit_spoiled(folder)
    return folder, tested_in


def test_best_validation_epoch_is_saved_and_tested(spoiled, tmp_path):
    original, tested_in = spoiled
    assert tested_in == {"test"}  # never in training
    shutil.copytree(original, tmp_path, dirs_exist_ok=True)
    metrics, objective = run.Run(tmp_path).metrics, run.Run(tmp_path).config.objective
    values = logged(tmp_path, "val/accuracy")
    best = values.index(max(values)) + 1
    assert best < 3 and metrics["best_validation_epoch"] == best
    assert torch.load(run.Run(tmp_path).best, weights_only=True)["epoch"] == best - 1
    assert metrics["validation_accuracy"] == values[-1] == metrics[objective]
    assert metrics["accuracy_best_validation_epoch"] > max(0.3, 2 * metrics["accuracy"])
    assert "accuracy_best_test_epoch" not in metrics
    how = "trained on 1294 samples, tested on 359, validated on 144"
    assert metrics["protocol"]["accuracy_best_validation_epoch"] == how

    # Evaluated later, each checkpoint gives its own metrics, and neither replaces the other's.
    later = evaluated(tmp_path)
    assert later["protocol"].keys() == {"accuracy"}
    assert later["metrics"]["accuracy"] == metrics["accuracy"]
    of_best = evaluated(tmp_path / run.CHECKPOINTS / "best.ckpt")["metrics"]
    assert of_best.keys() <= metrics.keys()
    for name in ("accuracy_best_validation_epoch", "loss_best_validation_epoch"):
        assert of_best[name] == metrics[name]
    read = run.Run(tmp_path).latest_metrics
    assert {name: read[name] for name in metrics} == metrics


def test_best_test_epoch_counts_without_a_validation_set(tmp_path):
    metrics = fit_spoiled(tmp_path, "dataset.validation=null")
    values = logged(tmp_path, "val/accuracy")
    assert metrics["accuracy_best_test_epoch"] == max(values) > 2 * metrics["accuracy"]
    assert metrics["accuracy"] == pytest.approx(values[-1])
    assert not {"validation_accuracy", "accuracy_best_validation_epoch"} & metrics.keys()
    assert not run.Run(tmp_path).best.exists()
    how = "trained on 1438 samples, tested on 359"
    assert set(metrics["protocol"].values()) == {how}


@pytest.mark.slow
def test_epochs_without_validation_have_no_metrics_of_it(tmp_path):
    every_second = ["trainer.check_val_every_n_epoch=2", "trainer.max_epochs=3", "pictures=true"]
    metrics = fit(str(tmp_path), *JOB, "trainer.limit_train_batches=2", *every_second)
    checkpoint = read_checkpoint(run.Run(tmp_path).checkpoint)
    values = [epoch.get("val/loss") for epoch in checkpoint["callbacks"]["History"]["epochs"]]
    assert values == [None, metrics["validation_loss"], None]
    assert (tmp_path / "curves.png").is_file()


@pytest.mark.slow
def test_best_validation_epoch_survives_a_kill(spoiled, tmp_path):
    undisturbed = run.Run(spoiled[0]).metrics
    with stopped_in(3), pytest.raises(SystemExit):
        fit_spoiled(tmp_path / "run")
    assert not list(tmp_path.rglob(".*.tmp"))
    metrics = fit_spoiled(tmp_path / "run")
    for name in ("best_validation_epoch", "accuracy_best_validation_epoch", "validation_accuracy"):
        assert metrics[name] == undisturbed[name], name
    for checkpoint in ("best", "last"):
        path = f"{run.CHECKPOINTS}/{checkpoint}.ckpt"
        assert_same_weights(tmp_path / "run" / path, weights(spoiled[0] / path))
    # A folder that is moved keeps its best epoch.
    (tmp_path / "run").rename(tmp_path / "moved")
    schedule = "task.scheduler.T_max=4"  # the run's own, which it keeps
    longer = fit(tmp_path / "moved", *JOB, "trainer.max_epochs=5", schedule)
    assert longer["epochs"] == 5
    for name in ("best_validation_epoch", "accuracy_best_validation_epoch"):
        assert longer[name] == undisturbed[name], name


def test_generator_is_measured_on_validation_images_by_fad_alone(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"FAD: at least 4 images are needed, but .* is 3"):
        fit(tmp_path / "few", *TINY, "dataset.validation=0.002")
    monkeypatch.setattr(evaluator, "Inception", Network)
    inception = ["metric.inception_weights=weights.pth", "metric.samples=10"]
    validated = ["dataset.validation=0.005", "objective=validation_fad"]
    metrics = fit(tmp_path, *TINY, *validated, *inception)
    assert metrics["validation_fad"] > 0 and metrics["validation_fad"] != metrics["fad"]
    assert metrics["fid"] > 0 and "validation_fid" not in metrics
    assert metrics["validation_reconstruction"] == logged(tmp_path, "val/reconstruction")[-1]
    for name in ("fad", "reconstruction"):
        assert "359 test images at 8x8" in metrics["protocol"][name]
        assert "7 validation images at 8x8" in metrics["protocol"][f"validation_{name}"]
    assert metrics["protocol"].keys() <= compare.METRICS.keys()
    assert not run.Run(tmp_path).best.exists()


def test_generator_whose_samples_are_not_measured_is_drawn(tmp_path):
    monitor = "+callbacks.lr._target_=lightning.pytorch.callbacks.LearningRateMonitor"
    options = [monitor, "pictures=true", "dataset.validation=0.1"]
    metrics = fit(tmp_path, *UNMEASURED, *options)
    (epoch,) = read_checkpoint(run.Run(tmp_path).checkpoint)["callbacks"]["History"]["epochs"]
    assert epoch and all(name.startswith(("train/", "val/")) for name in epoch)
    pictures = {path.name for path in tmp_path.glob("*.png")}
    assert {"reconstructions.png", "curves.png", "samples.png"} < pictures and "fad" not in metrics
    assert metrics["validation_reconstruction"] > 0
    cut = ", stopped by trainer.limit_{}_batches=1"
    assert metrics["protocol"]["reconstruction"].endswith(cut.format("test"))
    assert metrics["protocol"]["validation_reconstruction"].endswith(cut.format("val"))
    assert json.loads((tmp_path / run.METRICS).read_text()) == metrics
