"""The commands of ``sj-taid``; their help needs none of the packages that they need."""

import argparse

from ._extras import TRAIN

#: commands whose arguments are Hydra's overrides of conf/<command>.yaml
COMPOSED = {
    "train": "train a model, or with -m every job of a sweep",
    "evaluate": "measure a run's checkpoint again",
    "sample": "draw images from a trained model",
}
#: commands with options of their own
OTHERS = {
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
    for name, text in (COMPOSED | OTHERS).items():
        commands.add_parser(name, help=text, add_help=False)
    return new
