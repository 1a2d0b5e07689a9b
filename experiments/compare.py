"""Compare runs: ``python experiments/compare.py [FOLDER ...] [--out FOLDER] [--keep]``."""

from sj_taid.training.cli import compare

if __name__ == "__main__":
    compare()
