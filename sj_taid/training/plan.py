"""What a command line would do: its jobs, their folders, and the time that their likes took."""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from statistics import mean

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from .composing import CONF, compose
from .run import METRICS, Run, chosen, given_overrides, read_json


def main(arguments: Sequence[str]) -> None:
    """Print each job of ``sj-taid train``'s ``arguments``; nothing is written.

    A job's likes are the finished runs beside it and below ``runs`` and ``multirun``, with the same
    overrides but for the seed and where things lie.
    """
    parser = argparse.ArgumentParser(prog="sj-taid train --dry-run", allow_abbrev=False)
    parser.add_argument("--multirun", "-m", action="store_true")
    parser.add_argument("--config-path", "-cp", default=CONF)
    parser.add_argument("--config-dir", "-cd")  # the package's: own_configs_first swaps the two
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_intermixed_args(arguments)
    parsed = OverridesParser.create().parse_overrides(given.overrides)
    hydras = [str(o.input_line) for o in parsed if o.is_hydra_override()]
    tasks = [o for o in parsed if not o.is_hydra_override()]
    jobs = [[str(o.input_line) for o in tasks]]
    if given.multirun:  # by Hydra's own sweeper, so that the folders have the names that it gives
        fixed = [str(o.input_line) for o in tasks if not o.is_sweep_override()]
        cfg = compose("train", [*hydras, *fixed], given.config_path, return_hydra_config=True)
        swept = [f"{key}={values}" for key, values in (cfg.hydra.sweeper.params or {}).items()]
        tasks = [*OverridesParser.create().parse_overrides(swept), *tasks]
        (jobs,) = BasicSweeper.split_arguments(tasks, None)

    roots = {Path("runs"), Path("multirun")}
    seconds: dict[frozenset[str], list[float]] = {}
    states = []
    for job in jobs:
        cfg = compose("train", [*hydras, *job], given.config_path, return_hydra_config=True)
        places = [*cfg.hydra.job.config.override_dirname.exclude_keys]
        sweep = cfg.hydra.sweep
        run = Run(Path(sweep.dir, sweep.subdir) if given.multirun else Path(cfg.hydra.run.dir))
        seconds = seconds or training_seconds({run.folder.parent, *roots}, [*places, "seed"])
        config = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
        differing = run.differences(config, [*places, "dataset.classes"])  # which the data say
        if differing and not run.may_differ(config):
            states.append("another run")
        elif run.is_finished and not differing:
            states.append("finished")
        else:
            states.append("half done" if run.checkpoint.is_file() else "new")
        likes = seconds.get(frozenset(chosen(job, [*places, "seed"])))
        took = f"{mean(likes):.0f} s" if likes else "?"
        print(f"{states[-1]:11}  {took:>7}  {run.folder}")
    print(f"jobs: {', '.join(f'{n} {state}' for state, n in Counter(states).items())}")


def training_seconds(roots: set[Path], apart: Sequence[str]) -> dict[frozenset[str], list[float]]:
    """How long the finished runs below some folders trained, by their overrides."""
    seconds = defaultdict(list)
    for path in {path for root in roots for path in root.rglob(METRICS)}:
        with suppress(ValueError):  # a damaged one says nothing of its time
            metrics = read_json(path)
            overrides = frozenset(chosen(given_overrides(metrics), apart))
            if "training_seconds" in metrics:
                seconds[overrides].append(metrics["training_seconds"])
    return seconds
