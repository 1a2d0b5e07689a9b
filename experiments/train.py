"""Train a model: ``python experiments/train.py [group=option] [key=value]``.

conf/train.yaml lists the groups.
"""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path
from typing import Any

import hydra
import lightning as L
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from omegaconf import DictConfig

# The checkout's root, so that this file runs as a script from anywhere.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments import run
from experiments.pictures import Pictures

log = logging.getLogger(__name__)
# Lightning's notes on devices and services; its warnings stay.
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)


def train(cfg: DictConfig, folder: Path, command: str = "") -> dict[str, Any]:
    """Train, test, measure and draw what the task asks for; all is left in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    run.reuse_freed_memory()
    if cfg.resume and not Path(cfg.resume).is_file():
        raise FileNotFoundError(
            f"no checkpoint to resume at {cfg.resume}; a run leaves it in "
            f"<run folder>/{run.CHECKPOINTS}/"
        )
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    run.save_config(cfg, folder)
    data = instantiate(cfg.dataset)
    data.prepare_data()
    data.setup()
    model = instantiate(cfg.model)
    task = instantiate(cfg.task, model=model, optimizer=instantiate(cfg.optimizer))
    before = task.before_training(data, cfg)

    # One file, replaced whole after every epoch.
    checkpoints = ModelCheckpoint(
        folder / run.CHECKPOINTS, filename="last", enable_version_counter=False
    )
    trainer = instantiate(
        cfg.trainer,
        default_root_dir=folder,
        logger=TensorBoardLogger(folder, name=None, version="tensorboard"),
        callbacks=[checkpoints, Pictures(folder), *map(instantiate, cfg.callbacks.values())],
    )
    start = time.perf_counter()
    trainer.fit(task, data, ckpt_path=cfg.resume, weights_only=True)
    seconds = time.perf_counter() - start
    (tested,) = trainer.test(task, data, verbose=False)

    metrics = {
        **{name.removeprefix("test/"): value for name, value in tested.items()},
        **task.after_training(data, cfg),
        **before,
        "epochs": trainer.current_epoch,
        "training_seconds": round(seconds, 1),
        "seed": cfg.seed,
        "command": command,
        **run.provenance(),
    }
    run.save_metrics(metrics, folder)
    for line in task.report(metrics):
        log.info(line)
    return metrics


@hydra.main(version_base="1.3", config_path="../conf", config_name="train")
def main(cfg: DictConfig) -> float:
    hydra_cfg = HydraConfig.get()
    folder = Path(hydra_cfg.runtime.output_dir)
    command = " ".join(["python experiments/train.py", *hydra_cfg.overrides.task])
    metrics = train(cfg, folder, command)
    log.info("Metrics, checkpoints and TensorBoard logs are there too. Pictures: %s", folder)
    return metrics[cfg.objective]


if __name__ == "__main__":
    main()
