"""Training from configs: LightningModules, a run's folder, its evaluation, the command line."""

from .._extras import needs

with needs("hydra-core filelock"):
    from .run import Run, load_model

__all__ = ["Run", "load_model"]
