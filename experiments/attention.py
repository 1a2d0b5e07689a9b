"""Image decoders that tell what attention adds to a gain; RESULTS has what they are compared by.

``PYTHONPATH=experiments sj-taid train decoder._target_=attention.Gain trust=[attention.Gain]``
takes one of them.
"""

from typing import Any

import torch
from torch import Tensor, nn

from sj_taid import TAID, FixedDecoder
from sj_taid._internal.context import seeded


class Gain(FixedDecoder):
    """FSVAE's weights times one learned number, which starts at 1."""

    def __init__(self, T: int, **options: Any) -> None:
        super().__init__(T, **options)
        self.gain = nn.Parameter(torch.ones(()))

    def attention(self, x_seq: Tensor) -> Tensor:
        return self.gain * super().attention(x_seq)


class Steps(FixedDecoder):
    """A learned weight for each time step, the same for every input, which starts as FSVAE's."""

    def __init__(self, T: int, **options: Any) -> None:
        super().__init__(T, **options)
        self.weights = nn.Parameter(super().attention(torch.zeros(T, 1, 1)))

    def attention(self, x_seq: Tensor) -> Tensor:
        self._check(x_seq)
        return self.weights


class Attention(TAID):
    """TAID times ``scale``: with 2 / T the weights start at a sum near 1.

    Its start is drawn apart, so that all random numbers after it are those of the other decoders.
    """

    def __init__(self, T: int, scale: float = 1.0, **options: Any) -> None:
        with seeded(torch.initial_seed()):
            super().__init__(T, **options)
        self.scale = scale

    def attention(self, x_seq: Tensor) -> Tensor:
        return self.scale * super().attention(x_seq)
