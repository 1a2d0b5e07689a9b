"""Draw samples from a trained model: ``python experiments/sample.py checkpoint=RUN``."""

from sj_taid.training.cli import sample

if __name__ == "__main__":
    sample()
