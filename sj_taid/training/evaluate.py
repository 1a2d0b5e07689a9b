"""``sj-taid evaluate``: measure a run's checkpoint; training measures by the same functions."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import lightning as L
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from torch import distributed

from .._context import seeded
from .columns import format_metrics
from .evaluator import Evaluator, bare_trainer
from .process import command_line, provenance, reuse_freed_memory, silence_notes
from .run import Run, build_data, build_part, flatten
from .task import Task
from .validate import validate

log = logging.getLogger(__name__)


def main(cfg: DictConfig) -> None:
    """Measure the checkpoint of the job that Hydra composed."""
    evaluate(cfg, **command_line("evaluate", HydraConfig.get()))


def evaluate(cfg: DictConfig, **origin: Any) -> dict[str, Any]:
    """Measure the checkpoint ``cfg.checkpoint`` again; the result is a file in its run's folder.

    Args:
        cfg: what to measure, and what to do otherwise than its run did.
        origin: saved next to the metrics, such as the command.
    """
    silence_notes()
    reuse_freed_memory()
    run, trust = Run.find(cfg.checkpoint), cfg.trust
    with run.lock():
        given, cfg = flatten(OmegaConf.to_container(cfg, resolve=True)), run.config
        for key, value in given.items():
            if value is not None:
                group = key.partition(".")[0]
                if group != key and not cfg.get(group):
                    raise ValueError(f"{key} is given, but the run has no {group}; leave it out")
                OmegaConf.update(cfg, key, value)
        cfg.trust = trust  # what the run says of itself is no reason to trust it
        validate(cfg)
        model = run.model(trust)
        data = build_data(cfg, trust)
        task = build_part(cfg, "task", trust, model=model, optimizer=None)
        with seeded(cfg.seed):
            metrics = measure(task, build_tester(cfg, bar=True), data, build_evaluator(cfg))
        protocol = metrics.pop("protocol", {})
        protocol = {name: protocol[name] for name in metrics if name in protocol}
        if run.checkpoint == run.best:
            protocol, metrics = rename_for_best_epoch(protocol), rename_for_best_epoch(metrics)
        evaluation = {
            "protocol": protocol,
            "metrics": metrics,
            "checkpoint_sha256": run.checkpoint_sha256(),
            "seed": cfg.seed,
            **origin,
            **provenance(),
        }
        path = run.save_evaluation(evaluation)
    for title, value in format_metrics(metrics).values():
        log.info("%s: %s", title, value)
    if cfg.get("metric") and cfg.metric.inception_weights is None:
        log.info(
            "No FID and no Inception score without weights: add metric.inception_weights=FILE, "
            "or =download with internet."
        )
    log.info("All metrics are in %s", path)
    return evaluation


def build_tester(cfg: DictConfig, bar: bool = False) -> L.Trainer:
    """A trainer for a test outside of a run, under the run's settings."""
    keys = ("accelerator", "precision", "limit_test_batches")
    return bare_trainer(bar=bar, **{key: cfg.trainer[key] for key in keys})


def build_evaluator(cfg: DictConfig) -> Evaluator | None:
    """The evaluator of the model's samples; None where the task draws none."""
    if not cfg.get("metric"):
        return None
    options = {"cache_dir": cfg.cache_dir, "seed": cfg.seed, "accelerator": cfg.trainer.accelerator}
    return build_part(cfg, "metric", cfg.trust, **options)


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
    protocol = metrics.get("protocol", {})
    validated = {f"{task.chosen_by}_best_test_epoch", *(f"validation_{name}" for name in tested)}
    for option, loader, names in (
        ("limit_test_batches", data.test_dataloader, {*tested, *rename_for_best_epoch(tested)}),
        ("limit_val_batches", data.val_dataloader, validated),
    ):
        limit = getattr(trainer, option)  # an int is a number of batches, a float a share
        if limit < (len(loader()) if isinstance(limit, int) else 1.0):
            for name in names & protocol.keys():
                protocol[name] += f", stopped by trainer.{option}={limit}"
    return metrics


def test(task: Task, trainer: L.Trainer, data: L.LightningDataModule) -> dict[str, Any]:
    """The metrics that the test logs, by name."""
    (logged,) = trainer.test(task, data, verbose=False)
    return {name.removeprefix("test/"): value for name, value in logged.items()}


def rename_for_best_epoch(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics under the names of the epoch that was best on the validation set."""
    return {f"{name}_best_validation_epoch": value for name, value in metrics.items()}
