"""The command line ``sj-taid``: Hydra composes a config, and the command's own module runs it.

Lightning and matplotlib are imported by the commands that need them: a typo is reported before.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from itertools import pairwise
from threading import Thread
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from .._commands import COMPOSED, parser
from .._extras import REMEDY, TRAIN, needs
from .config import CONF, VERSION, key_of

#: see is_users
USER_ERRORS = (
    *(ValueError, TypeError, OSError, FloatingPointError),
    *(HydraException, OmegaConfBaseException),
)


def main() -> None:
    """``sj-taid COMMAND [argument ...]``.

    A user's error ends the process with its message; ``HYDRA_FULL_ERROR=1`` shows its traceback.
    """
    command, arguments = parser().parse_args(sys.argv[1:2]).command, sys.argv[2:]
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # or Hydra would print the errors of its jobs itself
    try:
        (run_composed if command in COMPOSED else run_other)(command, arguments)
    except Exception as error:
        if before == "1" or not is_users(error):
            raise
        sys.exit(format_error(error))
    finally:
        os.environ["HYDRA_FULL_ERROR"] = before or "0"


def run_composed(command: str, arguments: Sequence[str]) -> None:
    """Run a command, in each job of a sweep, with the config that Hydra composes."""
    given, process = [*sys.argv], os.getpid()
    for before, word in pairwise(["", *arguments]):
        takes_word = before.startswith("-") and before not in ("-m", "--multirun")
        if "=" not in word and not word.startswith(("-", "~")) and not takes_word:
            raise ValueError(f"expected KEY=VALUE, such as seed=1, but got {word!r}")

    keys = {key_of(word) for word in arguments if word != "resume=null"}
    if {"resume", "hydra.run.dir"} <= keys:
        raise ValueError("resume= continues in the run's own folder; leave hydra.run.dir= out")

    def run_job(cfg: DictConfig) -> Any:
        if os.getpid() == process:
            sys.argv[:] = given  # which Lightning repeats for the processes of further devices
        try:
            return find_main(command)(cfg)
        except Exception as error:
            if HydraConfig.get().mode == RunMode.MULTIRUN and is_users(error):
                print(format_error(error), flush=True)  # Hydra raises it when all jobs have ended
            raise

    sys.argv[1:] = arguments
    if {"-m", "--multirun"} & {*arguments}:
        end_workers_with_sweep()
    hydra.main(CONF, command, VERSION)(run_job)()


def run_other(command: str, arguments: Sequence[str]) -> None:
    """Run a command that has options of its own."""
    logging.basicConfig(format="%(message)s")  # as Hydra does for its commands
    logging.getLogger("sj_taid").setLevel(logging.INFO)
    if code := find_main(command)(arguments):
        sys.exit(code)


def end_workers_with_sweep() -> None:
    """Let joblib's workers end with this process, also when it is killed."""
    from joblib.parallel import BACKENDS, register_parallel_backend

    register_parallel_backend("loky", partial(BACKENDS["loky"], initializer=end_with_parent))


def end_with_parent() -> None:
    """End this worker when the process that started it does, even if it has already."""
    parent: Any = multiprocessing.parent_process()

    def watch() -> None:
        while os.getppid() == parent.pid:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    Thread(target=watch, daemon=True).start()


def find_main(command: str) -> Callable[[Any], Any]:
    """The function of a command, from its module."""
    if command == "doctor":
        return import_module("sj_taid.doctor").main
    with needs(TRAIN):
        return import_module(f"{__package__}.{command}").main


def is_users(error: Exception) -> bool:
    """Whether it is an error that a user makes, whose message is enough."""
    lightnings = type(error).__name__ == "MisconfigurationException"  # not imported for a typo
    return isinstance(error, USER_ERRORS) or lightnings or REMEDY in str(error)


def format_error(error: Exception) -> str:
    """The message of a user's error."""
    hint = "(HYDRA_FULL_ERROR=1 shows the traceback)"
    cause: BaseException | None = error
    while isinstance(cause, InterpolationResolutionError):
        cause = cause.__context__
    if isinstance(cause, USER_ERRORS) and not isinstance(cause, OmegaConfBaseException):
        error = cause  # of a resolver of ours, which OmegaConf wraps
    text = str(error).partition("\nConfig search path")[0]
    if "in DataLoader worker" in text:  # the error itself is behind the worker's traceback
        text = re.split(r"\n  File .*(?:\n    .*)*\n", text)[-1].strip()
    if "LexerNoViableAlt" in text:
        text = text.partition("\nSee https://hydra.cc")[0]
        text += "\nQuote a value with this character for Hydra and the shell: \"key='it #2'\""
    return "\n".join([text, *getattr(error, "__notes__", ()), hint])
