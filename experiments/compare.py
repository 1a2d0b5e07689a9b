"""Compare runs: ``python experiments/compare.py [FOLDER ...] [--out FOLDER] [--keep]``."""

from sj_taid.training.cli import main

if __name__ == "__main__":
    main("compare")
