"""Losses of a classifier that torch does not have."""

from torch import Tensor, nn
from torch.nn import functional as F


class TET(nn.Module):
    """Temporal efficient training: the loss of each time step, not that of their mean.

    The cross entropy asks every step for the right answer; the squared error to ``phi`` keeps
    outputs from growing (``docs/training.md`` has the equation). The outputs are currents, not
    spikes: a classifier with ``output_neuron=False``.

    Args:
        mse_share: of the squared error, in [0, 1]; the cross entropy has the rest.
        phi: where the squared error pulls every output; the paper takes the threshold, 1.
        label_smoothing: of the cross entropy, in [0, 1].

    Raises:
        ValueError: ``mse_share`` out of its range.

    Shapes: outputs ``[T, N, classes]``, and the classes' probabilities as target
    ``[N, classes]``, to a scalar.

    Source: Deng, Li, Zhang and Gu, ICLR 2022, arXiv 2202.11946.

    >>> import torch
    >>> outputs = torch.zeros(4, 2, 10)
    >>> loss = TET()(outputs, torch.eye(10)[:2])  # 0.95 log(10) + 0.05
    >>> round(loss.item(), 4)
    2.2375
    """

    #: takes the outputs of each time step, not their mean
    each_step = True

    def __init__(
        self, mse_share: float = 0.05, phi: float = 1.0, label_smoothing: float = 0.0
    ) -> None:
        super().__init__()
        if not 0 <= mse_share <= 1:
            raise ValueError(f"mse_share must be from 0 to 1, but it is {mse_share}")
        self.mse_share = mse_share
        self.phi = phi
        self.label_smoothing = label_smoothing

    def forward(self, outputs: Tensor, target: Tensor) -> Tensor:
        T = len(outputs)
        cross_entropy = F.cross_entropy(
            outputs.flatten(0, 1), target.repeat(T, 1), label_smoothing=self.label_smoothing
        )
        distance = (outputs - self.phi).square().mean()
        return (1 - self.mse_share) * cross_entropy + self.mse_share * distance
