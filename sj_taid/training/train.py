"""``sj-taid train``: train a model from a config, measure it, and leave everything in a folder."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint, ProgressBar
from omegaconf import DictConfig, OmegaConf

from .._internal.context import seeded
from ..calibration import calibrate
from ..pretrained import start_from
from .callbacks import History, RandomNumbers, Stopwatch
from .checkpoint import AtomicCheckpointIO, BestCheckpoint, LastCheckpoint, read_checkpoint
from .compare import are_alike, format_metrics
from .config import argument, key_of, merge
from .evaluate import build_tester, measure, rename_for_best_epoch, test
from .parts import Parts, build_parts
from .process import (
    command_line,
    ending_wandb_run,
    given_overrides,
    provenance,
    reuse_freed_memory,
    silence_notes,
)
from .run import METRICS, Run, is_first_process
from .task import Task

log = logging.getLogger(__name__)


def main(cfg: DictConfig) -> float | None:
    """Train the job that Hydra composed, unless it is finished; returns the objective's value."""
    job = HydraConfig.get()
    run = Run(job.runtime.output_dir)
    choices = {k: v for k, v in job.runtime.choices.items() if not k.startswith("hydra/")}
    earlier: Sequence[str] = ()
    with run.lock(), explain_resuming(run):
        if cfg.resume:
            cfg = resumed_config(cfg, run)
            choices, earlier = run.origin["choices"], run.origin["overrides"]
        origin = command_line("train", job, cfg.dataset._target_, earlier)
        metrics = train(cfg, run.folder, choices=choices, **origin)
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
    run, parts = Run(folder), build_parts(cfg)
    checkpoint = run.resume(parts.values)
    if run.is_complete(parts.values):
        log.info("This run is finished already and is not run again.")
        return run.metrics
    origin = {"choices": {}, "overrides": [], "command": "", **origin, **provenance()}

    task, data = parts.task, parts.data
    data.prepare_data()
    data.setup()
    history = History(run.folder, parts.pictures)
    timer = Stopwatch(parts.trainer.keywords.get("max_time"))  # a checkpoint keeps its seconds
    begin = LambdaCallback(on_fit_start=lambda trainer, _: save_start(run, parts, origin, trainer))
    checkpoints = build_checkpoint_callbacks(run, task, data)
    callbacks = [begin, *checkpoints, timer, RandomNumbers(), history, *parts.callbacks]
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
    finalize_model(task, data, run, trainer)

    with seeded(parts.seed):  # a resumed run came here another way
        metrics = measure(task, trainer, data, parts.evaluator)
    if not is_first_process():
        return {}
    metrics |= select_validation_metrics(task, data, history.epochs)
    if saves_best_epoch(task, data) and run.best.is_file():
        with seeded(parts.seed):
            metrics |= measure_best_epoch(parts, run)
    log_metrics(trainer, metrics)
    metrics |= {
        "epochs": trainer.current_epoch,
        "parameters": sum(p.numel() for p in parts.model.parameters()),
        "training_seconds": round(timer.time_elapsed(), 1),
        "seed": parts.seed,
        **origin,
    }
    run.save_metrics(metrics)
    show_metrics(metrics)
    return metrics


def resumed_config(cfg: DictConfig, run: Run) -> DictConfig:
    """The config of the run that is resumed, with the single values of the command line over it."""
    job = HydraConfig.get()
    if job.mode == RunMode.MULTIRUN:
        raise ValueError(
            "resume= is for one run, without -m; a sweep resumes when its command is repeated"
        )
    keys = [key_of(override) for override in given_overrides(job)]
    # What a group sets elsewhere would be lost.
    if groups := sorted({*keys} & {*job.runtime.choices} - {"callbacks", "logger", "trainer"}):
        raise ValueError(
            f"resume= takes single values, not {groups[0]}=, which chooses many; leave it "
            "out, or start a new run"
        )
    given = {key: OmegaConf.select(cfg, key) for key in keys if key != "resume"}
    config = run.config
    merge(config, given | {"trust": cfg.trust})  # what the run says of itself is no reason
    return config


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


def saves_best_epoch(task: Task, data: Any) -> bool:
    """Whether the epoch that is best on the validation set is saved and tested too."""
    return task.chosen_by is not None and data.validation_set is not None


def build_checkpoint_callbacks(run: Run, task: Task, data: Any) -> list[ModelCheckpoint]:
    """One file for the last epoch and one for the best, each replaced as a whole."""
    options: dict[str, Any] = {
        "dirpath": run.checkpoint.parent,
        "enable_version_counter": False,
        "save_on_train_epoch_end": True,
    }
    last = LastCheckpoint(filename=run.checkpoint.stem, **options)
    if not saves_best_epoch(task, data):
        return [last]
    options |= {"filename": run.best.stem, "monitor": f"val/{task.chosen_by}", "mode": "max"}
    return [BestCheckpoint(**options), last]  # the last one keeps the state of the best


def save_start(run: Run, parts: Parts, origin: dict[str, Any], trainer: L.Trainer) -> None:
    """Save what the run is made of, once the checkpoint is loaded and nothing is refused."""
    if is_first_process():
        run.begin(parts.text, origin)
    for tracker in trainer.loggers:
        tracker.log_hyperparams(parts.values)


def finalize_model(task: Task, data: Any, run: Run, trainer: L.Trainer) -> None:
    """Load what the run saved, with averaged weights where there are, and fit the prior to it."""
    checkpoint = read_checkpoint(run.checkpoint) if run.checkpoint.is_file() else None
    if checkpoint:
        task.load_state_dict(checkpoint["state_dict"])
    task.to(trainer.strategy.root_device)
    task.fit_prior(data)
    flow = getattr(task.model, "flow", None)
    if checkpoint and flow and is_first_process():
        # With weight averaging Lightning also saves the unaveraged weights.
        for state in {"state_dict", "current_model_state"} & checkpoint.keys():
            flow.state_dict(destination=checkpoint[state], prefix="model.flow.")
        AtomicCheckpointIO().save_checkpoint(checkpoint, run.checkpoint)


def select_validation_metrics(
    task: Task, data: Any, epochs: Sequence[dict[str, float]]
) -> dict[str, float]:
    """The metrics of the last validated epoch; without a validation set, the best on the test."""
    if data.validation_set is not None:
        logged = [item for epoch in epochs for item in epoch.items()]  # of a name the last counts
        return {k.replace("val/", "validation_"): v for k, v in logged if k.startswith("val/")}
    values = [epoch[key] for epoch in epochs if (key := f"val/{task.chosen_by}") in epoch]
    return {f"{task.chosen_by}_best_test_epoch": max(values)} if values else {}


def measure_best_epoch(parts: Parts, run: Run) -> dict[str, Any]:
    checkpoint = read_checkpoint(run.best)
    parts.task.load_state_dict(checkpoint["state_dict"])
    tested = test(parts.task, build_tester(parts), parts.data)
    return rename_for_best_epoch(tested) | {"best_validation_epoch": checkpoint["epoch"] + 1}


def log_metrics(trainer: L.Trainer, metrics: dict[str, Any]) -> None:
    """Tell the run's trackers its metrics, and that it has succeeded."""
    numbers = {name: value for name, value in metrics.items() if isinstance(value, float)}
    for tracker in trainer.loggers:
        tracker.log_metrics(numbers, step=trainer.global_step)
        tracker.finalize("success")


def show_metrics(metrics: dict[str, Any]) -> None:
    for title, value in format_metrics(metrics).values():
        log.info("%s: %s", title, value)
    if are_alike(metrics):
        log.warning("The samples are all alike.")


@contextmanager
def explain_resuming(run: Run) -> Iterator[None]:
    """Add to an error, or to an interrupt, how the run resumes."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as error:  # Ctrl-C, and a cluster's time limit
        advice = "Give the same command again, since no epoch was complete."
        if run.checkpoint.is_file() and not run.is_finished:  # by an earlier command
            advice = resume_command(run)
        is_ctrl_c = KeyboardInterrupt in (type(error), type(error.__context__))  # by Lightning
        raise (KeyboardInterrupt if is_ctrl_c else SystemExit)(f"Stopped. {advice}") from error
    except (OSError, RuntimeError) as error:
        if run.checkpoint.is_file():
            error.add_note(f"Then: {resume_command(run)}")
        raise


def resume_command(run: Run) -> str:
    return f"Resume with: sj-taid train {argument('resume', run.folder)}"


def closing_lines(run: Run) -> str:
    """The picture to open, the metrics, and a command to try next."""
    here = Path.cwd()
    folder = run.folder.relative_to(here) if run.folder.is_relative_to(here) else run.folder
    pictures = [folder / f"{name}.png" for name in ("samples", "confusion", "reconstructions")]
    lines = [f"Picture: {path}" for path in pictures if path.is_file()][:1]
    lines.append(f"Metrics: {folder / METRICS}")
    if run.checkpoint.is_file():
        command = "sample" if run.config.get("metric") else "evaluate"
        lines.append(f"Next:    sj-taid {command} {argument('checkpoint', folder)}")
    return "\n".join(lines)
