"""The command line ``sj-taid``: Hydra composes a config, and the command's own module runs it.

Lightning and matplotlib are imported by the commands that need them: a typo is reported before.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Sequence
from functools import cache, partial
from importlib import import_module
from threading import Thread
from types import ModuleType
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .._checks import expand_home
from .._extras import REMEDY, TRAIN, needs
from .config import CONF, VERSION, key_of, quote, select_overrides
from .run import OVERRIDES

#: commands whose arguments are Hydra's overrides of conf/<command>.yaml
COMPOSED = {
    "train": "train a model, or with -m every job of a sweep",
    "evaluate": "measure a run's checkpoint again",
    "sample": "draw images from a trained model",
    "walk": "draw images on the way from one test image to another",
}
#: commands with options of their own
OTHERS = {
    "compare": "compare runs in a table",
    "report": "show runs on one HTML page",
    "export": "make a model that others can load from a run",
    "doctor": "say which backends work here, and why the others do not",
}
#: see is_users
USER_ERRORS = (
    ValueError,
    TypeError,
    OSError,
    FloatingPointError,
    HydraException,
    OmegaConfBaseException,
)
MULTIRUN = {"-m", "--multirun"}
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
    except Exception as error:
        if before == "1" or not is_users(error):
            raise
        sys.exit(format_error(error))
    finally:
        os.environ["HYDRA_FULL_ERROR"] = before or "0"


def run_command(command: str, arguments: Sequence[str]) -> None:
    if command in COMPOSED:
        GIVEN[:] = sys.argv
        sys.argv[1:] = resume_arguments(arguments) if command == "train" else arguments
        if MULTIRUN & {*arguments}:
            end_workers_with_sweep()
        hydra.main(CONF, command, VERSION)(lambda cfg: run_composed(command, cfg))()
        return
    logging.basicConfig(format="%(message)s")  # as Hydra does for its commands
    logging.getLogger("sj_taid").setLevel(logging.INFO)
    if code := import_command(command).main(arguments):
        sys.exit(code)


def run_composed(command: str, cfg: DictConfig) -> Any:
    """Run the command that Hydra composed ``cfg`` for; Hydra's launchers call this."""
    if GIVEN:
        sys.argv[:] = GIVEN  # which Lightning repeats for the processes of further devices
    else:  # in a launcher's process
        end_with_parent()
    job = HydraConfig.get()
    try:
        return import_command(command).main(cfg)
    except Exception as error:
        if job.mode == RunMode.MULTIRUN and is_users(error):
            print(format_error(error), flush=True)  # Hydra raises it when all jobs have ended
        raise


def end_workers_with_sweep() -> None:
    """Let joblib's workers end with this process: those that wait for a job would stay."""
    from joblib.parallel import BACKENDS, register_parallel_backend

    register_parallel_backend("loky", partial(BACKENDS["loky"], initializer=end_with_parent))


@cache
def end_with_parent() -> None:
    """End this process when its parent does, as when a sweep is killed, even before this call."""
    starter = multiprocessing.parent_process()  # the sweep, if joblib runs the jobs; else None
    parent = starter.pid if starter else os.getppid()

    def watch() -> None:
        # Process 1 adopts those whose parent has died; in a container it may be the sweep itself.
        while os.getppid() == parent and (starter or parent != 1):
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    Thread(target=watch, daemon=True).start()


def import_command(command: str) -> ModuleType:
    """The module of a command."""
    if command == "doctor":
        return import_module("sj_taid.doctor")
    with needs(TRAIN):
        return import_module(f"{__package__}.{command}")


def is_users(error: Exception) -> bool:
    """Whether it is an error that a user makes, whose message is enough."""
    lightnings = type(error).__name__ == "MisconfigurationException"  # not imported for a typo
    return isinstance(error, USER_ERRORS) or lightnings or REMEDY in str(error)


def format_error(error: Exception) -> str:
    """The message of a user's error."""
    hint = "(HYDRA_FULL_ERROR=1 shows the traceback)"
    text = str(error).partition("\nConfig search path")[0]
    return "\n".join([text, *getattr(error, "__notes__", ()), hint])


def resume_arguments(arguments: Sequence[str]) -> list[str]:
    """Replace ``resume=RUN`` by the run's folder and arguments, over which others win."""
    resumed = [argument for argument in arguments if argument.startswith("resume=")]
    if not resumed:
        return [*arguments]
    if MULTIRUN & {*arguments}:
        raise ValueError(
            "resume= is for one run, without -m; a sweep resumes when its command is repeated"
        )
    name = resumed[-1].removeprefix("resume=")
    folder = expand_home(name).absolute()
    if not (folder / OVERRIDES).is_file():
        raise FileNotFoundError(
            f"resume= needs the folder of a run, which holds {OVERRIDES}, but got {folder}"
        )
    others = [argument for argument in arguments if argument not in resumed]
    saved: Any = OmegaConf.to_container(OmegaConf.load(folder / OVERRIDES))
    flags = [argument for argument in saved if argument.startswith("--")]
    started_with = [argument for argument in saved if argument not in flags]
    added = {key_of(override) for override in started_with if override.startswith("+")}
    others = [f"++{other}" if other.partition("=")[0] in added else other for other in others]
    overrides = [*started_with, f"hydra.run.dir={quote(str(folder))}", *others]
    return [*flags, *select_overrides(overrides)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("sj-taid", epilog="sj-taid COMMAND --help says what it takes")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, text in (COMPOSED | OTHERS).items():
        commands.add_parser(name, help=text, add_help=False)
    return parser
