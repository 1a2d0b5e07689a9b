"""The command line ``sj-taid``: Hydra composes a config, and the command's own module runs it.

Lightning and matplotlib are imported by the commands that need them: a typo is reported before.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from .._extras import TRAIN, needs
from .config import CONF, VERSION, describe_missing
from .run import OVERRIDES

#: commands whose arguments are Hydra's overrides of conf/<command>.yaml
COMPOSED = {
    "train": "train a model, or with -m every job of a sweep",
    "evaluate": "measure a run's checkpoint again",
    "sample": "draw images from a trained model",
}
#: commands with options of their own
OTHERS = {
    "compare": "compare runs in a table",
    "report": "show runs on one HTML page",
    "export": "make a model that others can load from a run",
    "doctor": "say which backends work here, and why the others do not",
}
#: errors that a user makes, whose message is enough
USER_ERRORS = (
    ValueError,
    TypeError,
    OSError,
    FloatingPointError,
    CompactHydraException,
    OmegaConfBaseException,
)
#: the command line as it was given
GIVEN: list[str] = []


def main() -> None:
    """``sj-taid COMMAND [argument ...]``.

    A user's error ends the process with its message; ``HYDRA_FULL_ERROR=1`` shows its traceback.
    """
    command, arguments = _parser().parse_args(sys.argv[1:2]).command, sys.argv[2:]
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # or Hydra would print the errors of its jobs itself
    try:
        run_command(command, arguments)
    except USER_ERRORS as error:
        if before == "1":
            raise
        sys.exit(format_error(error))
    finally:
        os.environ["HYDRA_FULL_ERROR"] = before or "0"


def run_command(command: str, arguments: Sequence[str]) -> None:
    if command in COMPOSED:
        GIVEN[:] = sys.argv
        sys.argv[1:] = resume_arguments(arguments) if command == "train" else arguments
        hydra.main(CONF, command, VERSION)(run_composed)()
        return
    logging.basicConfig(format="%(message)s")  # as Hydra does for its commands
    logging.getLogger("sj_taid").setLevel(logging.INFO)
    if code := import_command(command).main(arguments):
        sys.exit(code)


def run_composed(cfg: DictConfig) -> Any:
    """Run the command that Hydra composed ``cfg`` for; Hydra's launchers call this."""
    sys.argv[:] = GIVEN or sys.argv  # which Lightning repeats for the processes of further devices
    return import_command(str(HydraConfig.get().job.config_name)).main(cfg)


def import_command(command: str) -> ModuleType:
    """The module of a command."""
    if command == "doctor":
        return import_module("sj_taid.doctor")
    with needs(TRAIN):
        return import_module(f"{__package__}.{command}")


def format_error(error: Exception) -> str:
    """The message of a user's error, one to three lines."""
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} is missing; give {error.full_key}=..., see --help"
    _, is_missing, override = str(error).partition("To append to your config use ")
    if is_missing:
        cause: Any = error.__cause__
        return describe_missing(cause.full_key, cause.parent_node, override)
    if isinstance(error, CompactHydraException | OmegaConfBaseException):
        return " ".join(str(error).partition("Config search path")[0].split())
    hint = "(HYDRA_FULL_ERROR=1 shows the traceback)"
    text = str(error)
    if isinstance(error, OSError) and error.filename:  # the system's, which names no remedy
        text += "; give another path, or let this one be read and written"
    return "\n".join([text, *getattr(error, "__notes__", ()), hint])


def resume_arguments(arguments: Sequence[str]) -> list[str]:
    """Replace ``resume=RUN`` by the run's folder and overrides, over which other arguments win."""
    resumed = [argument for argument in arguments if argument.startswith("resume=")]
    if not resumed:
        return [*arguments]
    if {"-m", "--multirun"} & {*arguments}:
        raise ValueError(
            "resume= is for one run, without -m; a sweep resumes when its command is repeated"
        )
    name = resumed[-1].removeprefix("resume=")
    folder = Path(name).expanduser().absolute()
    if not name or not (folder / OVERRIDES).is_file():
        raise FileNotFoundError(
            f"resume= needs the folder of a run, which holds {OVERRIDES}, but got "
            f"{name or 'nothing'}; give resume=RUN, or repeat the run's command with "
            "hydra.run.dir=RUN"
        )
    others = [argument for argument in arguments if argument not in resumed]
    repeated: Any = OmegaConf.load(folder / OVERRIDES)
    quoted = str(folder).replace("'", "\\'")
    return [*repeated, f"hydra.run.dir='{quoted}'", *others]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("sj-taid", epilog="sj-taid COMMAND --help says what it takes")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, text in (COMPOSED | OTHERS).items():
        commands.add_parser(name, help=text, add_help=False)
    return parser
