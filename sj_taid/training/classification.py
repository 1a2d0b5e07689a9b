"""Training of a classifier, on still images or on frames of events."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassConfusionMatrix

from ..data import Data
from .plot import draw_confusion
from .task import Task


class Classification(Task):
    """Training on labels or, where samples are mixed, on the probabilities of classes.

    Accuracy in training then counts the class with the larger part.

    Args:
        args, kwargs: the arguments of :class:`~sj_taid.training.task.Task`.
        loss: takes the outputs ``[N, classes]``, or with ``each_step`` each time step's,
            ``[T, N, classes]``, and the classes' probabilities ``[N, classes]``. None is the mean
            squared error.
    """

    chosen_by = "accuracy"
    model_attributes: tuple[str, ...] = ("classes",)
    objectives = ("accuracy", "loss")

    def __init__(self, *args: Any, loss: nn.Module | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.loss = loss or nn.MSELoss()
        self.confusion = MulticlassConfusionMatrix(self.model.classes)

    def model_input(self, x: Tensor) -> Tensor:
        """Images ``[N, C, H, W]`` as they are; frames of events time first, ``[T, N, *]``."""
        if x.dim() != 5:
            return x
        if x.shape[1] != self.model.T:
            raise ValueError(
                f"the recordings have dataset.T={x.shape[1]} frames, but model.T={self.model.T}; "
                "set dataset.T alone, which model.T follows"
            )
        return x.transpose(0, 1)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        loss, _ = self._step("train", batch)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        self._step("val", batch)

    def test_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        _, rates = self._step("test", batch)
        self.confusion.update(rates, batch[1])

    def on_test_epoch_end(self) -> None:
        self.counts = self.confusion.compute()  # summed over all processes
        self.confusion.reset()

    def evaluate(self, data: Data, evaluator: Any) -> dict[str, Any]:
        how = f"trained on {len(data.train_set)} samples, tested on {len(data.test_set)}"
        tested, validated = ["accuracy"], ["accuracy_best_test_epoch"]
        if data.validation_set is not None:
            how += f", validated on {len(data.validation_set)}"
            tested, validated = [*tested, "accuracy_best_validation_epoch"], ["validation_accuracy"]
        protocol = dict.fromkeys(tested, how + self.describe_limit("test"))
        return {"protocol": protocol | dict.fromkeys(validated, how + self.describe_limit("val"))}

    def draw(self, images: Tensor, folder: Path) -> None:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        draw_confusion(self.counts, data.class_names, folder / "confusion.png")

    def _step(self, stage: str, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, label = self.model_input(batch[0]), batch[1]
        if getattr(self.loss, "each_step", False):
            outputs = self.model(x, each_step=True)
            mean = outputs.mean(0)
        else:
            mean = outputs = self.model(x)
        is_mixed = label.dim() == 2
        target = label if is_mixed else F.one_hot(label, self.model.classes)
        loss = self.loss(outputs, target.to(outputs))
        self.log_mean(f"{stage}/loss", loss)
        hits = mean.argmax(1) == (label.argmax(1) if is_mixed else label)
        self.log_mean(f"{stage}/accuracy", hits.float().mean())
        return loss, mean
