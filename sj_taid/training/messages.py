"""What a training says when it ends: metrics, and the command to give next."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .compare import format_metrics
from .config import argument
from .run import METRICS, Run

log = logging.getLogger(__name__)


def show_metrics(metrics: dict[str, Any]) -> None:
    """The metrics, a line each."""
    for title, value in format_metrics(metrics).values():
        log.info("%s: %s", title, value)


@contextmanager
def explain_resuming(run: Run) -> Iterator[None]:
    """Add to an error, or to an interrupt, how the run resumes."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as error:  # Ctrl-C, and a cluster's time limit
        advice = "Give the same command again, since no epoch was complete."
        if run.checkpoint.is_file() and not run.is_finished:  # by an earlier command
            advice = resume_command(run)
        is_ctrl_c = KeyboardInterrupt in (type(error), type(error.__context__))  # by Lightning
        raise (KeyboardInterrupt if is_ctrl_c else SystemExit)(f"Stopped. {advice}") from error
    except (OSError, RuntimeError) as error:
        if run.checkpoint.is_file():
            error.add_note(f"Then: {resume_command(run)}")
        raise


def resume_command(run: Run) -> str:
    return f"Resume with: sj-taid train {argument('resume', run.folder)}"


def closing_lines(run: Run) -> str:
    """The picture to open, the metrics, and a command to try next."""
    here = Path.cwd()
    folder = run.folder.relative_to(here) if run.folder.is_relative_to(here) else run.folder
    pictures = [folder / f"{name}.png" for name in ("samples", "confusion", "reconstructions")]
    lines = [f"Picture: {path}" for path in pictures if path.is_file()][:1]
    lines.append(f"Metrics: {folder / METRICS}")
    if run.checkpoint.is_file():
        command = "evaluate" if "loss" in run.config.task else "sample"
        lines.append(f"Next:    sj-taid {command} {argument('checkpoint', folder)}")
    return "\n".join(lines)
