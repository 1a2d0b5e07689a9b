"""``sj-taid evaluate``: measure a run's checkpoint; training measures by the same functions."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
from omegaconf import DictConfig, OmegaConf
from torch import distributed

from .._internal.context import seeded
from .callbacks import ProgressBar, watch_neurons
from .checkpoint import load_weights, read_checkpoint
from .compare import COSTS
from .config import flatten, refuse_unknown
from .evaluator import Evaluator
from .messages import show_metrics
from .parts import Parts, build_parts
from .process import command_line, provenance, reuse_freed_memory, silence_notes
from .run import Run
from .task import Task

log = logging.getLogger(__name__)


def main(cfg: DictConfig) -> None:
    """Measure the checkpoint of the job that Hydra composed."""
    evaluate(cfg, **command_line("evaluate"))


def evaluate(cfg: DictConfig, **origin: Any) -> dict[str, Any]:
    """Measure ``cfg.checkpoint`` as ``cfg`` says; the result is a file in its run's folder.

    ``origin``, such as the command, is saved next to the metrics.
    """
    silence_notes()
    reuse_freed_memory()
    refuse_unknown("evaluate", cfg.keys())
    run = Run.find(cfg.checkpoint)
    with run.lock():
        parts = build_parts(evaluated_config(cfg, run))
        load_weights(parts.model, read_checkpoint(run.checkpoint), run.checkpoint)
        data, tester = parts.load_data(), build_tester(parts, bar=True)
        with seeded(parts.seed):
            metrics = measure(parts.task, tester, data, parts.evaluator)
        protocol = metrics.pop("protocol", {})
        protocol = {name: protocol[name] for name in metrics if name in protocol}
        if run.checkpoint == run.best:
            metrics = {name: value for name, value in metrics.items() if name not in COSTS}
            protocol, metrics = rename_for_best_epoch(protocol), rename_for_best_epoch(metrics)
        evaluation = {
            "protocol": protocol,
            "metrics": metrics,
            "seed": parts.seed,
            **origin,
            **provenance(),
        }
        run.save_evaluation(evaluation)
    show_metrics(metrics)
    log.info("All metrics are in %s", run.evaluation)
    return evaluation


def evaluated_config(cfg: DictConfig, run: Run) -> DictConfig:
    """The run's config with what is given over it, and without what training alone needs."""
    given = flatten(OmegaConf.to_container(cfg, resolve=True))
    given.pop("checkpoint")
    given = {k: value for k, value in given.items() if value is not None or k == "trust"}
    # The data set's name may be that of the folder it was in.
    config = run.config_with({"dataset.name": run.config.dataset.name, **given})
    OmegaConf.resolve(config)
    config.model = run.model_config
    for group in ("optimizer", "callbacks", "logger"):
        config.pop(group, None)
    return config


def build_tester(parts: Parts, bar: bool = False) -> L.Trainer:
    """A trainer for a test outside of a run, under the run's settings."""
    options = parts.trainer.keywords
    return L.Trainer(
        **{key: options[key] for key in ("accelerator", "precision", "limit_test_batches")},
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=bar,
        callbacks=[ProgressBar()] if bar else None,
    )


def measure(
    task: Task, trainer: L.Trainer, data: L.LightningDataModule, evaluator: Evaluator | None
) -> dict[str, Any]:
    """Every metric of the trained model.

    In a distributed run every process tests, and the first alone measures the rest.
    """
    tested = test(task, trainer, data)
    if distributed.is_initialized():
        # A metric sums over all processes, and would wait for the others for ever.
        distributed.destroy_process_group()
    if not trainer.is_global_zero:
        return tested
    metrics = tested | task.evaluate(data, evaluator)
    x, _ = next(iter(data.test_dataloader()))
    x = trainer.precision_plugin.convert_input(x[:8].to(next(task.model.parameters()).device))
    if watch := watch_neurons(trainer, task, x):
        metrics["firing_rate"] = watch.firing_rate()
    return metrics


def measure_run(
    parts: Parts, run: Run, trainer: L.Trainer, epochs: Sequence[dict[str, float]]
) -> dict[str, Any]:
    """Every metric of a run, whose ``epochs`` were logged: of the last epoch, and of the best.

    Of a distributed run the first process alone has them.
    """
    task, data = parts.task, parts.data
    with seeded(parts.seed):  # a resumed run came here another way
        metrics = measure(task, trainer, data, parts.evaluator)
    if not trainer.is_global_zero:
        return {}
    metrics |= select_validation_metrics(task, data, epochs)
    if task.monitor(data) and run.best.is_file():
        checkpoint = read_checkpoint(run.best)
        task.load_state_dict(checkpoint["state_dict"])
        with seeded(parts.seed):
            tested = test(task, build_tester(parts), data)
        metrics |= rename_for_best_epoch(tested)
        metrics["best_validation_epoch"] = checkpoint["epoch"] + 1
    return metrics


def select_validation_metrics(
    task: Task, data: Any, epochs: Sequence[dict[str, float]]
) -> dict[str, float]:
    """The metrics of the last validated epoch; without a validation set, the best on the test."""
    if data.validation_set is not None:
        logged = [item for epoch in epochs for item in epoch.items()]  # of a name the last counts
        return {k.replace("val/", "validation_"): v for k, v in logged if k.startswith("val/")}
    values = [epoch[key] for epoch in epochs if (key := f"val/{task.chosen_by}") in epoch]
    return {f"{task.chosen_by}_best_test_epoch": max(values)} if values else {}


def test(task: Task, trainer: L.Trainer, data: L.LightningDataModule) -> dict[str, Any]:
    """The metrics that the test logs, by name."""
    (logged,) = trainer.test(task, data, verbose=False)
    return {name.removeprefix("test/"): value for name, value in logged.items()}


def rename_for_best_epoch(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics under the names of the epoch that was best on the validation set."""
    return {f"{name}_best_validation_epoch": value for name, value in metrics.items()}
