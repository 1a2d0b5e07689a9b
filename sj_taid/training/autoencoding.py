"""Training of a model that reconstructs images."""

from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from ..data import ImageData
from .plot import draw_reconstructions
from .task import Task


class Autoencoding(Task):
    """Training by the model's own ``training_loss(image, progress)``.

    It gives ``loss`` and its terms, and may give ``image``, the reconstruction. Called with images,
    the model returns an object with ``image``, too.
    """

    takes = ImageData
    model_attributes: tuple[str, ...] = ("training_loss",)
    objectives: tuple[str, ...] = ("reconstruction",)

    def setup(self, stage: str) -> None:
        if self.trainer.precision in ("16-true", "bf16-true", "64-true"):
            raise ValueError(
                f"trainer.precision={self.trainer.precision} has no 32-bit weights, in which alone "
                "images are measured and drawn; choose trainer.precision=bf16-mixed, or 16-mixed"
            )

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        image, _ = batch
        losses = self.losses(image)
        losses.pop("image", None)
        loss = losses.pop("loss")
        for name, part in losses.items():
            self.log_mean(f"train/{name}", part)
        return loss

    def losses(self, image: Tensor) -> dict[str, Tensor]:
        """``loss`` and what is logged next to it, for images ``[N, C, H, W]``."""
        epochs = max((self.trainer.max_epochs or 1) - 1, 1)
        progress = min(self.current_epoch / epochs, 1.0)  # 0 in the first epoch, 1 in the last
        return self.model.training_loss(image, progress)

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        self._log_reconstruction("val", batch)

    def test_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        self._log_reconstruction("test", batch)

    def evaluate(self, data: ImageData, evaluator: Any) -> dict[str, Any]:
        how = "mean squared error, images in [-1, 1], "
        protocol = {"reconstruction": how + data.describe_test_set()}
        if data.validation_set is not None:
            protocol["validation_reconstruction"] = (
                how + data.test_on_validation().describe_test_set()
            )
        return {"protocol": protocol}

    def draw(self, images: Tensor, folder: Path) -> None:
        draw_reconstructions(images, self.model(images).image, folder / "reconstructions.png")

    def _log_reconstruction(self, stage: str, batch: tuple[Tensor, Tensor]) -> None:
        image, _ = batch
        self.log_mean(f"{stage}/reconstruction", F.mse_loss(self.model(image).image, image))
