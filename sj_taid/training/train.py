"""``sj-taid train``: train a model from a config, measure it, and leave everything in a folder."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.callbacks import LambdaCallback, LearningRateMonitor, ProgressBar
from omegaconf import DictConfig, OmegaConf

from .._internal.build import is_below
from ..calibration import calibrate
from ..pretrained import start_from
from .callbacks import History, RandomNumbers, Stopwatch
from .checkpoint import AtomicCheckpointIO, checkpoint_callbacks, read_checkpoint
from .config import options_of
from .evaluate import measure_run
from .messages import closing_lines, explain_resuming, show_metrics
from .parts import Parts, build_parts
from .process import (
    command_line,
    ending_wandb_run,
    given_overrides,
    provenance,
    reuse_freed_memory,
    silence_notes,
)
from .run import RESUME_MAY_CHANGE, Run, is_first_process
from .task import Task

log = logging.getLogger(__name__)


def main(cfg: DictConfig) -> float | None:
    """Train the job that Hydra composed, unless it is finished; returns the objective's value."""
    run = Run(HydraConfig.get().runtime.output_dir)
    with run.lock(), explain_resuming(run):
        origin = command_line("train", run.origin if cfg.resume else None)
        if cfg.resume:
            cfg = resumed_config(cfg, run)
        metrics = train(cfg, run.folder, **origin)
    if is_first_process():
        log.info("%s", closing_lines(run))
    return metrics.get(cfg.objective)


@ending_wandb_run()
def train(cfg: DictConfig, folder: str | Path, **origin: Any) -> dict[str, Any]:
    """Train, test, measure and draw what the task asks for; everything is left in ``folder``.

    An interrupted run in ``folder`` resumes from its last epoch. In a distributed run every process
    trains, and the first alone measures, writes and returns the metrics. ``origin`` is saved next
    to them: ``choices``, ``overrides`` and ``command`` of the command line.

    Raises:
        ValueError: the config is wrong, or does not fit the run that is in the folder.
        FloatingPointError: the model has diverged. The checkpoint of the epoch before stays.
    """
    silence_notes()
    reuse_freed_memory()
    run = Run(folder)
    parts = build_parts(cfg, run.num_workers)
    checkpoint = run.resume(parts.values)
    if run.is_complete(parts.values):
        log.info("This run is finished already and is not run again.")
        return run.metrics
    origin = {"choices": {}, "overrides": [], "command": "", **origin, **provenance()}

    task = parts.task
    if task.optimizer:  # tried before anything is written; Lightning makes its own
        task.optimizer(task.parameter_groups())
    elif type(task).configure_optimizers is Task.configure_optimizers:
        names = ", ".join(options_of("optimizer"))
        raise ValueError(f"no optimizer is chosen, which training needs; optimizer= takes {names}")
    data = parts.load_data()
    timer = Stopwatch(parts.trainer.keywords.get("max_time"))  # a checkpoint keeps its seconds
    history = History(run.folder, parts.pictures)
    callbacks = [
        LambdaCallback(on_fit_start=lambda trainer, _: save_start(run, parts, origin, trainer)),
        *checkpoint_callbacks(run.checkpoint, run.best, task.monitor(data)),
        *(timer, RandomNumbers(), history, *parts.callbacks),
        *([LearningRateMonitor("epoch")] if parts.logger else []),
    ]
    trainer = parts.trainer(
        default_root_dir=run.folder,
        logger=parts.logger(save_dir=run.folder) if parts.logger else False,
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO()],
        enable_progress_bar=any(isinstance(c, ProgressBar) for c in callbacks),
    )
    if parts.start_from:
        saved = checkpoint and run.origin["start_from_sha256"]
        origin["start_from_sha256"] = saved or start_from(parts.model, parts.start_from)
    if checkpoint is None:
        prepare_start(parts)
    if parts.compile:
        compile_model(parts.model, parts.compile)
    trainer.fit(task, data, ckpt_path=checkpoint, weights_only=True)

    finalize_model(parts, run, trainer)
    metrics = measure_run(parts, run, trainer, history.epochs)
    if trainer.is_global_zero:
        log_metrics(trainer, metrics)
        metrics |= {
            "epochs": trainer.current_epoch,
            "parameters": sum(p.numel() for p in parts.model.parameters()),
            "training_seconds": round(timer.time_elapsed(), 1),
            "seed": parts.seed,
            "class_names": [*data.class_names],
            **origin,
        }
        run.save_metrics(metrics)
        show_metrics(metrics)
    return metrics


def resumed_config(cfg: DictConfig, run: Run) -> DictConfig:
    """The config of the run that is resumed, with the single values of the command line over it."""
    keys = given_overrides().keys() - {"resume"}
    if wrong := sorted(key for key in keys if not is_below(key, RESUME_MAY_CHANGE)):
        raise ValueError(
            f"resume= continues a run as it is, without {wrong[0]}=; leave it out, or start a new "
            "run without resume="
        )
    # What the run says of itself is no reason to trust it.
    return run.config_with({key: OmegaConf.select(cfg, key) for key in keys | {"trust"}})


def prepare_start(parts: Parts) -> None:
    """What a new run does before its first epoch, and a run that resumes has done."""
    task, data = parts.task, parts.data
    if parts.calibrate is not None:
        images, _ = next(iter(data.train_dataloader()))
        log.info("%s", calibrate(parts.model, task.model_input(images), rate=parts.calibrate))
    task.before_training(data, parts.evaluator)


def compile_model(model: torch.nn.Module, options: Any) -> None:
    """Compile in place, so that the keys of the checkpoints stay as they are."""
    torch.compiler.reset()  # the graphs of a sweep's earlier jobs would count against a limit
    # Batches have one size but for the last of a test, so each size may have a graph of its own.
    try:
        model.compile(**{"dynamic": False, **({} if options is True else options)})
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"compile={options} is not for torch.compile: {error!s:.200}") from error


def save_start(run: Run, parts: Parts, origin: dict[str, Any], trainer: L.Trainer) -> None:
    """Save what the run is made of, once the checkpoint is loaded and nothing is refused."""
    if is_first_process():
        run.begin(parts.text, origin)
    for tracker in trainer.loggers:
        tracker.log_hyperparams(parts.values)


def finalize_model(parts: Parts, run: Run, trainer: L.Trainer) -> None:
    """Load what the run saved, with averaged weights where there are, and fit the prior to it."""
    task = parts.task
    checkpoint = read_checkpoint(run.checkpoint) if run.checkpoint.is_file() else None
    if checkpoint:
        task.load_state_dict(checkpoint["state_dict"])
    task.to(trainer.strategy.root_device)
    task.fit_prior(parts.data)
    flow = getattr(task.model, "flow", None)
    if checkpoint and flow and is_first_process():
        # With weight averaging Lightning also saves the unaveraged weights.
        for state in {"state_dict", "current_model_state"} & checkpoint.keys():
            flow.state_dict(destination=checkpoint[state], prefix="model.flow.")
        AtomicCheckpointIO().save_checkpoint(checkpoint, run.checkpoint)


def log_metrics(trainer: L.Trainer, metrics: dict[str, Any]) -> None:
    """Tell the run's trackers its metrics, and that it has succeeded."""
    numbers = {name: value for name, value in metrics.items() if isinstance(value, float)}
    for tracker in trainer.loggers:
        tracker.log_metrics(numbers, step=trainer.global_step)
        tracker.finalize("success")
