"""The command ``sj-taid``, or ``python -m sj_taid``; its help needs no more than the library."""

import argparse
import difflib
import sys

from ._internal.extras import TRAIN

COMMANDS = {
    "train": "train a model, or with -m every job of a sweep",
    "evaluate": "measure a run's checkpoint again",
    "sample": "draw images from a trained model",
    "compare": "compare runs in a table",
    "doctor": "say which backends work here, and why the others do not",
}


def parser() -> argparse.ArgumentParser:
    """The parser of the first argument, the command."""
    new = argparse.ArgumentParser(
        "sj-taid",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="sj-taid COMMAND --help says what it takes.\n"
        f"All but doctor need the extra train: pip install {TRAIN}",
    )
    commands = new.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, text in COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    return new


def main() -> None:
    """Run a command; Ctrl-C ends it without a traceback, and a loop of the shell too."""
    given = next(iter(sys.argv[1:2]), "")
    near = difflib.get_close_matches(given, COMMANDS, 1)
    if near and given not in COMMANDS:
        parser().error(f"no command {given!r}; did you mean {near[0]!r}?")
    command, arguments = parser().parse_args(sys.argv[1:2]).command, sys.argv[2:]
    if command == "doctor":
        from . import doctor

        sys.exit(doctor.main(arguments))
    try:
        try:
            from .training import cli
        except ModuleNotFoundError as error:
            sys.exit(f"sj-taid {command} needs the extra train: {error}")
        cli.main(command, arguments)
    except KeyboardInterrupt as interrupt:
        if str(interrupt):
            print(interrupt, file=sys.stderr)
        sys.excepthook = lambda *_: None
        raise  # Python then ends by the signal, with the status 130


if __name__ == "__main__":
    main()
