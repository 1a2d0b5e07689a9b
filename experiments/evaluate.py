"""Measure a trained model: ``python experiments/evaluate.py checkpoint=RUN``.

The figures and their protocols take their places in the run's ``metrics.json``.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Container
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

# The checkout's root, so that this file runs as a script from anywhere.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments import run
from experiments.measure import seeded

log = logging.getLogger(__name__)


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
        trainer = run.bare_trainer(cfg.trainer.accelerator)
        with seeded(cfg.seed):
            figures = task.figures(trainer, data, cfg)
        protocol = metrics.get("protocol", {}) | figures.pop("protocol", {})
        evaluation = {
            "figures": list(figures),
            "seed": cfg.seed,
            "command": command,
            **run.provenance(),
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


@hydra.main(version_base="1.3", config_path="../conf", config_name="evaluate")
def main(cfg: DictConfig) -> None:
    evaluate(cfg, run.command("evaluate.py", HydraConfig.get()))


if __name__ == "__main__":
    main()
