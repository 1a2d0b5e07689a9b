"""What every task has, and what ``commands`` asks of it beside Lightning's hooks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
from torch import Tensor, distributed, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..data import Data
from ..optim import parameter_groups
from ..thresholds import fixed_thresholds, set_fixed_thresholds

if TYPE_CHECKING:
    from .evaluation import Evaluator


def of_best_epoch(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Figures of the epoch that was best on the validation set, by names of their own."""
    return {f"{name}_best_validation_epoch": value for name, value in figures.items()}


class Task(L.LightningModule):
    """A model and its training.

    ``takes`` says from which data sets it can learn, ``asks_of_model`` what its model must have.

    What is logged as ``test/<name>`` becomes ``<name>`` in ``metrics.json``, and ``val/<name>``
    becomes ``validation_<name>`` where there is a validation set: both of the last epoch.

    ``chosen_by`` names the figure, higher is better, by which an epoch is chosen, if one is.

    Args:
        model: what is trained.
        optimizer: makes the optimizer from the parameters.
        lr_scale: time constants and thresholds learn at the optimizer's learning rate times this,
            without weight decay. None treats them as all other parameters.
        scheduler: makes the learning rate's schedule from the optimizer, a step is an epoch; None
            keeps it as it is.
    """

    takes: type[Data] = Data
    asks_of_model: tuple[str, ...] = ()
    chosen_by: str | None = None
    model: Any

    def __init__(
        self,
        model: nn.Module,
        optimizer: partial[Any],
        lr_scale: float | None = None,
        scheduler: Callable[[Optimizer], LRScheduler] | None = None,
    ) -> None:
        super().__init__()
        lacks = [name for name in self.asks_of_model if not hasattr(model, name)]
        if lacks:
            raise TypeError(
                f"{type(self).__name__} needs a model that has {', '.join(self.asks_of_model)}, "
                f"but {type(model).__name__} lacks {', '.join(lacks)}; choose another task=, or "
                "another model="
            )
        self.model = model
        self.optimizer = optimizer
        self.lr_scale = lr_scale
        self.scheduler = scheduler

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(self.optimized())
        if self.scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self.scheduler(optimizer)}

    def optimized(self) -> list[dict[str, Any]]:
        """The groups of parameters that the optimizer takes, some with rates of their own."""
        if self.lr_scale is None:
            return [{"params": [*self.parameters()]}]
        return parameter_groups(self, self.learning_rate(), lr_scale=self.lr_scale)

    def learning_rate(self) -> float:
        """The optimizer's, of which others are multiples."""
        if "lr" not in self.optimizer.keywords:
            raise ValueError(
                "the optimizer has no lr, of which task.lr_scale or task.prior_lr_scale is a "
                "multiple; give optimizer.lr, or task.lr_scale=null"
            )
        return self.optimizer.keywords["lr"]

    def model_input(self, x: Tensor) -> Tensor:
        """What the model takes, of the samples of a batch."""
        return x

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["fixed_thresholds"] = fixed_thresholds(self.model)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        set_fixed_thresholds(self.model, checkpoint.get("fixed_thresholds", {}))

    def on_before_backward(self, loss: Tensor) -> None:
        if not loss.isfinite():
            raise self._diverged(f"the loss is {loss.item()}")

    def on_train_epoch_end(self) -> None:
        """Before the checkpoint is written: the last step's gradient no loss has shown yet."""
        if not all(parameter.isfinite().all() for parameter in self.parameters()):
            raise self._diverged("a parameter is not finite")

    def on_last_epoch_end(self, data: Any, kept: Any) -> None:
        """After the last epoch's validation and before its checkpoint is written, or after none.

        Args:
            data: that of the training.
            kept: what the run keeps: this task, or its copy with averaged weights.
        """

    def _diverged(self, what: str) -> FloatingPointError:
        clip = "trainer.gradient_clip_val=1.0"
        if self.current_epoch:
            clip = f"go on from the epoch before, whose checkpoint is kept, with resume=... {clip}"
        return FloatingPointError(
            f"{what} in epoch {self.current_epoch + 1}, after step {self.global_step}: the model "
            f"has diverged; train it with a lower optimizer.lr, or {clip}"
        )

    def figures(
        self, trainer: L.Trainer, data: L.LightningDataModule, evaluator: Evaluator | None
    ) -> dict[str, Any]:
        """Every figure of the trained model.

        In a distributed run every process tests, and the first alone measures the rest.
        """
        logged = self.tested(trainer, data)
        if distributed.is_initialized():
            # A metric sums over all processes, and would wait for the others for ever.
            distributed.destroy_process_group()
        if not trainer.is_global_zero:
            return logged
        figures = logged | self.after_training(data, evaluator)
        protocol = figures.get("protocol", {})
        best = f"{self.chosen_by}_best_test_epoch"
        validated = {best, *(f"validation_{name}" for name in logged)}
        for option, loader, names in (
            ("limit_test_batches", data.test_dataloader, {*logged, *of_best_epoch(logged)}),
            ("limit_val_batches", data.val_dataloader, validated),
        ):
            limit = getattr(trainer, option)  # an int is a number of batches, a float a share
            if limit < (len(loader()) if isinstance(limit, int) else 1.0):
                for name in names & protocol.keys():
                    protocol[name] += f", stopped by trainer.{option}={limit}"
        return figures

    def tested(self, trainer: L.Trainer, data: L.LightningDataModule) -> dict[str, Any]:
        """What the test logs."""
        (logged,) = trainer.test(self, data, verbose=False)
        return {name.removeprefix("test/"): value for name, value in logged.items()}

    def validated(self, data: Data, epochs: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """The last epoch's figures on the validation set; without one, the best on the test set.

        Args:
            data: says which of them validation is on.
            epochs: what was logged in each.
        """
        if data.validation_set is not None:
            last = [item for epoch in epochs[-1:] for item in epoch.items()]
            return {k.replace("val/", "validation_"): v for k, v in last if k.startswith("val/")}
        values = [epoch[key] for epoch in epochs if (key := f"val/{self.chosen_by}") in epoch]
        return {f"{self.chosen_by}_best_test_epoch": max(values)} if values else {}

    def before_training(self, data: Any, evaluator: Any) -> dict[str, Any]:
        """Figures of the untrained model, for ``metrics.json``.

        In a distributed run every process takes them. So all wait for what is made once for the
        figures before they wait for each other, which they do not do for long.
        """
        return {}

    def after_training(self, data: Any, evaluator: Any) -> dict[str, Any]:
        """Figures of the trained model that its test does not log."""
        return {}

    def report(self, metrics: dict[str, Any]) -> list[str]:
        """The lines a run ends with."""
        raise NotImplementedError

    def draw(self, images: Tensor, folder: Path) -> None:
        """Pictures of the tested model; ``images`` are some of the test set."""
        raise NotImplementedError

    def log_mean(self, name: str, value: Tensor) -> None:
        """Log the mean over an epoch."""
        self.log(name, value, prog_bar=True, on_step=False, on_epoch=True, sync_dist=True)
