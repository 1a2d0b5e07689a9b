"""For PyTorch Lightning."""

from typing import Any

from ._internal.extras import needs
from .monitoring import notes_on_thresholds, warn_of
from .state import name_neurons, reset

with needs("lightning"):
    from lightning.pytorch import Callback, LightningModule, Trainer

__all__ = ["ResetState"]


class ResetState(Callback):
    """Reset every neuron before each batch of training, validation, test and prediction.

    Warns after each epoch of thresholds that fell to the reset voltage or their lower bound.

    ``Trainer(callbacks=[ResetState()])``
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        name_neurons(pl_module)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        reset(pl_module)

    on_validation_batch_start = on_train_batch_start
    on_test_batch_start = on_train_batch_start
    on_predict_batch_start = on_train_batch_start

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        warn_of(notes_on_thresholds(pl_module))
