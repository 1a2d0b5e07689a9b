"""The command ``sj-taid``, or ``python -m sj_taid``; a package that it lacks is one line."""

import sys

from ._extras import REMEDY


def main() -> None:
    """Run :mod:`sj_taid.training.cli`, or without what that needs the doctor."""
    try:
        from .training import cli
    except ModuleNotFoundError as error:
        if REMEDY not in str(error):
            raise
        if sys.argv[1:2] == ["doctor"]:
            from . import doctor

            sys.exit(doctor.main(sys.argv[2:]))
        sys.exit(
            "sj-taid: its commands, all but doctor, need the extra train, in a checkout "
            f'pip install ".[cpu,train]": {error}'
        )
    try:
        cli.main()
    except ModuleNotFoundError as error:
        if REMEDY not in str(error):
            raise
        sys.exit(f"sj-taid: {error}")


if __name__ == "__main__":
    main()
