"""Measure a trained model: ``python experiments/evaluate.py checkpoint=RUN``."""

from sj_taid.training.cli import main

if __name__ == "__main__":
    main("evaluate")
