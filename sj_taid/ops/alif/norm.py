"""The batch norm that a neuron applies to its input: its definition, and its terms per channel.

The definition is torch's own batch norm over time, batch and space. Its result has the dtype of the
state: it is never rounded to that of a half-precision input.

The fused backends never write that result. With mean mu and variance var of a channel over its n
values,

    r = (var + eps)^(-1/2)      gain = weight r      y = (x - shift) gain + offset
    shift = mu rounded to float32      offset = bias - (mu - shift) gain

which is accurate also if mu is large compared with the deviation. Their backward sums over G_y, the
gradient of y, and over G_y (x - shift), and then

    dbias = sum G_y      dweight = r (sum G_y (x - shift) - (mu - shift) sum G_y)
    G_x = gain G_y - A - B (x - shift)      G_x = gain G_y with running statistics
    B = gain r dweight / n      A = gain dbias / n - B (mu - shift)

Saved for backward: the input, and numbers per channel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

#: the shape and strides of a sequence
Layout = tuple[tuple[int, ...], tuple[int, ...]]


class Norm(NamedTuple):
    """A batch norm over axis 2 of ``[T, N, C, *]``; every tensor is ``[C]``, or ``None``."""

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    #: whether to use the batch's statistics and update the running ones, or to use the running ones
    use_batch_statistics: bool
    #: weight of the batch's statistics in the updated running ones
    momentum: float
    eps: float
    #: the process group that the statistics are taken over; ``None`` for this process alone
    group: Any = None
    #: the numbers of :func:`affine`, if the statistics have been taken already
    affine: Affine | None = None

    @property
    def fixed(self) -> bool:
        """Whether the statistics are the running ones, which do not depend on the input."""
        tracked = self.running_mean is not None and self.running_var is not None
        return tracked and not self.use_batch_statistics

    @classmethod
    def of(cls, module: Any, training: bool) -> Norm:
        """What a module would compute in this mode; counts the batch, as its forward does."""
        momentum = 0.0 if module.momentum is None else module.momentum
        # Statistics that are not tracked in training are used in eval mode all the same.
        reads = module.track_running_stats or not training
        if training and reads and module.num_batches_tracked is not None:
            module.num_batches_tracked.add_(1)
            if module.momentum is None:  # the plain average over all batches
                momentum = 1.0 / float(module.num_batches_tracked)
        use_batch_statistics = training or module.running_mean is None
        return cls(
            module.weight,
            module.bias,
            module.running_mean if reads else None,
            module.running_var if reads else None,
            use_batch_statistics,
            momentum,
            module.eps,
            group_of(module) if training else None,  # as torch: not in eval
        )

    def detach(self) -> Norm:
        """The same norm, whose parameters receive no gradient."""
        weight, bias = (t if t is None else t.detach() for t in (self.weight, self.bias))
        return self._replace(weight=weight, bias=bias)


def group_of(module: nn.Module) -> Any:
    """The process group over which a module takes the statistics of a batch, if there is one."""
    if not (isinstance(module, nn.SyncBatchNorm) and distributed.is_initialized()):
        return None
    return module.process_group or distributed.group.WORLD


def batch_norm(x_seq: Tensor, norm: Norm) -> Tensor:
    """Torch's batch norm over time, batch and space of ``x_seq`` ``[T, N, C, *]``."""
    x = x_seq.flatten(0, 1)
    if norm.group is not None and norm.use_batch_statistics:
        return _synchronised(x, norm).unflatten(0, x_seq.shape[:2])
    # torch wants one dtype, which for a net in half precision is that of x, float32.
    weight, bias, mean, var = (t if t is None else t.to(x.dtype) for t in norm[:4])
    y = F.batch_norm(x, mean, var, weight, bias, norm.use_batch_statistics, norm.momentum, norm.eps)
    updates = ((norm.running_mean, mean), (norm.running_var, var))
    for running, moved in updates if norm.use_batch_statistics else ():
        if running is not None and moved is not None and moved is not running:
            running.copy_(moved)
    return y.unflatten(0, x_seq.shape[:2])


def _synchronised(x: Tensor, norm: Norm) -> Tensor:
    """The norm of ``x`` ``[n, C, *]`` by the statistics of all processes of the group.

    Gradients pass through the sums over the processes.
    """
    axes = [axis for axis in range(x.dim()) if axis != 1]
    per_channel = (-1, *[1] * (x.dim() - 2))
    count = x.new_tensor(x.numel() // x.shape[1], dtype=torch.float64)
    sums = torch.stack([count.expand(x.shape[1]), x.double().sum(axes)])
    total = _SumOverProcesses.apply(sums, norm.group)
    mean = total[1] / total[0]
    deviation = x.double() - mean.view(per_channel)
    var = _SumOverProcesses.apply(deviation.square().sum(axes), norm.group) / total[0]
    update_running(norm, mean.detach(), _unbiased(var.detach(), total[0].detach()))
    y = (deviation * (var + norm.eps).rsqrt().view(per_channel)).to(x.dtype)
    if norm.weight is not None:
        y = y * norm.weight.view(per_channel)
    return y if norm.bias is None else y + norm.bias.view(per_channel)


class _SumOverProcesses(torch.autograd.Function):
    """The sum of a tensor over the processes of a group; its gradient is summed over them too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group, total = group, x.clone()
        distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _SumOverProcesses.apply(grad, ctx.group), None


@torch.no_grad()
def update_running(norm: Norm, mean: Tensor, var: Tensor) -> None:
    """Move the running statistics towards a batch's, ``var`` being the unbiased variance.

    ``running = (1 - momentum) running + momentum batch``, as in torch.
    """
    if norm.running_mean is not None and norm.running_var is not None:
        norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), norm.momentum)
        norm.running_var.lerp_(var.to(norm.running_var.dtype), norm.momentum)


def _unbiased(var: Tensor, count: Any) -> Tensor:
    return var * (count / (count - 1))


class Affine(NamedTuple):
    """The norm as ``y = (x - shift) gain + offset``."""

    #: float32: shift, gain and offset, which the kernels read, and weight and bias as they were
    table: Tensor
    numbers: Tensor  #: mean and r, float64 ``[2, C]``
    count: Any  #: how many values a channel has over all processes

    def parameters(self, norm: Norm) -> tuple[Tensor | None, Tensor | None]:
        """Weight and bias at the call, whatever has become of those of ``norm``."""
        rows = iter(self.table[3:])
        weight, bias = (
            None if t is None else next(rows).to(t.dtype) for t in (norm.weight, norm.bias)
        )
        return weight, bias

    def all_numbers(self) -> Tensor:
        """Mean, r, gain and count, float64 ``[4, C]``."""
        mean, rate = self.numbers
        gain = self.table[1].double()
        return torch.stack([mean, rate, gain, torch.ones_like(mean) * self.count])


@torch.no_grad()
def affine(norm: Norm, x_seq: Tensor, statistics: Callable[[Tensor], Tensor]) -> Affine:
    """The norm of ``x_seq``, with its running statistics updated.

    ``statistics`` gives each channel's mean and biased variance as float64 ``[2, C]``.
    """
    if not x_seq.numel():  # of a group, in which other processes have images
        numbers = x_seq.new_zeros((2, x_seq.shape[2]), dtype=torch.float64)
    elif norm.running_mean is None or norm.running_var is None or not norm.fixed:
        numbers = statistics(x_seq)
    else:
        numbers = torch.stack([norm.running_mean, norm.running_var]).double()
    count: Any = x_seq.numel() / numbers.shape[1]
    if not norm.fixed and norm.group is not None:
        numbers, count = _combined(numbers, count, norm.group)
    shift, var = numbers.float()
    if not norm.fixed:
        update_running(norm, shift, _unbiased(var, count))
    mean, rate = numbers
    rate.add_(norm.eps).rsqrt_()  # the variance until here
    gain = rate if norm.weight is None else rate * norm.weight
    offset = (shift - mean) * gain
    if norm.bias is not None:
        offset += norm.bias
    parameters = (t for t in (norm.weight, norm.bias) if t is not None)
    return Affine(torch.stack([shift, gain, offset, *parameters]).float(), numbers, count)


def _combined(numbers: Tensor, count: float, group: Any) -> tuple[Tensor, Tensor]:
    """Mean and variance of all the group's processes together, and their count."""
    mean, var = numbers
    own = torch.full_like(mean, count)
    moments = torch.stack([own, own * mean, own * (var + mean.square())])
    distributed.all_reduce(moments, group=group)
    total, mean, square = moments[0], *(moments[1:] / moments[0])
    return torch.stack([mean, square - mean.square()]), total


def gradients(affine: Affine, sums: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of weight and bias.

    ``sums`` are those of G_y and of G_y (x - shift) in this process, float64 ``[2, C]``.
    """
    return (affine.numbers[1] * _centred(affine, sums)).float(), sums[0].float()


def mean_terms(affine: Affine, sums: Tensor, group: Any) -> Tensor:
    """A and B, float32 ``[2, C]``: how G_x depends on the batch's statistics, of all processes."""
    mean, rate, gain, count = affine.all_numbers()
    if group is not None:
        sums = sums.clone()
        distributed.all_reduce(sums, group=group)
    b = gain * rate * rate * _centred(affine, sums) / count
    a = gain * sums[0] / count - b * (mean - affine.table[0])
    return torch.stack([a, b]).float()


def _centred(affine: Affine, sums: Tensor) -> Tensor:
    """The sum of G_y (x - mu)."""
    return sums[1] - (affine.numbers[0] - affine.table[0]) * sums[0]
