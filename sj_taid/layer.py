"""Layers that turn the output of T time steps into one image."""

import torch
from spikingjelly.activation_based import base
from torch import Tensor, nn
from torch.nn import functional as F

from ._internal.checks import check_numbers, check_sizes

#: FSVAE's ratio of a step's weight to the next step's
DECAY = 0.8


def _decay_weights(T: int, decay: float, like: Tensor) -> Tensor:
    """``decay^(T-1-t)`` for all t, ``[T]``."""
    return decay ** torch.arange(T - 1, -1, -1, dtype=like.dtype, device=like.device)


class _ImageDecoder(nn.Module, base.MultiStepModule):
    """``X = sum_t a[t] S[t]`` with the weights ``a`` of a subclass."""

    def __init__(self, T: int) -> None:
        super().__init__()
        check_sizes(T=T)
        self.T = T
        self.step_mode = "m"

    def attention(self, x_seq: Tensor) -> Tensor:
        """The weight of each step, ``[T, N, C]``, ``[T, N, C, H, W]`` or broadcastable to one."""
        raise NotImplementedError

    def forward(self, x_seq: Tensor) -> Tensor:
        """Decode ``[T, N, C, H, W]`` to ``[N, C, H, W]``, or ``[T, N, C]`` to ``[N, C]``."""
        weights = self.attention(x_seq).to(x_seq.dtype)
        trailing = (1,) * (x_seq.dim() - weights.dim())
        return (weights.view(*weights.shape, *trailing) * x_seq).sum(0)

    def _check(self, x_seq: Tensor) -> None:
        name = type(self).__name__
        if not x_seq.is_floating_point():
            raise TypeError(
                f"{name} needs a floating-point tensor, but got {x_seq.dtype}; "
                "convert it: x_seq.float()"
            )
        if x_seq.dim() not in (3, 5):
            raise ValueError(
                f"{name} needs [T, N, C, H, W] or [T, N, C], but got {list(x_seq.shape)}"
            )
        if x_seq.shape[0] != self.T:
            raise ValueError(
                f"{name} was made for T={self.T} time steps, but got T={x_seq.shape[0]}; "
                f"run {self.T} steps or make a layer with T={x_seq.shape[0]}"
            )


class TAID(_ImageDecoder):
    r"""Temporal attention image decoding: a learned, input-dependent weight for each time step.

    .. math::
        X = \sum_t a[t]\,S[t], \qquad
        a = \mathrm{sigmoid}(\mathrm{Conv1d}_{T \to T}(\mathrm{mean}_{H,W}(S))) \in [N, T, C]
        \quad\text{(squeeze="spatial")}

    for S ``[T, N, C, H, W]`` or ``[T, N, C]``; ``docs/mathematics.md`` has the other
    forms. ``"pixel"`` starts as the fixed decoder.

    Args:
        T: number of time steps.
        squeeze: ``"spatial"`` (default), a weight for each step and channel; ``"all"``, one for
            each step, from an MLP with a hidden layer of T / 4; or ``"pixel"``, one for each step,
            channel and pixel of ``[T, N, C, H, W]``, from a convolution 3x3.

    Raises:
        ValueError: a bad argument; at a call, a wrong rank or another T.
        TypeError: at a call, an input that is not floating point.

    Source: Qiu et al. 2023, arXiv 2406.03046: ``all`` is in the paper's figure, ``spatial`` in its
    experiments; ``pixel`` is this project's.

    >>> taid = TAID(T=4)
    >>> taid(torch.rand(4, 2, 3, 8, 8)).shape, taid.attention(torch.rand(4, 2, 3, 8, 8)).shape
    (torch.Size([2, 3, 8, 8]), torch.Size([4, 2, 3]))
    """

    def __init__(self, T: int, squeeze: str = "spatial") -> None:
        super().__init__(T)
        if squeeze not in ("spatial", "all", "pixel"):
            raise ValueError(f"squeeze must be 'spatial', 'all' or 'pixel', but it is {squeeze!r}")
        self.squeeze = squeeze
        self.excite: nn.Module
        if squeeze == "spatial":
            self.excite = nn.Conv1d(T, T, 1, bias=False)  # mixes time alone
        elif squeeze == "pixel":
            self.excite = nn.Conv2d(T, T, 3, padding=1)
            for parameter in self.excite.parameters():
                nn.init.zeros_(parameter)
        else:
            hidden = max(T // 4, 1)
            self.excite = nn.Sequential(nn.Linear(T, hidden), nn.ReLU(), nn.Linear(hidden, T))

    def attention(self, x_seq: Tensor) -> Tensor:
        """The weights: ``[T, N, C]`` (``spatial``) or ``[T, N, 1]`` (``all``) in (0, 1), or
        ``[T, N, C, H, W]`` (``pixel``) between 0 and twice the fixed decoder's."""
        self._check(x_seq)
        if self.squeeze == "pixel":
            return self._weigh_pixels(x_seq)
        z = x_seq.flatten(3).mean(3) if x_seq.dim() == 5 else x_seq
        if self.squeeze == "all":
            return self.excite(z.mean(2).t()).sigmoid().t().unsqueeze(2)
        return self.excite(z.transpose(0, 1)).sigmoid().transpose(0, 1)

    def _weigh_pixels(self, x_seq: Tensor) -> Tensor:
        if x_seq.dim() != 5:
            raise ValueError(
                f"squeeze='pixel' weighs the pixels of [T, N, C, H, W], but got "
                f"{list(x_seq.shape)}; use squeeze='spatial' or 'all'"
            )
        _, n, c, h, w = x_seq.shape
        images = x_seq.permute(1, 2, 0, 3, 4).reshape(n * c, self.T, h, w)
        images = F.layer_norm(images, images.shape[1:])
        gate = 2 * self.excite(images).sigmoid()
        weights = _decay_weights(self.T, DECAY, gate).view(-1, 1, 1, 1, 1)
        return gate.view(n, c, self.T, h, w).permute(2, 0, 1, 3, 4) * weights

    def extra_repr(self) -> str:
        return f"T={self.T}, squeeze={self.squeeze}, step_mode=m"


class FixedDecoder(_ImageDecoder):
    r"""The weighting that TAID replaces: :math:`X = s \sum_t d^{T-1-t} S[t]`.

    Args:
        T: number of time steps.
        decay: the factor d per time step, in (0, 1]; 0.8 by default.
        scale: the factor s of all weights; 1 by default.

    Raises:
        ValueError: a bad argument; at a call, a wrong rank or another T.
        TypeError: at a call, an input that is not floating point.

    Source: Kamata et al. 2022, arXiv 2110.00375 (the read-out of FSVAE, with d = 0.8 and s = 1).

    >>> FixedDecoder(T=3, decay=0.5)(torch.ones(3, 1, 1))
    tensor([[1.7500]])
    """

    def __init__(self, T: int, decay: float = DECAY, scale: float = 1.0) -> None:
        super().__init__(T)
        check_numbers(decay=decay, scale=scale)
        if not 0.0 < decay <= 1.0:
            raise ValueError(f"decay must be in (0, 1], but it is {decay!r}")
        self.decay, self.scale = decay, scale

    def attention(self, x_seq: Tensor) -> Tensor:
        """The weights ``[T, 1, 1]``, the same for every input."""
        self._check(x_seq)
        # Not a buffer: .half().float() would leave it rounded to half precision.
        return self.scale * _decay_weights(self.T, self.decay, x_seq).view(self.T, 1, 1)

    def extra_repr(self) -> str:
        return f"T={self.T}, decay={self.decay}, scale={self.scale}, step_mode=m"
