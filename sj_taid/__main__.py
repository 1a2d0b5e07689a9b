"""The command ``sj-taid``, or ``python -m sj_taid``; a package that it lacks is one line."""

import sys

from ._extras import REMEDY


def main() -> None:
    """Run :mod:`sj_taid.training.cli`."""
    try:
        from .training import cli

        cli.main()
    except ModuleNotFoundError as error:
        if REMEDY not in str(error):
            raise
        sys.exit(f"sj-taid: {error}")


if __name__ == "__main__":
    main()
