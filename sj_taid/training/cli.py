"""The command line: Hydra composes a config, and the command's own module runs it.

Lightning and matplotlib are imported by the commands that need them: a typo is reported before.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from threading import Thread
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException
from yaml import YAMLError

from .._internal.extras import REMEDY, TRAIN, needs
from .config import CONF, VERSION, Folders, argument, key_of, keys_there, options_of

#: what a user's error is, whose message is enough
USER_ERRORS = (
    *(ValueError, TypeError, OSError, FloatingPointError),
    *(HydraException, OmegaConfBaseException, YAMLError),
)
#: what Lightning says of a metric that EarlyStopping names and nothing logs
NOT_LOGGED = "Early stopping conditioned on metric"


def main(command: str, arguments: Sequence[str]) -> None:
    """``sj-taid COMMAND [argument ...]``, composed by Hydra where there is a config of its name.

    A user's error ends the process with its message; ``HYDRA_FULL_ERROR=1`` shows its traceback.
    """
    given, process, before = [*sys.argv], os.getpid(), os.environ.get("HYDRA_FULL_ERROR")

    def run_job(cfg: DictConfig) -> Any:
        if os.getpid() == process:
            sys.argv[:] = given  # which Lightning repeats for the processes of further devices
        try:
            return find_main(command)(cfg)
        except Exception as error:
            if HydraConfig.get().mode == RunMode.MULTIRUN and is_users(error):
                print(format_error(error), flush=True)  # Hydra raises it when all jobs have ended
            raise

    os.environ["HYDRA_FULL_ERROR"] = "1"  # or Hydra would print the errors of its jobs itself
    try:
        if not Path(CONF, f"{command}.yaml").is_file():
            return find_main(command)(arguments)
        keys = {key_of(argument) for argument in arguments if argument != "resume=null"}
        if "resume" in keys and keys & {"hydra.run.dir", "-m", "--multirun"}:
            raise ValueError(
                "resume= continues one run, in its own folder; leave hydra.run.dir= and -m out"
            )
        if keys & {"-m", "--multirun"}:
            end_workers_with_sweep()
        sys.argv[1:] = choices_first(arguments)
        with explain_sweep(command, arguments):
            hydra.main(CONF, command, VERSION)(run_job)()
    except Exception as error:
        if before == "1" or not is_users(error):
            raise
        sys.exit(format_error(error, command))
    finally:
        os.environ["HYDRA_FULL_ERROR"] = before or "0"


def choices_first(arguments: Sequence[str]) -> list[str]:
    """The arguments with ``KEY=VALUE`` before options, behind whose values argparse takes none.

    >>> choices_first(["--config-dir", "a=b", "seed=1"])
    ['seed=1', '--config-dir', 'a=b']
    """
    folders = "--config-dir", "-cd", "--config-path", "-cp"
    choices: list[str] = []
    others: list[str] = []
    for before, word in zip(["", *arguments], arguments, strict=False):
        is_choice = re.match(r"~|[^-].*=", word) and before not in folders
        (choices if is_choice else others).append(word)
    return choices + others


def find_main(command: str) -> Any:
    """The function of a command, from its module."""
    with needs(TRAIN):
        return import_module(f"{__package__}.{command}").main


@contextmanager
def explain_sweep(command: str, arguments: Sequence[str]) -> Iterator[None]:
    """Say of an interrupt of a sweep how it goes on, which its job does not know."""
    Folders.folder = Folders.made = Folders.sweep = None
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stopped:
        if not Folders.sweep:
            raise
        words = [*map(shlex.quote, arguments)]
        if "hydra.sweep.dir" not in map(key_of, arguments):  # its name has the time
            # among the overrides, which Hydra takes in one row alone
            place = next(
                (i for i, word in enumerate(arguments) if re.match("[+~]|\\w.*=", word)), 0
            )
            words.insert(place, argument("hydra.sweep.dir", Folders.sweep))
        line = " ".join(["sj-taid", command, *words])
        raise type(stopped)(f"Stopped. Go on with the sweep by: {line}") from stopped


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


def is_users(error: Exception) -> bool:
    """Whether it is an error that a user makes, whose message is enough."""
    lightnings = type(error).__name__ == "MisconfigurationException"  # not imported for a typo
    told = any(words in str(error) for words in (REMEDY, NOT_LOGGED))
    return isinstance(error, USER_ERRORS) or lightnings or told


def format_error(error: Exception, command: str = "train") -> str:
    """The message of a user's error, of a command whose arguments are in ``sys.argv``."""
    cause: BaseException | None = error
    while isinstance(cause, InterpolationResolutionError):
        cause = cause.__context__
    if isinstance(cause, USER_ERRORS) and not isinstance(cause, OmegaConfBaseException):
        error = cause  # of a resolver of ours, which OmegaConf wraps
    text = str(error).partition("\nConfig search path")[0]
    if "in DataLoader worker" in text:  # the error itself is behind the worker's traceback
        text = re.split(r"\n  File .*(?:\n    .*)*\n", text)[-1].strip()
    if isinstance(error, YAMLError):
        text = f"a config is no YAML: {' '.join(text.split())}; mend it there"
    elif isinstance(error, OSError) and is_for_runs(error):
        text += "; choose another folder: hydra.run.dir=..., of a sweep hydra.sweep.dir=..."
    else:
        text = explain(text, command)
    hint = ["(HYDRA_FULL_ERROR=1 shows the traceback)"] if command != "compare" else []
    return "\n".join([text, *getattr(error, "__notes__", ()), *hint])


def is_for_runs(error: OSError) -> bool:
    """Whether the folder of the run or sweep cannot be made."""
    if error.filename is None or Folders.folder is None:
        return False
    return Folders.folder.is_relative_to(Path(error.filename).absolute())


def explain(text: str, command: str) -> str:
    """An error's text, or where a library's says too little what is wrong and what to do."""
    words = sys.argv[1:]
    if found := re.match("Could not override '([^']+)'", text):
        return keys_there(command, words, found[1])
    if text.startswith("Config group override must be a string"):
        keys = [key_of(word) for word in words if word.endswith("=null")]
        if groups := [f"~{key}" for key in keys if key in ("callbacks", "logger", "metric")]:
            return f"{' '.join(groups)} leaves a group out, =null does not"
        for key in filter(options_of, keys):
            return f"{key}=null is no choice; {key} has {', '.join(options_of(key))}"
    for key, first, last in re.findall(r"(?m)^([\w.]+)=(\d+)\.\.(\d+)$", "\n".join(words)):
        if text.startswith(f"{key}:"):
            sweep = f"'{key}=range({first},{int(last) + 1})'"
            return f"{key}={first}..{last} is no list of values; write: -m {sweep}"
    found = re.match(r"(?:Interpolation key|Key) '(\w+)", text)
    if found and f"~{found[1]}" in words and (names := ", ".join(options_of(found[1]))):
        return f"~{found[1]} leaves out what the others need; {found[1]} has {names}"
    if text.startswith("Missing mandatory value: checkpoint"):
        return "checkpoint= is missing: give the folder of a run, as checkpoint=runs/1"
    if "No supported gpu backend" in text:
        return "no GPU is found: leave trainer=gpu or accelerator= out; see `sj-taid doctor`"
    return text
