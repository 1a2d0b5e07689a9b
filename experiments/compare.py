"""Compare runs: ``python experiments/compare.py FOLDER... [--out FOLDER]``."""

from sj_taid.training.compare import main

if __name__ == "__main__":
    main()
