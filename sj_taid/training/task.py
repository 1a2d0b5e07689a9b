"""The LightningModule that all trainings share, with hooks for measuring and drawing."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..calibration import fixed_thresholds
from ..data import Data
from ..optim import parameter_groups
from .checkpoint import load_weights

if TYPE_CHECKING:
    from .evaluator import Evaluator

log = logging.getLogger(__name__)


class Task(L.LightningModule):
    """A model and its training.

    What is logged as ``test/<name>`` becomes ``<name>`` in ``metrics.json``, and ``val/<name>``
    becomes ``validation_<name>`` where there is a validation set: both of the last epoch.

    Args:
        model: the model to train.
        optimizer: makes the optimizer from the parameters; None where nothing is trained.
        lr_scale: time constants and thresholds learn at the optimizer's learning rate times this,
            without weight decay. None treats them as all other parameters.
        scheduler: makes the learning rate's schedule from the optimizer, a step is an epoch; None
            keeps the rate as it is.

    Attributes:
        takes: the data sets that it can learn from.
        model_attributes: what its model must have.
        objectives: the metrics that ``objective`` can name, of the test set or another.
        chosen_by: the metric, higher is better, that chooses the best epoch; None chooses none.
    """

    takes: type[Data] = Data
    model_attributes: tuple[str, ...] = ()
    objectives: tuple[str, ...] = ()
    chosen_by: str | None = None
    model: Any

    def __init__(
        self,
        model: nn.Module,
        optimizer: partial[Any] | None,
        lr_scale: float | None = None,
        scheduler: Callable[[Optimizer], LRScheduler] | None = None,
    ) -> None:
        super().__init__()
        lacks = [name for name in self.model_attributes if not hasattr(model, name)]
        if lacks:
            name = type(model).__name__
            raise TypeError(f"{name} lacks {', '.join(lacks)}; choose another model= or task=")
        self.model = model
        self.optimizer: Any = optimizer
        self.lr_scale = lr_scale
        self.scheduler = scheduler

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(self.parameter_groups())
        if self.scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self.scheduler(optimizer)}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups of parameters, some with learning rates of their own."""
        if self.lr_scale is None:
            return [{"params": [p for p in self.parameters() if p.requires_grad]}]
        return parameter_groups(self, self.optimizer.keywords["lr"], lr_scale=self.lr_scale)

    def monitor(self, data: Data) -> str | None:
        """What is logged that chooses the best epoch, where there is a validation set."""
        chooses = self.chosen_by is not None and data.validation_set is not None
        return f"val/{self.chosen_by}" if chooses else None

    def model_input(self, x: Tensor) -> Tensor:
        """The model's input for the samples of a batch."""
        return x

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["fixed_thresholds"] = fixed_thresholds(self.model)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        load_weights(self.model, checkpoint, self.trainer.ckpt_path or "the checkpoint")
        fit = checkpoint["loops"]["fit_loop"]
        if not fit["epoch_loop.batch_progress"]["is_last_batch"]:  # max_steps or max_time ended it
            for count in ("total", "current"):
                fit["epoch_progress"][count]["processed"] -= 1
        for callback in self.trainer.early_stopping_callbacks:
            state = checkpoint["callbacks"].get(callback.state_key, {})
            if state.get("stopping_reason_message"):  # Lightning would take the training up again
                log.info("Early stopping: %s", state["stopping_reason_message"])
                ended_after = fit["epoch_progress"]["current"]["processed"]
                self.trainer.fit_loop.max_epochs = max(ended_after, self.trainer.min_epochs or 0)
        trained, epochs = checkpoint["epoch"] + 1, self.trainer.max_epochs or 0
        if epochs < trained:
            raise ValueError(
                f"trainer.max_epochs must be at least the {trained} epochs that are trained, but "
                f"it is {epochs}"
            )

    def on_before_backward(self, loss: Tensor) -> None:
        if not loss.isfinite():
            raise self._diverged(f"the loss is {loss.item()}")

    def on_train_epoch_end(self) -> None:
        # Before the checkpoint is written: no loss has shown the last step's update yet.
        if not all(parameter.isfinite().all() for parameter in self.parameters()):
            raise self._diverged("a parameter is not finite")

    def _diverged(self, what: str) -> FloatingPointError:
        remedy = "a lower optimizer.lr, or with trainer.gradient_clip_val=1.0"
        if self.trainer.precision == "16-true":  # in which Adam divides by 0
            remedy = "trainer.precision=bf16-true or 16-mixed: 16-true rounds Adam's eps to 0"
        return FloatingPointError(
            f"{what} in epoch {self.current_epoch + 1}, after step {self.global_step}: the model "
            f"has diverged; train it in another folder with {remedy}"
        )

    def before_training(self, data: Any, evaluator: Evaluator | None) -> None:
        """Check and prepare what training needs.

        Every process of a distributed run does: while one makes what is cached, the others wait at
        its file lock, as in a collective they would hit the time limit.
        """

    def fit_prior(self, data: Any) -> None:
        """Fit the trained model's prior, if it has one to fit."""

    def evaluate(self, data: Any, evaluator: Evaluator | None) -> dict[str, Any]:
        """Metrics of the trained model that its test does not log, and under ``protocol`` how."""
        return {}

    def describe_limit(self, stage: str) -> str:
        """What a protocol adds where an option of the trainer cuts the ``stage`` short."""
        option = f"limit_{stage}_batches"
        limit = getattr(self.trainer, option)
        is_share = isinstance(limit, float)  # or a number of batches, such as 1
        return "" if is_share and limit == 1 else f", stopped by trainer.{option}={limit}"

    def draw(self, images: Tensor, folder: Path) -> None:
        """Draw pictures of the tested model, from some images of the test set."""
        raise NotImplementedError

    def log_mean(self, name: str, value: Tensor) -> None:
        """Log the mean over an epoch; the bar shows one name in training and validation."""
        shown = name.endswith(f"/{self.chosen_by or 'reconstruction'}")
        self.log(name, value, prog_bar=shown, on_step=False, on_epoch=True, sync_dist=True)
