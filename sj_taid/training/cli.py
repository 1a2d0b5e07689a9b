"""The command line, ``sj-taid``: Hydra composes a config, and ``commands`` does the rest.

Lightning and what measures and draws are imported by the command that needs them, so that a typo is
reported before.
"""

from __future__ import annotations

import difflib
import hashlib
import logging
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from omegaconf import DictConfig, OmegaConf

from .._extras import TRAIN, needs
from . import composing
from .run import OVERRIDES, Run, chosen


def part(name: str, more: str = "") -> Any:
    """The module ``name`` beside this one; without a package that it needs, what to install.

    Args:
        name: the module's.
        more: the distributions that it needs beyond those of the extra ``train``.
    """
    with needs(f"{TRAIN} {more}".rstrip()):
        return import_module(f"{__package__}.{name}")


@contextmanager
def said_in_lines() -> Iterator[None]:
    """What cannot be composed ends the process with its message, as Hydra ends its own commands."""
    try:
        yield
    except CompactHydraException as error:
        sys.exit("\n".join(str(said) for said in (error, error.__cause__) if said))


def train(cfg: DictConfig) -> float | None:
    """Train a model, or with -m all that a sweep asks for."""
    return part("commands").train_once(cfg)


def evaluate(cfg: DictConfig) -> None:
    """Measure a run's checkpoint again."""
    commands = part("commands")
    commands.evaluate(cfg, **commands.origin("evaluate", HydraConfig.get()))


def sample(cfg: DictConfig) -> None:
    """Draw images of a trained model."""
    part("commands").sample(cfg)


def fit_prior(cfg: DictConfig) -> None:
    """Fit a mixture of Gaussians to a finished run of ESVAE."""
    part("commands").fit_prior(cfg)


def compare(arguments: Sequence[str]) -> None:
    """Compare runs as a table and a picture."""
    part("compare").main(arguments)


def report(arguments: Sequence[str]) -> None:
    """Show runs on one page of HTML."""
    part("report", "plotly jinja2").main(arguments)


def export(arguments: Sequence[str]) -> None:
    """Make a model that others load of a run."""
    part("export").main(arguments)


def doctor(arguments: Sequence[str]) -> None:
    """Say which backends work here, and why the others do not."""
    from .. import doctor

    sys.exit(doctor.main(arguments))


COMPOSED = {task.__name__: task for task in (train, evaluate, sample, fit_prior)}
OTHERS = {task.__name__: task for task in (compare, report, export, doctor)}
#: an override that names a folder as it is
PLAIN = r"[\w.]+=[\w.]*\w"


def main(command: str | None = None) -> None:
    """``sj-taid COMMAND [argument ...]``; a script of one command names it."""
    arguments = sys.argv[1:]
    if command is None:
        command = arguments.pop(0) if arguments else ""
    if command in OTHERS:
        logging.basicConfig(format="%(message)s")  # as Hydra does for its commands
        logging.getLogger("sj_taid").setLevel(logging.INFO)
        OTHERS[command](arguments)
    elif command in COMPOSED:
        place = arguments[0] if arguments else ""
        if place and "=" not in place and Path(place).exists():
            key = "resume" if command == "train" else "checkpoint"
            sys.exit(f"{place} is a place: give {key}={place}")
        refuse_null_choices(arguments)
        # resume=null is what it is without: not a place.
        arguments = [quoted_place(a) for a in arguments if a != "resume=null"]
        try:
            arguments = resuming(arguments) if command == "train" else arguments
        except FileNotFoundError as error:
            sys.exit(str(error))
        sys.argv[1:] = arguments
        composing.main(command, COMPOSED[command])
    elif command in ("-h", "--help"):
        print(usage())
    else:
        near = difflib.get_close_matches(command, [*COMPOSED, *OTHERS], n=1)
        mean = f"; did you mean {near[0]}?" if near else ""
        print(usage(), file=sys.stderr)
        sys.exit(f"there is no command {command!r}{mean}" if command else "give a command")


def usage() -> str:
    """How the command is called, and what each of its commands does."""
    tasks = COMPOSED | OTHERS
    lines = [f"  {name:10} {task.__doc__}" for name, task in tasks.items()]
    return "\n".join(
        [
            f"usage: sj-taid {{{','.join(tasks)}}} [argument ...]",
            "",
            *lines,
            "",
            "sj-taid COMMAND --help says what a command takes.",
        ]
    )


def quoted_place(argument: str) -> str:
    """A place as the shell gives it, for Hydra's grammar, which takes no ``~``, ``=`` or ``,``."""
    key, _, value = argument.partition("=")
    if key not in ("checkpoint", "resume") and value[:1] != "~":
        return argument
    place = Path(value.strip("'\"")).expanduser()
    return "{}='{}'".format(key, str(place).replace("'", "\\'"))


def refuse_null_choices(arguments: Sequence[str]) -> None:
    """An error for ``metric=null``: Hydra chooses none of a group in another way."""
    for argument in arguments:
        key, _, value = argument.partition("=")
        if value.lower() == "null" and Path(composing.CONF, key).is_dir():
            sys.exit(f"{argument} names no choice of {key}: write ~{key} for none")


def resuming(arguments: list[str]) -> list[str]:
    """The command line that goes on with the run which ``resume=...`` names, in its own folder.

    It repeats what the run was started with. ``arguments`` come after that, so they win.

    One that was stopped within its first epoch begins anew.

    Raises:
        FileNotFoundError: no run there, or the note of the command line is gone.
    """
    named = [argument for argument in arguments if argument.startswith("resume=")]
    if not named:
        return arguments
    place = Path(named[-1].removeprefix("resume=").strip("'").replace("\\'", "'"))
    # A folder with the note, but without a checkpoint, is one that was stopped that early.
    run = Run(place.absolute()) if (place / OVERRIDES).is_file() else Run.find(place)
    notes = run.folder / OVERRIDES
    if not notes.is_file():
        notes = run.folder / ".hydra" / OVERRIDES  # Hydra's own, of older runs
    if not notes.is_file():
        raise FileNotFoundError(
            f"no {run.folder / OVERRIDES}, which notes how a run was started; repeat that command "
            f"with hydra.run.dir={run.folder} instead, and it goes on"
        )
    others = [argument for argument in arguments if argument not in named]
    here = [f'hydra.run.dir="{run.folder}"']
    here += [f'resume="{run.checkpoint}"'] if run.checkpoint.is_file() else []
    return [*OmegaConf.load(notes), *here, *others]


def folder_name(overrides: Sequence[str], apart: Sequence[str] = ()) -> str:
    """A sweep's job's folder, named by its overrides, ``neuron=lif seed=0`` as neuron-lif-seed-0.

    Letters, digits, ``.``, ``_`` and ``-`` alone, at most 120 of them. Where that leaves something
    out, a hash tells the jobs apart.

    Args:
        overrides: the job's.
        apart: keys that are left out, with all below them, and whole overrides.
    """
    text = ",".join(sorted(chosen(overrides, apart)))
    name = re.sub(r"[^A-Za-z0-9._]+", "-", text)
    if len(name) <= 120 and re.fullmatch(rf"{PLAIN}(,{PLAIN})*", text, re.ASCII):
        return name
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return f"{name[:103].strip('-.')}-{digest}".lstrip("-")


# Hydra names a job's folder in the process that runs the job. In a parallel sweep that process has
# imported nothing of this project but the module of the function that it is to call, which is this.
OmegaConf.register_new_resolver("folder_name", folder_name, replace=True)
