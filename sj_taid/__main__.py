"""The command ``sj-taid``, or ``python -m sj_taid``; a missing package is an error of one line."""

import sys

from ._commands import parser
from ._extras import REMEDY


def main() -> None:
    """Run a command; Ctrl-C ends it without a traceback, and a loop of the shell too."""
    try:
        run()
    except KeyboardInterrupt as interrupt:
        print(interrupt, file=sys.stderr)
        sys.excepthook = lambda *_: None
        raise  # Python then ends by the signal, with the status 130


def run() -> None:
    """Run :mod:`sj_taid.training.cli`, or the help and doctor where its packages are missing."""
    try:
        from .training import cli
    except ModuleNotFoundError as error:
        if REMEDY not in str(error):
            raise
        command = parser().parse_args(sys.argv[1:2]).command
        if command != "doctor":
            sys.exit(f"sj-taid {command} needs the extra train: {error}")
        from . import doctor

        sys.exit(doctor.main(sys.argv[2:]))
    cli.main()


if __name__ == "__main__":
    main()
