"""A search by Optuna: each trial is a run, which goes on after a kill as any other."""

from __future__ import annotations

import argparse
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock, Timeout
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from omegaconf import OmegaConf
from optuna.trial import Trial, TrialState
from optuna.visualization import matplotlib as pictures

from .columns import METRICS
from .composing import CONF, compose
from .plot import save
from .run import LOCK, Run, chosen

TRAIN = (sys.executable, "-c", "from sj_taid.training.cli import main; main('train')")
#: So many failed trials in a row are no matter of the values that were tried.
FAILURES = 5


def main(arguments: Sequence[str]) -> None:
    """``sj-taid search --study FOLDER [--trials N] [override ...]``: the best figure of a run.

    Overrides that sweep say what is varied: ``key=a,b`` is one of these, ``key=interval(a, b)`` a
    number between them, and ``key=tag(log, interval(a, b))`` one on a logarithmic scale. The same
    command goes on with the study, and with the trials that a kill left half done; given several
    times at once it shares the trials out. Failed trials do not count, and five in a row end it.
    """
    parser = argparse.ArgumentParser(prog="sj-taid search", allow_abbrev=False)
    parser.add_argument("--study", type=Path, required=True, help="the folder of study and trials")
    parser.add_argument("--trials", type=int, default=20, help="how many there shall be in the end")
    parser.add_argument("--config-dir", "-cd", type=Path, help="configs of your own, as for train")
    parser.add_argument("overrides", nargs="*", help="as for train; those that sweep are searched")
    given = parser.parse_args(arguments)
    folder = given.study.absolute()
    command, configs = [*TRAIN], CONF
    if given.config_dir:
        configs = str(given.config_dir.absolute())
        command += ["--config-dir", configs]
    parsed = OverridesParser.create().parse_overrides(given.overrides)
    fixed = [str(override.input_line) for override in parsed if not override.is_sweep_override()]
    space = [override for override in parsed if override.is_sweep_override()]
    cfg = compose("train", fixed, configs, return_hydra_config=True)
    if not space:
        preset = [str(override) for override in OmegaConf.load(Path(CONF, "search.yaml"))]
        there = [o for o in preset if cfg.get(o.partition("=")[0].partition(".")[0])]
        space = OverridesParser.create().parse_overrides(there)
    objective = cfg.objective
    places = cfg.hydra.job.config.override_dirname.exclude_keys
    asked = [
        f"objective={objective}",
        *chosen([*fixed, *(str(o.input_line) for o in space)], places),
    ]
    if not objective.startswith("validation_"):
        print(f"{objective} is measured on the test set: so is what is chosen by it")
    elif not cfg.dataset.validation:
        sys.exit(
            f"objective={objective} needs a validation set: add dataset.validation=0.1, or name "
            "a figure of the test set"
        )

    folder.mkdir(parents=True, exist_ok=True)
    # Of a figure that has no table here, such as a loss, less is better.
    less = objective not in METRICS or METRICS[objective].less_is_better
    study = optuna.create_study(
        storage=f"sqlite:///{folder / 'study.db'}",
        study_name="search",
        direction="minimize" if less else "maximize",
        load_if_exists=True,
    )
    asking = FileLock(folder / LOCK)
    go = partial(attempt, study, folder, objective, command)
    with asking:
        before = study.user_attrs.get("asked", asked)
        study.set_user_attr("asked", before)
    if differing := sorted({*before} ^ {*asked}):
        sys.exit(
            f"{folder} is the study of another search: they differ in {', '.join(differing)}; "
            "repeat the command that it began with, or choose another --study"
        )
    take_up(study, asking, go)
    failed = 0  # in a row
    while failed < FAILURES:
        with asking:
            if sum(trial.state != TrialState.FAIL for trial in study.trials) >= given.trials:
                break
            # Other random numbers for each trial, and the same ones for the same trial.
            study.sampler = optuna.samplers.TPESampler(seed=len(study.trials))
            trial = study.ask()
            overrides = [*fixed, *(suggested(trial, override) for override in space)]
            trial.set_user_attr("overrides", overrides)
        go(trial.number)
        failed = failed + 1 if study.trials[trial.number].state == TrialState.FAIL else 0
    if failed == FAILURES:
        sys.exit(
            f"{failed} trials in a row failed: what stopped them stands above; once it is mended "
            "the same command goes on"
        )
    take_up(study, asking, go)  # what ran on by itself may have ended by now
    if running := len(study.get_trials(states=[TrialState.RUNNING])):
        print(f"trials that others still run: {running}; to count them, repeat the command later")
    if study.get_trials(states=[TrialState.COMPLETE]):
        draw(study, folder)


def suggested(trial: Trial, override: Override) -> str:
    key, value = override.get_key_element(), override.value()
    if isinstance(value, IntervalSweep):
        low, high, log = value.start or 0, value.end or 0, "log" in value.tags
        if isinstance(low, int) and isinstance(high, int):  # int(interval(a, b))
            return f"{key}={trial.suggest_int(key, low, high, log=log)}"
        return f"{key}={trial.suggest_float(key, low, high, log=log)}"
    return f"{key}={trial.suggest_categorical(key, list(override.sweep_string_iterator()))}"


def take_up(study: optuna.Study, asking: FileLock, go: Callable[[int], None]) -> None:
    """Go on with the trials whose search was killed."""
    with asking:  # each of them knows by now what to run, unless it was killed before
        left = study.get_trials(states=[TrialState.RUNNING])
    for trial in left:
        go(trial.number)


def attempt(
    study: optuna.Study, folder: Path, objective: str, command: Sequence[str], number: int
) -> None:
    """Run a trial by ``command``, or go on with it.

    One that another search attempts is left to it, and one that is still run by a process whose
    search was killed is left to that.
    """
    run = Run(folder / f"trial-{number}")
    with ExitStack() as held:
        try:
            held.enter_context(FileLock(f"{run.folder}{LOCK}").acquire(blocking=False))
            with run.lock():
                pass
        except (Timeout, RuntimeError):
            return
        trial = study.trials[number]
        if trial.state.is_finished():  # by another search, a moment ago
            return
        if overrides := trial.user_attrs.get("overrides"):
            subprocess.run([*command, *overrides, f"hydra.run.dir='{run.folder}'"], check=False)
        figures = run.metrics if run.is_finished else {}
        if objective in figures:
            study.tell(number, figures[objective])
            return
        if figures:
            there = ", ".join(name for name in figures if name in METRICS)
            print(f"{run.folder} has no {objective}; objective= must be one of {there}")
        study.tell(number, state=TrialState.FAIL)


def draw(study: optuna.Study, folder: Path) -> None:
    """Print the best trial, and draw how it was found and which of the values mattered."""
    print(f"best: {study.best_value:.4g} by {study.best_params}, trial-{study.best_trial.number}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        drawn: dict[str, Any] = {
            "history": pictures.plot_optimization_history,
            "importance": pictures.plot_param_importances,
        }
        for name, plot in drawn.items():
            save(plot(study).figure, folder / f"{name}.png")
