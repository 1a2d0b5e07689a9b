"""Train a model: ``python experiments/train.py [group=option] [key=value]``."""

from sj_taid.training.cli import train

if __name__ == "__main__":
    train()
