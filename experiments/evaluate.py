"""Measure a trained model: ``python experiments/evaluate.py checkpoint=RUN``."""

from sj_taid.training.cli import evaluate

if __name__ == "__main__":
    evaluate()
