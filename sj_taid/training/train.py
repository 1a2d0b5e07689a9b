"""``sj-taid train``: train a model from a config, measure it, and leave everything in a folder."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint, ProgressBar
from omegaconf import DictConfig, OmegaConf

from .._context import seeded
from .._kinds import check_kinds
from ..calibration import calibrate
from ..pretrained import start_from
from .callbacks import History, RandomNumbers, Stopwatch
from .checkpoint import AtomicCheckpointIO, BestCheckpoint, LastCheckpoint, read_checkpoint
from .compare import are_alike, format_metrics
from .config import argument, key_of, validate
from .evaluate import build_tester, measure, rename_for_best_epoch, test
from .process import (
    command_line,
    ending_wandb_run,
    given_overrides,
    provenance,
    reuse_freed_memory,
    silence_notes,
)
from .run import (
    METRICS,
    OF_TRAINING,
    Run,
    build_data,
    build_model,
    build_part,
    is_first_process,
    merge,
)
from .task import Task

log = logging.getLogger(__name__)


def main(cfg: DictConfig) -> float | None:
    """Train the job that Hydra composed, unless it is finished; returns the objective's value."""
    job = HydraConfig.get()
    if cfg.resume and job.mode == RunMode.MULTIRUN:
        raise ValueError(
            "resume= is for one run, without -m; a sweep resumes when its command is repeated"
        )
    run = Run(job.runtime.output_dir)
    choices = {k: v for k, v in job.runtime.choices.items() if not k.startswith("hydra/")}
    earlier: Sequence[str] = ()
    with run.lock(), explain_resuming(run):
        if cfg.resume:
            keys = [key_of(override) for override in given_overrides(job)]
            # What a group sets elsewhere would be lost.
            if groups := sorted({*keys} & {*choices} - {"callbacks", "logger", "trainer"}):
                raise ValueError(
                    f"resume= takes single values, not {groups[0]}=, which chooses many; leave it "
                    "out, or start a new run"
                )
            given = {key: OmegaConf.select(cfg, key) for key in keys if key != "resume"}
            choices, earlier = run.origin["choices"], run.origin["overrides"]
            cfg = run.trusted_config(cfg.trust, keys)
            merge(cfg, given)
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
    validate(cfg)
    silence_notes()
    reuse_freed_memory()
    run = Run(folder)
    count_classes(cfg)
    checkpoint = run.resume(cfg)
    if run.is_complete(cfg):
        log.info("This run is finished already and is not run again.")
        return run.metrics
    origin = {"choices": {}, "overrides": [], "command": "", **origin, **provenance()}

    L.seed_everything(cfg.seed, workers=True, verbose=False)
    model = build_model(cfg)
    optimizer = instantiate_checked(cfg.optimizer, "optimizer")
    task: Task = build_part(cfg, "task", model=model, optimizer=optimizer)
    evaluator = build_part(cfg, "metric")
    callbacks, logger = build_chosen(cfg)
    data = build_data(cfg)
    history = History(run.folder, cfg.pictures)
    # A checkpoint keeps its seconds; where there is a Timer, Lightning ignores max_time itself.
    timer = Stopwatch(cfg.trainer.get("max_time"))
    begin = LambdaCallback(on_fit_start=lambda trainer, _: save_start(run, cfg, origin, trainer))
    checkpoints = build_checkpoint_callbacks(run, task, data)
    callbacks = [begin, *checkpoints, timer, RandomNumbers(), history, *callbacks]
    trainer = build_trainer(cfg.trainer, run, logger, callbacks)
    if cfg.start_from:
        saved = checkpoint and run.origin["start_from_sha256"]
        origin["start_from_sha256"] = saved or start_from(model, cfg.start_from)
    if checkpoint is None:
        calibrate_thresholds(task, data, cfg.neuron_start.get("calibrate"))
        task.before_training(data, evaluator)
    if cfg.compile:
        compile_model(model, cfg.compile)
    trainer.fit(task, data, ckpt_path=checkpoint, weights_only=True)
    finalize_model(task, data, run, trainer)

    with seeded(cfg.seed):  # a resumed run came here another way
        metrics = measure(task, trainer, data, evaluator)
    if not is_first_process():
        return {}
    metrics |= select_validation_metrics(task, data, history.epochs)
    if saves_best_epoch(task, data) and run.best.is_file():
        with seeded(cfg.seed):
            metrics |= measure_best_epoch(task, build_tester(cfg), data, run)
    log_metrics(trainer, metrics)
    metrics |= {
        "epochs": trainer.current_epoch,
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_seconds": round(timer.time_elapsed(), 1),
        "seed": cfg.seed,
        **origin,
    }
    run.save_metrics(metrics)
    show_metrics(metrics)
    return metrics


def count_classes(cfg: DictConfig) -> None:
    """Let the data say how many classes there are, where nothing else does.

    Raises:
        ValueError: a part has another number of classes than the data, or a classifier's data none.
    """
    parts = [part for part in ("model", "feature_loss") if "classes" in (cfg.get(part) or {})]
    if parts and cfg.dataset.classes is None:
        cfg.dataset.classes = build_part(cfg, "dataset").classes
    for part in parts:
        own, of_data = cfg[part].classes, cfg.dataset.classes
        if own is None and "loss" in cfg.task:
            raise ValueError(
                "a classifier needs classes, but the data have none; put the images of each class "
                "into a folder of its own"
            )
        if None not in (own, of_data) and own != of_data:
            raise ValueError(
                f"{part}.classes={own}, but dataset.classes is {of_data}; leave {part}.classes out"
            )


def calibrate_thresholds(task: Task, data: Any, rate: float | None) -> None:
    if rate is not None:
        images, _ = next(iter(data.train_dataloader()))
        log.info("%s", calibrate(task.model, task.model_input(images), rate=rate))


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


def build_chosen(cfg: DictConfig) -> tuple[list[L.Callback], Any]:
    """The config's callbacks and logger, before the data, so that their errors come at once."""
    parts = (cfg.get("callbacks") or {}).items()
    callbacks = [instantiate_checked(part, f"callbacks.{name}") for name, part in parts if part]
    return callbacks, instantiate_checked(cfg.logger, "logger") if cfg.get("logger") else None


def build_trainer(
    part: DictConfig, run: Run, logger: Any, callbacks: Sequence[L.Callback]
) -> L.Trainer:
    """Lightning's trainer, which leaves everything in the run's folder."""
    return instantiate_checked(
        part,
        "trainer",
        default_root_dir=run.folder,
        logger=logger(save_dir=run.folder) if logger else False,
        callbacks=[*callbacks],
        plugins=[AtomicCheckpointIO()],
        enable_progress_bar=any(isinstance(c, ProgressBar) for c in callbacks),
    )


def instantiate_checked(part: DictConfig, key: str, **arguments: Any) -> Any:
    """What Hydra makes of a part of the config, whose values are of the kinds that it declares."""
    with suppress(ImportError, AttributeError):  # which Hydra explains
        values: Any = OmegaConf.to_container(part, resolve=True)
        check_kinds(resolve_name(part._target_), values, f"{key}.")
    return instantiate(part, **arguments)


def save_start(run: Run, cfg: DictConfig, origin: dict[str, Any], trainer: L.Trainer) -> None:
    """Save what the run is made of, once the checkpoint is loaded and nothing is refused."""
    if is_first_process():
        run.begin(cfg, origin)
    config: Any = OmegaConf.to_container(cfg, resolve=True)
    for tracker in trainer.loggers:
        tracker.log_hyperparams(config)


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


def measure_best_epoch(task: Task, tester: L.Trainer, data: Any, run: Run) -> dict[str, Any]:
    checkpoint = read_checkpoint(run.best)
    task.load_state_dict(checkpoint["state_dict"])
    tested = test(task, tester, data)
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
            advice = run.advice
        is_ctrl_c = KeyboardInterrupt in (type(error), type(error.__context__))  # by Lightning
        raise (KeyboardInterrupt if is_ctrl_c else SystemExit)(f"Stopped. {advice}") from error
    except (OSError, RuntimeError) as error:
        if run.checkpoint.is_file():
            error.add_note(f"Then: {run.advice}")
        raise


def closing_lines(run: Run) -> str:
    """The picture to open, the metrics, and a command to try next."""
    here = Path.cwd()
    folder = run.folder.relative_to(here) if run.folder.is_relative_to(here) else run.folder
    pictures = [folder / f"{name}.png" for name in ("samples", "confusion", "reconstructions")]
    lines = [f"Picture: {path}" for path in pictures if path.is_file()][:1]
    lines.append(f"Metrics: {folder / METRICS}")
    if run.checkpoint.is_file():
        config = run.config
        command = "sample" if config.get("metric") else "evaluate"
        checkpoint = argument("checkpoint", folder)
        lines.append(f"Next:    sj-taid {command} {checkpoint}{run.trust_option(OF_TRAINING)}")
    return "\n".join(lines)
