"""Precision and speed by config: the same metrics when compiled and from several processes."""

import json

import pytest
import torch
from lightning.pytorch.utilities import rank_zero_only
from torch._dynamo.utils import counters

from sj_taid.training import run
from sj_taid.training.generation import Generation
from tests.training.conftest import TINY, TINY_CLASSIFICATION, exit_code, fit

TASKS = {"generation": TINY, "classification": TINY_CLASSIFICATION}


@pytest.mark.slow
def test_compiled_model_trains_and_saves_alike(trained, tmp_path):
    small = [*TINY_CLASSIFICATION, "model.stages=[[4]]"]
    eager = run.Run(trained(*small)).metrics
    # A run needs three graphs, to train, validate and test; so does each further one of a sweep.
    with torch._dynamo.config.patch(recompile_limit=3, fail_on_recompile_limit_hit=True):
        for name in ("compiled", "again"):
            counters.clear()
            compiled = fit(tmp_path / name, *small, "compile={backend:eager}")
            assert counters["stats"]["unique_graphs"] == 3
            assert (compiled["loss"], compiled["accuracy"]) == (eager["loss"], eager["accuracy"])
    run.load_model(tmp_path / "compiled")  # whose keys are those of a model that is not compiled


@pytest.mark.filterwarnings("ignore:backend 'numba' cannot take this call")  # float16
@pytest.mark.parametrize("precision", ["64-true", "16-true", "bf16-true"])
def test_true_precision_is_that_of_every_measurement(sj_taid, tmp_path, precision):
    options = ["optimizer=sgd", "dataset.validation=0.2"]  # in float16 Adam's eps is 0
    metrics = fit(tmp_path, *TINY_CLASSIFICATION, *options, f"trainer.precision={precision}")
    assert metrics["loss"] > 0 and "firing_rate" in metrics
    sj_taid("evaluate", f"checkpoint={tmp_path}")
    (evaluation,) = run.Run(tmp_path).evaluations
    # Of its weights in float32.
    assert evaluation["metrics"]["loss"] == pytest.approx(metrics["loss"], rel=1e-2)


@pytest.mark.slow
def test_two_processes_measure_once(tmp_path):
    arguments = [
        *("train", *TINY, "trainer.devices=2", "callbacks=quiet", "~logger"),
        f"hydra.run.dir={tmp_path / 'run'}",
    ]
    ended = exit_code(tmp_path, *arguments)
    said, notes = ((tmp_path / name).read_text() for name in ("stdout", "stderr"))
    assert ended == 0, notes
    metrics = json.loads((tmp_path / "run" / run.METRICS).read_text())
    assert metrics["fad"] > 0
    assert said.count("FAD, own autoencoder ↓: ") == 1
    assert "MEMBER: 2/2" in notes


def test_process_waits_for_measurements_before_the_others(tmp_path, monkeypatch):
    """Training FAD's autoencoder may take longer than a process group's time limit."""

    def measured(*_):
        raise SystemExit("measured")

    monkeypatch.setattr(rank_zero_only, "rank", 1)
    monkeypatch.setattr(Generation, "before_training", measured)
    with pytest.raises(SystemExit, match="measured"):
        fit(tmp_path, *TINY)
    assert not list(tmp_path.iterdir())  # the first process writes


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("task", TASKS)
def test_gpu_trainer_trains(tmp_path, task, mode):
    sizes = [o for o in TASKS[task] if o != "trainer.accelerator=cpu"]
    gpu = ["trainer=gpu", f"compile.mode={mode}", "trainer.max_epochs=2"]
    metrics = fit(tmp_path, *sizes, *gpu)
    assert metrics[run.Run(tmp_path).config.objective] >= 0 and metrics["epochs"] == 2
