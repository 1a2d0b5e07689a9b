"""A run and its folder: what is written there, and how a checkpoint becomes a model again."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf
from torch import nn

from .._internal.build import build, is_below
from .._internal.checks import expand_home
from ..model.prepare import prepare
from .config import CONFIG, Folders, flatten
from .files import atomic_write

ORIGIN = "origin.json"
METRICS = "metrics.json"
EVALUATIONS = "evaluations"
CHECKPOINTS = "checkpoints"
LOCK = ".lock"
LOG = "train.log"

#: remedy for a folder that this run cannot use
ELSEWHERE = "start a new run in another folder: hydra.run.dir=..., of a sweep hydra.sweep.dir=..."
#: remedy for a file of a run that something has damaged
RESTORE = "put back a copy of it, or move it away and give the run's command again"
#: what may change when a run resumes, with all keys below
RESUME_MAY_CHANGE = (
    "trainer.max_epochs",
    "trainer.max_steps",
    "trainer.max_time",
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.strategy",
    "callbacks",
    "logger",
    "pictures",
    "accelerate",
    "objective",
    "trust",
    "cache_dir",
    "feature_loss.cache_dir",
    "dataset.root",
    "dataset.test_root",
    "dataset.download",
    "metric.inception_weights",
    "metric.published_autoencoders",
    "metric.cache_dir",
    "metric.accelerator",
    "neuron.backend",
    "model.neuron.backend",
)


class Run:
    """A run's folder: its config, checkpoints, metrics and evaluations, and the lock on it all.

    ``checkpoint`` is one of its checkpoints, by default the last.
    """

    def __init__(self, folder: str | Path, checkpoint: Path | None = None) -> None:
        self.folder = Path(folder)
        self.checkpoint = checkpoint or self.folder / CHECKPOINTS / "last.ckpt"
        #: of the epoch that was best on the validation set, where there is one
        self.best = self.folder / CHECKPOINTS / "best.ckpt"

    @classmethod
    def find(cls, path: str | Path) -> Run:
        """The run at ``path``: its folder, or a checkpoint in it, which must be there."""
        path = expand_home(path).absolute()
        run = cls(path) if path.is_dir() else cls(path.parent.parent, path)
        if not run.checkpoint.is_file() or not (run.folder / CONFIG).is_file():
            raise FileNotFoundError(
                f"no checkpoint of a run at {path}; give the folder of a run that has trained for "
                f"an epoch, or last.ckpt or best.ckpt in its {CHECKPOINTS}"
            )
        return run

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes out of the folder, but for processes of the same distributed run.

        A folder that this command made goes at the end, if nothing but a log was written in it.

        Raises:
            ValueError: another process is in it.
        """
        if not is_first_process():
            yield
            return
        lock = FileLock(self.folder / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise ValueError(
                f"another command runs in {self.folder}; wait for it, or take another folder"
            ) from error
        was_empty = {path.name for path in self.folder.iterdir()} <= {LOCK}
        try:
            yield
        finally:
            if was_empty and {path.name for path in self.folder.iterdir()} <= {LOCK, LOG}:
                for name in (LOG, LOCK):
                    (self.folder / name).unlink(missing_ok=True)
                remove_made(self.folder.absolute())
            lock.release()

    @property
    def config(self) -> DictConfig:
        """The config that the run was started with, with its interpolations."""
        path = self.folder / CONFIG
        with path.open("rb") as file:
            tokens = yaml.scan(file)
            alias = next((one.value for one in tokens if isinstance(one, yaml.AliasToken)), None)
        if alias is not None:  # one within another would grow without end
            raise ValueError(f"{path} has an alias, *{alias}, which no run writes; write it out")
        config = OmegaConf.load(path)
        if not isinstance(config, DictConfig):
            raise ValueError(f"{path} must hold keys and values, not a list; put back a copy of it")
        return config

    def config_with(self, given: Mapping[str, Any]) -> DictConfig:
        """The run's config, with values over it by their keys, in groups that it has."""
        config = self.config
        for key, value in given.items():
            group = key.partition(".")[0]
            if group != key and config.get(group) is None:
                raise ValueError(f"{key} is given, but the run has no {group}; leave it out")
            OmegaConf.update(config, key, value, merge=False, force_add=True)
        return config

    @property
    def num_workers(self) -> int | None:
        """How many processes load the data of the run that is in the folder, if there is one."""
        return self.config.dataset.get("num_workers") if (self.folder / CONFIG).is_file() else None

    @property
    def model_config(self) -> dict[str, Any]:
        """The model's class and arguments, but for the backend of its neurons: each machine has
        its own."""
        config: Any = self.config
        if config.get("neuron"):
            config.neuron.pop("backend", None)
        return OmegaConf.to_container(config.model, resolve=True)  # type: ignore[return-value]

    @property
    def origin(self) -> dict[str, Any]:
        """The choices and the command that the run was started with."""
        return _read_json(self.folder / ORIGIN, "choices", "overrides")

    def begin(self, config: str, origin: dict[str, Any]) -> None:
        """Save the config, and where it is from. A finished run is unfinished again."""
        for measured in (self.folder / METRICS, *(self.folder / EVALUATIONS).glob("*.json")):
            measured.unlink(missing_ok=True)
        for unfinished in self.checkpoint.parent.glob(".*.tmp"):  # of a killed process
            unfinished.unlink()
        _write_json(origin, self.folder / ORIGIN)  # first, since the config makes it a run
        with atomic_write(self.folder / CONFIG) as path:
            path.write_text(config, encoding="utf-8")

    def resume(self, values: dict[str, Any]) -> Path | None:
        """The checkpoint that a training of these values resumes from; None if nothing is saved."""
        if not (self.checkpoint.is_file() or self.is_finished):
            return None
        saved, given = flatten(OmegaConf.to_container(self.config, resolve=True)), flatten(values)
        wrong = [
            f"{key} ({saved.get(key)}, now {given.get(key)})"
            for key in sorted(saved.keys() | given.keys())
            if saved.get(key) != given.get(key) and not is_below(key, RESUME_MAY_CHANGE)
        ]
        if wrong:
            raise ValueError(
                f"{self.folder} holds a run with other settings: {'; '.join(wrong)}; resume it "
                f"with its own, or {ELSEWHERE}"
            )
        if not self.checkpoint.is_file() and not self.is_complete(values):
            raise FileNotFoundError(
                f"the run in {self.folder} is finished and its checkpoint is gone, so it cannot "
                f"train longer; {ELSEWHERE}"
            )
        return self.checkpoint if self.checkpoint.is_file() else None

    def is_complete(self, values: dict[str, Any]) -> bool:
        """Whether the run is finished, and these values do not ask for a longer one."""
        if not self.is_finished:
            return False
        saved, given = self.config.trainer, values["trainer"]
        others = ("max_steps", "max_time")
        same = all(given.get(key) == saved.get(key) for key in others)
        return same and given["max_epochs"] <= saved.max_epochs

    @property
    def is_finished(self) -> bool:
        return (self.folder / METRICS).is_file()

    @property
    def metrics(self) -> dict[str, Any]:
        """The metrics of a finished run."""
        if not self.is_finished:
            raise FileNotFoundError(f"no {METRICS} in {self.folder}: finish the run first")
        return _read_json(self.folder / METRICS, "choices", "overrides")

    @property
    def latest_metrics(self) -> dict[str, Any]:
        """The metrics of a finished run, with the metrics of later evaluations over them."""
        metrics = self.metrics
        for evaluation in self.evaluations:
            protocol = metrics.get("protocol", {}) | evaluation["protocol"]
            metrics = metrics | evaluation["metrics"] | {"protocol": protocol}
        return metrics

    def save_metrics(self, metrics: dict[str, Any]) -> None:
        _write_json(metrics, self.folder / METRICS)

    @property
    def evaluation(self) -> Path:
        """Where the last evaluation of this checkpoint is; another one replaces it."""
        return self.folder / EVALUATIONS / f"{self.checkpoint.stem}.json"

    def save_evaluation(self, evaluation: dict[str, Any]) -> None:
        _write_json(evaluation, self.evaluation)

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """The evaluations of the last epoch and of the best, as far as there are any."""
        paths = self.evaluation, Run(self.folder, self.best).evaluation
        return [_read_json(path, "protocol", "metrics") for path in paths if path.is_file()]

    def model(self, trust: Collection[str] = ()) -> nn.Module:
        """The model of the checkpoint, in eval mode; see :func:`load_model`."""
        from .checkpoint import load_weights, read_checkpoint  # and Lightning with it

        # What the run says of itself is no reason to trust it.
        model = prepare(build(self.model_config, trust), self.config.accelerate)
        load_weights(model, read_checkpoint(self.checkpoint), self.checkpoint)
        return model.eval()


def load_model(run_or_checkpoint: str | Path, trust: Collection[str] = ()) -> nn.Module:
    """The model of a checkpoint, or of the last one in a run's folder, in eval mode.

    Args:
        run_or_checkpoint: a run's folder, or a checkpoint in it.
        trust: full names of custom classes that the run's config may name, as ``mypkg.MyLIF``.

    Raises:
        FileNotFoundError: no checkpoint there, or no config in its run's folder.
        ValueError: no whole checkpoint of this model, or a class that is not trusted.
    """
    return Run.find(run_or_checkpoint).model(trust)


def is_first_process() -> bool:
    """Whether this is the first process of a distributed run, or the only one."""
    from lightning.pytorch.utilities import rank_zero_only

    return rank_zero_only.rank == 0  # type: ignore[attr-defined]


def remove_made(folder: Path) -> None:
    """Remove an empty folder, and those around it, as far as this command has made them."""
    with suppress(OSError):  # one that holds others
        while Folders.made and folder.is_relative_to(Folders.made):
            folder.rmdir()
            folder = folder.parent


def _read_json(path: Path, *keys: str) -> dict[str, Any]:
    """What a run wrote, which has these keys."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read ({error}); {RESTORE}") from error
    if missing := [key for key in keys if not isinstance(content, dict) or key not in content]:
        raise ValueError(f"{path} must have {', '.join(missing)}, which a run writes; {RESTORE}")
    return content


def _write_json(content: dict[str, Any], path: Path) -> None:
    floats = {key: value for key, value in flatten(content).items() if isinstance(value, float)}
    if wrong := [key for key, value in floats.items() if not math.isfinite(value)]:
        raise FloatingPointError(
            f"{', '.join(wrong)}: not finite, so {path} is not written; the model has diverged: "
            "train it with a lower optimizer.lr"
        )
    with atomic_write(path) as temporary:
        text = json.dumps(content, indent=2, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")
