"""The command ``sj-taid``, or ``python -m sj_taid``; a missing package is an error of one line."""

import sys

from ._extras import REMEDY


def main() -> None:
    """Run :mod:`sj_taid.training.cli`, or the doctor alone where its packages are missing."""
    try:
        from .training import cli

        cli.main()
    except ModuleNotFoundError as error:
        if REMEDY not in str(error):
            raise
        if sys.argv[1:2] != ["doctor"]:
            sys.exit(f"sj-taid, all but doctor, needs the extra train: {error}")
        from . import doctor

        sys.exit(doctor.main(sys.argv[2:]))


if __name__ == "__main__":
    main()
