"""Training from configs: LightningModules, a run's folder, its evaluation, the command line."""

from .._internal.extras import TRAIN, needs

with needs(TRAIN):
    from .run import Run, load_model

__all__ = ["Run", "load_model"]
