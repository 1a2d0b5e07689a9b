"""What the commands do with a composed config: train, evaluate, sample. ``cli`` composes it."""

from __future__ import annotations

import logging
from collections.abc import Container
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_class, instantiate
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from . import run
from .allocator import reuse_freed_memory
from .callbacks import Pictures
from .evaluation import bare_trainer, seeded
from .plot import draw_grid
from .provenance import provenance

log = logging.getLogger(__name__)


def train(cfg: DictConfig, folder: Path, **origin: Any) -> dict[str, Any]:
    """Train, test, measure and draw what the task asks for; all is left in ``folder``.

    A half-done run in ``folder`` goes on from its last epoch. In a distributed run every process
    trains, and the first alone measures, writes and returns the metrics.

    Args:
        cfg: the run's config.
        folder: the run's folder.
        origin: what ``metrics.json`` says of the run beside its figures, as the command.
    """
    options = _compile_options(cfg.compile)
    folder.mkdir(parents=True, exist_ok=True)
    reuse_freed_memory()
    resume = run.last_checkpoint(folder) or (cfg.resume and run.find_checkpoint(cfg.resume))
    if resume:
        run.read_checkpoint(resume)  # a damaged one is an error before hours of work, with a remedy
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    run.save_config(cfg, folder)
    data = instantiate(cfg.dataset)
    if not isinstance(data, get_class(cfg.task._target_).takes):
        raise ValueError(
            f"dataset={data.name} holds recordings, which only a classifier takes; "
            "add task=classification, or choose a data set of images"
        )
    # In this layout convolutions are faster, in bfloat16 above all.
    model = instantiate(cfg.model).to(memory_format=torch.channels_last)
    task = instantiate(cfg.task, model=model, optimizer=instantiate(cfg.optimizer))
    first = rank_zero_only.rank == 0
    if first:  # the others wait for it at the start of the training
        data.prepare_data()
        data.setup()
        before = task.before_training(data, cfg)
    if options is not None:
        torch.compiler.reset()  # the graphs of a sweep's earlier jobs would count against a limit
        model.compile(**options)  # in place, so that the keys of its checkpoints stay as they are

    # One file, replaced whole after every epoch.
    checkpoints = ModelCheckpoint(
        folder / run.CHECKPOINTS, filename="last", enable_version_counter=False
    )
    timer = Timer()  # kept in the checkpoint: the seconds before a kill count
    trainer = instantiate(
        cfg.trainer,
        default_root_dir=folder,
        logger=TensorBoardLogger(folder, name=None, version="tensorboard"),
        callbacks=[checkpoints, timer, Pictures(folder), *map(instantiate, cfg.callbacks.values())],
    )
    trainer.fit(task, data, ckpt_path=resume, weights_only=True)

    figures = task.figures(trainer, data, cfg)
    if not first:
        return {}

    metrics = {
        **figures,
        **before,
        "epochs": trainer.current_epoch,
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_seconds": round(timer.time_elapsed(), 1),
        "seed": cfg.seed,
        **origin,
        **provenance(),
    }
    run.save_metrics(metrics, folder)
    for line in task.report(metrics):
        log.info(line)
    return metrics


def _compile_options(given: bool | DictConfig) -> dict[str, Any] | None:
    """Those of torch.compile; None where nothing is to be compiled."""
    if not isinstance(given, bool | DictConfig):
        raise ValueError(
            "compile must be true, false or options of torch.compile, such as "
            f"'compile={{mode: max-autotune}}', but it is {given!r}"
        )
    if not given:
        return None
    # Batches have one size but for the last of a test, so each size may have a graph of its own.
    return {"dynamic": False, **({} if given is True else given)}


def train_once(cfg: DictConfig) -> float | None:
    """Train the job that Hydra composed, unless its folder holds the finished run already."""
    hydra_cfg = HydraConfig.get()
    folder = Path(hydra_cfg.runtime.output_dir)
    choices = {k: v for k, v in hydra_cfg.runtime.choices.items() if not k.startswith("hydra/")}
    with run.held(folder):
        # What is resumed in its own folder may go on with other choices.
        resumed = bool(cfg.resume) and folder in Path(cfg.resume).parents
        metrics = run.finished(cfg, folder, run.places(hydra_cfg), may_differ=resumed)
        if metrics is None:
            command = run.command("train.py", hydra_cfg)
            metrics = train(cfg, folder, command=command, choices=choices)
        else:
            log.info("This run is finished already and is not run again.")
    log.info("Metrics, checkpoints and TensorBoard logs are there too. Pictures: %s", folder)
    return metrics.get(cfg.objective)


def evaluate(cfg: DictConfig, command: str = "") -> dict[str, Any]:
    """Measure ``cfg.checkpoint`` and update its run's metrics, which are given back."""
    model, of_run = run.load_model(cfg.checkpoint)
    folder = run.find_checkpoint(cfg.checkpoint).parents[1]
    cfg = OmegaConf.merge(of_run, _given(OmegaConf.to_container(cfg, resolve=True)))
    with run.held(folder):
        metrics = run.load_metrics(folder)
        data = run.build(cfg.dataset)
        data.prepare_data()
        data.setup()
        task = run.build(cfg.task, model=model, optimizer=None)
        trainer = bare_trainer(cfg.trainer.accelerator)
        with seeded(cfg.seed):
            figures = task.figures(trainer, data, cfg)
        protocol = metrics.get("protocol", {}) | figures.pop("protocol", {})
        evaluation = {
            "figures": list(figures),
            "seed": cfg.seed,
            "command": command,
            **provenance(),
        }
        evaluations = [*_left(metrics.get("evaluations", []), figures), evaluation]
        metrics |= {**figures, "protocol": protocol, "evaluations": evaluations}
        run.save_metrics(metrics, folder)
    for line in task.report(metrics):
        log.info(line)
    if "metric" in cfg and not cfg.metric.inception_weights:
        log.info(
            "FID and the Inception score are left out for want of weights: add "
            "metric.inception_weights=FILE, or =download where there is internet."
        )
    log.info("All figures are in %s", folder / run.METRICS)
    return metrics


def _left(evaluations: list[dict[str, Any]], anew: Container[str]) -> list[dict[str, Any]]:
    """The evaluations that some figure still stems from, when others are measured anew."""
    left = [
        e | {"figures": [name for name in e["figures"] if name not in anew]} for e in evaluations
    ]
    return [evaluation for evaluation in left if evaluation["figures"]]


def _given(config: dict[str, Any]) -> dict[str, Any]:
    """The settings that are not null."""
    given = {}
    for key, value in config.items():
        value = _given(value) if isinstance(value, dict) else value
        if value not in (None, {}):
            given[key] = value
    return given


def sample(cfg: DictConfig) -> None:
    """Draw ``cfg.n`` samples of the model in ``cfg.checkpoint`` into a picture."""
    for name in ("n", "columns"):
        if cfg[name] < 1:
            raise ValueError(f"{name} must be at least 1, but it is {cfg[name]}")
    model, _ = run.load_model(cfg.checkpoint)
    if not hasattr(model, "sample"):
        raise ValueError(
            f"{cfg.checkpoint} holds a {type(model).__name__}, which draws nothing; "
            "give a checkpoint of task=generation"
        )
    torch.manual_seed(cfg.seed)
    images = model.sample(cfg.n)
    folder = run.find_checkpoint(cfg.checkpoint).parents[1]
    path = Path(cfg.output or folder / f"samples-seed{cfg.seed}.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_grid(images, path, cfg.columns, "Samples from the prior")
    log.info("%d samples are in %s", cfg.n, path)
