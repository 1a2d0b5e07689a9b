"""The command line, ``sj-taid``: Hydra composes a config, and ``commands`` does the rest.

What is heavy is imported by the command that needs it, so that a typo is reported at once.
"""

from __future__ import annotations

import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

#: a link to the checkout's conf/; in a wheel a copy of it
CONF = str(Path(__file__).parents[1] / "conf")


@hydra.main(version_base="1.3", config_path=CONF, config_name="train")
def _train(cfg: DictConfig) -> float | None:
    from . import commands

    return commands.train_once(cfg)


@hydra.main(version_base="1.3", config_path=CONF, config_name="evaluate")
def _evaluate(cfg: DictConfig) -> None:
    from . import commands, run

    commands.evaluate(cfg, run.command("evaluate.py", HydraConfig.get()))


@hydra.main(version_base="1.3", config_path=CONF, config_name="sample")
def _sample(cfg: DictConfig) -> None:
    from . import commands

    commands.sample(cfg)


def train() -> None:
    """Train a model: ``train [group=option] [key=value]``; ``conf/train.yaml`` lists the groups."""
    from . import run

    sys.argv[1:] = run.resuming(sys.argv[1:])
    _train()


def evaluate() -> None:
    """Measure a trained model: ``evaluate checkpoint=RUN``."""
    _evaluate()


def sample() -> None:
    """Draw samples from a trained model: ``sample checkpoint=RUN``."""
    _sample()


COMMANDS = {"train": train, "evaluate": evaluate, "sample": sample}


def main() -> None:
    """``sj-taid COMMAND [argument ...]``."""
    command = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if command not in COMMANDS:
        sys.exit(f"usage: sj-taid {{{','.join(COMMANDS)}}} [argument ...]")
    COMMANDS[command]()
