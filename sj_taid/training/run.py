"""A run and its folder: what is written there, and how a checkpoint becomes a model again.

Lightning is imported where it is needed: the command line uses this before it.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shlex
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from .. import _build
from .files import atomic_write, remove_left, unwritable

if TYPE_CHECKING:
    from torch import nn

CONFIG = "config.yaml"
OVERRIDES = "overrides.yaml"
METRICS = "metrics.json"
EVALUATIONS = "evaluations"
CHECKPOINTS = "checkpoints"
LOCK = ".lock"

#: a remedy for a folder that is not for this run
ELSEWHERE = "choose another folder with hydra.run.dir=... (for a sweep hydra.sweep.dir=...)"

#: where the classes of runs from before the package had them are now
MOVED = {
    "experiments.data": "sj_taid.data",
    "experiments.task": "sj_taid.training",
    "experiments.progress": "sj_taid.training.callbacks",
}


class Run:
    """A run's folder: its config, checkpoint, metrics and evaluations, and the lock on it all.

    Args:
        folder: the run's folder.
        checkpoint: one of its checkpoints; by default the last.
    """

    def __init__(self, folder: str | Path, checkpoint: Path | None = None) -> None:
        self.folder = Path(folder)
        self.checkpoint = checkpoint or self.folder / CHECKPOINTS / "last.ckpt"
        #: of the epoch that was best on the validation set, where there is one
        self.best = self.folder / CHECKPOINTS / "best.ckpt"

    @classmethod
    def find(cls, place: str | Path) -> Run:
        """The run at ``place``: its folder, or a checkpoint in it.

        Raises:
            FileNotFoundError: there is no checkpoint.
        """
        path = Path(place).expanduser().absolute()
        if path.is_dir() and path.name == CHECKPOINTS:
            path = path.parent
        run = cls(path) if path.is_dir() else cls(path.parent.parent, path)
        if not run.checkpoint.is_file():
            raise FileNotFoundError(
                f"no checkpoint at {path}; a run leaves it in <run folder>/{CHECKPOINTS}/ "
                "after its first epoch"
            )
        return run

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes out of the folder, until the block or this process ends.

        The first process of a distributed run holds the lock for all.

        Raises:
            RuntimeError: another process holds it.
            OSError: the folder cannot be written.
        """
        if not is_first_process():
            yield
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.folder / LOCK).acquire(blocking=False)
        except Timeout as error:
            raise RuntimeError(
                f"another process is running in {self.folder}; wait until it ends, or {ELSEWHERE}"
            ) from error
        except OSError as error:
            raise unwritable(self.folder, error, ELSEWHERE) from error
        with lock:
            for place in ("", CHECKPOINTS, EVALUATIONS):
                remove_left(self.folder / place)
            yield

    @property
    def config(self) -> DictConfig:
        """What the run was started with; an old one in today's form.

        Raises:
            FileNotFoundError: there is none.
            ValueError: the file is damaged.
        """
        path = self.folder / CONFIG
        if not path.is_file():
            raise FileNotFoundError(
                f"no {CONFIG} at {path}; keep a checkpoint in its run's folder, "
                f"<run folder>/{CHECKPOINTS}/"
            )
        text = path.read_text(encoding="utf-8")
        for old, new in MOVED.items():
            text = text.replace(f"_target_: {old}.", f"_target_: {new}.")
        try:
            config = OmegaConf.create(text)
        except (YAMLError, OmegaConfBaseException) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{CONFIG} is damaged: {reason}") from error
        if not isinstance(config, DictConfig):
            raise ValueError(f"{CONFIG} is damaged: it holds no keys and values")
        config.pop("published", None)  # papers' figures stood in the configs once
        return config

    def save_config(self, cfg: DictConfig, overrides: Sequence[str] | None = None) -> None:
        """Keep what the run is started with.

        Args:
            cfg: its config.
            overrides: those of the command line that it was composed by, for ``resume=`` to repeat.
        """
        with atomic_write(self.folder / CONFIG) as path:
            path.write_text(OmegaConf.to_yaml(cfg, resolve=True), encoding="utf-8")
        if overrides is not None:
            with atomic_write(self.folder / OVERRIDES) as path:
                OmegaConf.save(OmegaConf.create([*overrides]), path)

    def begin(self, cfg: DictConfig, overrides: Sequence[str] | None = None) -> None:
        """Keep what the run is started with; one that was finished and is to go on no longer is."""
        (self.folder / METRICS).unlink(missing_ok=True)
        self.save_config(cfg, overrides)

    @property
    def is_finished(self) -> bool:
        return (self.folder / METRICS).is_file()

    @property
    def metrics(self) -> dict[str, Any]:
        """What a finished run left.

        Raises:
            FileNotFoundError: the run is not finished.
            ValueError: the file is damaged.
        """
        if not self.is_finished:
            raise FileNotFoundError(f"no {METRICS} in {self.folder}: finish the run first")
        return read_json(self.folder / METRICS)

    def save_metrics(self, metrics: dict[str, Any]) -> None:
        _write_json(metrics, self.folder / METRICS)

    def save_evaluation(self, evaluation: dict[str, Any]) -> Path:
        """Add a file to the run's evaluations, named by the time."""
        path = self.folder / EVALUATIONS / f"{datetime.now():%Y-%m-%dT%H-%M-%S-%f}.json"
        _write_json(evaluation, path)
        return path

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """The later evaluations of the checkpoints that are here, the oldest first.

        Those of a checkpoint that another took the place of are left out. Where no checkpoint was
        kept, all count.

        Raises:
            ValueError: a file is damaged, or not what an evaluation writes.
        """
        found = []
        for path in sorted((self.folder / EVALUATIONS).glob("*.json")):
            evaluation = read_json(path)
            if not {"figures", "protocol"} <= evaluation.keys():
                raise ValueError(
                    f"{EVALUATIONS}/{path.name} lacks figures and protocol, which sj-taid evaluate "
                    f"writes; move it out of {path.parent}"
                )
            found.append(evaluation)
        runs = [Run(self.folder), Run(self.folder, self.best)] if found else []
        here = {run.checkpoint_sha256() for run in runs if run.checkpoint.is_file()}
        return [one for one in found if not here or one.get("checkpoint_sha256") in here]

    def checkpoint_sha256(self) -> str:
        with self.checkpoint.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def differences(self, cfg: DictConfig, apart: Iterable[str] = ()) -> dict[str, str]:
        """The keys in which ``cfg`` is not the run's config, each with both values.

        Args:
            cfg: another config.
            apart: keys that may differ, with all below them.
        """
        if not (self.folder / CONFIG).is_file():
            return {}
        there = _flat(OmegaConf.to_container(self.config))
        here = _flat(OmegaConf.to_container(cfg, resolve=True))
        return {
            key: f"{there.get(key)}, now {here.get(key)}"
            for key in sorted(there.keys() | here.keys())
            if there.get(key) != here.get(key) and not is_below(key, apart)
        }

    def may_differ(self, cfg: DictConfig) -> bool:
        """Whether the run may go on with another config, ``cfg``.

        It may where ``resume=`` says so, and where it has kept nothing yet.
        """
        resume = cfg.get("resume")
        resumed = bool(resume) and self.folder in Path(resume).parents
        return resumed or not (self.checkpoint.is_file() or self.is_finished)

    def finished(self, cfg: DictConfig, apart: Iterable[str]) -> dict[str, Any] | None:
        """The metrics of a finished run; None where there is none yet or it is half done.

        Args:
            cfg: the run's config.
            apart: keys that may differ, with all below them.

        Raises:
            FileExistsError: the folder holds a run with another config, and it may not differ.
        """
        differing = self.differences(cfg, apart)
        if differing and not self.may_differ(cfg):
            raise FileExistsError(
                f"{self.folder} holds a run that differs in "
                f"{', '.join(f'{key} ({values})' for key, values in differing.items())}; go on "
                f"with its own config, or {ELSEWHERE}"
            )
        return None if differing or not self.is_finished else self.metrics

    def model(self, trust: Collection[str] = ()) -> nn.Module:
        """The model of the checkpoint, in eval mode.

        Raises:
            FileNotFoundError: no config beside the checkpoint.
            ValueError: not a checkpoint, damaged, of another model, or a config that names classes
                which are not trusted.
        """
        model = build(self.config.model, trust)
        self.load_weights(model)
        import torch

        # The layout it was trained in: another rounds otherwise.
        return model.to(memory_format=torch.channels_last).eval()

    def load_weights(self, model: nn.Module) -> None:
        """Put what the checkpoint has learned into a model.

        Raises:
            ValueError: not a checkpoint, damaged, or of another model.
        """
        from ..thresholds import set_fixed_thresholds

        checkpoint = read_checkpoint(self.checkpoint)
        state = checkpoint["state_dict"]
        try:
            model.load_state_dict(
                {k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")}
            )
            # calibrated ones are not the config's
            set_fixed_thresholds(model, checkpoint.get("fixed_thresholds", {}))
        except (RuntimeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{self.checkpoint} is not a checkpoint of this run's model ({error}); leave out "
                "the choices that change the model, or give a checkpoint of this run"
            ) from error


def load_model(run_or_checkpoint: str | Path, trust: Collection[str] = ()) -> nn.Module:
    """The model of a checkpoint, or of the last one in a run's folder, in eval mode.

    Args:
        run_or_checkpoint: a run's folder, or a checkpoint in it.
        trust: classes of your own, by their full names, that the run's config may name beside those
            of this package, SpikingJelly's neurons and surrogates, ``torch.optim`` and losses.

    Raises:
        FileNotFoundError: no checkpoint there, or no config beside it.
        ValueError: not a checkpoint, damaged, of another model, or a config that names classes
            which are not trusted.
    """
    return Run.find(run_or_checkpoint).model(trust)


def is_first_process() -> bool:
    """Whether this is the process of a distributed run that writes, or the only one."""
    from lightning.pytorch.utilities import rank_zero_only

    return rank_zero_only.rank == 0  # type: ignore[attr-defined]


def is_below(key: str, keys: Iterable[str]) -> bool:
    """Whether ``key`` is one of ``keys`` or stands below one."""
    return any(f"{key}.".startswith(f"{other}.") for other in keys)


def chosen(overrides: Iterable[str], apart: Collection[str]) -> list[str]:
    """The last override of each key, but none that is ``apart``: whole, or its key or one above."""
    last = {text.partition("=")[0].lstrip("+~"): text for text in overrides}
    return [
        text
        for key, text in last.items()
        if text.lstrip("+") not in apart and not is_below(key, apart)
    ]


def given_overrides(metrics: Mapping[str, Any]) -> list[str]:
    """The overrides that a run's metrics name; an older run's are in its command alone."""
    if "overrides" in metrics:
        return list(metrics["overrides"])
    return shlex.split(metrics.get("command", ""))[2:]


def _flat(node: Any, key: str = "") -> dict[str, Any]:
    """The leaves of nested dictionaries, by their dotted keys."""
    if not isinstance(node, dict):
        return {key: node}
    return {
        name: leaf
        for child, value in node.items()
        for name, leaf in _flat(value, f"{key}.{child}" if key else str(child)).items()
    }


def _write_json(content: dict[str, Any], path: Path) -> None:
    wrong = [k for k, v in _flat(content).items() if isinstance(v, float) and not math.isfinite(v)]
    if wrong:
        raise FloatingPointError(
            f"{', '.join(wrong)}: not a finite number, so {path} is not written; the model has "
            "diverged: train it with a lower optimizer.lr, or with trainer.gradient_clip_val=1.0"
        )
    with atomic_write(path) as whole:
        whole.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """What a run wrote; nothing of what is no dictionary.

    Raises:
        ValueError: the file is damaged, or holds what is no finite number.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"it holds {constant}, so its run diverged")

    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    except ValueError as error:
        raise ValueError(f"{path.name} is damaged: {error}") from error
    return content if isinstance(content, dict) else {}


def with_evaluations(
    metrics: dict[str, Any], evaluations: Iterable[dict[str, Any]]
) -> dict[str, Any]:
    """A run's metrics, with the figures of later evaluations over them."""
    for evaluation in evaluations:
        if isinstance(evaluation["figures"], dict):  # in older files names of what is there already
            protocol = metrics.get("protocol", {}) | evaluation["protocol"]
            metrics = metrics | evaluation["figures"] | {"protocol": protocol}
    return metrics


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What Lightning left in a checkpoint.

    Raises:
        ValueError: not a checkpoint, damaged, or one that would run code.
    """
    from pickle import UnpicklingError

    import torch

    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint["state_dict"]
    except UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        error.args = (code[0] if code else "no pickle of tensors",)  # torch advises to load it all
        if not code:
            raise _unusable(path, error) from error
        raise ValueError(
            f"{path} is not a checkpoint of tensors alone: it names {code[1]}, code that would run "
            "while it is read, so it was not read; give a checkpoint that sj-taid wrote"
        ) from error
    except Exception as error:  # each kind of damage has an error of its own
        raise _unusable(path, error) from error
    return checkpoint


def _unusable(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{path} is not a whole checkpoint "
        f"({type(error).__name__}: {error}); delete it, and go on from another one of "
        f"{path.parent} with resume=FILE, or give the same command again to train anew"
    )


def build(node: Any, trust: Collection[str] = (), **arguments: Any) -> Any:
    """The object that a part of a config describes, see :func:`sj_taid._build.build`."""
    return _build.build(OmegaConf.to_container(node, resolve=True), trust, **arguments)
