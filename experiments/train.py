"""Train a model: ``python experiments/train.py [group=option] [key=value]``.

conf/train.yaml lists the groups.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import hydra
import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_class, instantiate
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig

# The checkout's root, so that this file runs as a script from anywhere.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments import run
from experiments.pictures import Pictures

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
    run.reuse_freed_memory()
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
        **run.provenance(),
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


@hydra.main(version_base="1.3", config_path="../conf", config_name="train")
def main(cfg: DictConfig) -> float | None:
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


if __name__ == "__main__":
    sys.argv[1:] = run.resuming(sys.argv[1:])
    main()
