"""ALIF as functions of explicit state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from spikingjelly.activation_based import surrogate
from torch import Tensor

from .ops import backends
from .ops.alif.reference import state_dtype
from .ops.bits import LARGEST_COUNT
from .ops.surrogate import counts, levels_of

__all__ = ["alif_multi_step", "alif_step", "lower_bound"]


def alif_multi_step(
    x_seq: Tensor,
    v: Tensor | float,
    w: Tensor | None,
    v_threshold: Tensor,
    *,
    decay_input: bool = True,
    v_reset: float | None = 0.0,
    surrogate_function: Callable[[Tensor], Tensor] = surrogate.Sigmoid(),
    detach_reset: bool = False,
    store_v_seq: bool = False,
    backend: str = backends.AUTO,
) -> tuple[Any, ...]:
    """Run an ALIF neuron over a sequence; :class:`~sj_taid.ALIFNode` has its equations.

    Args:
        x_seq: input current ``[T, N, *]``; half precision is computed in float32.
        v: membrane potential before the first step, ``[N, *]``, or a float for all neurons.
        w: ``-log(tau - 1)``, tau in time steps; a scalar, or ``[C]`` for axis 2 of ``x_seq``. For
            counts ``None`` is no state: each step is charged by its input alone.
        v_threshold: threshold voltage; a scalar, or ``[C]``.
        decay_input, v_reset, surrogate_function, detach_reset, backend: as of
            :class:`~sj_taid.ALIFNode`.
        store_v_seq: also return the voltage of every step.

    Returns:
        Spikes ``[T, N, *]`` in ``x_seq``'s dtype; the last voltage ``[N, *]``; the voltages
        ``[T, N, *]`` or ``None``. Voltages are float32 (float64 for float64 input).

    Raises:
        TypeError: ``x_seq`` is not floating point, or another argument no tensor.
        ValueError: shapes, devices or the backend's name do not fit.
        BackendUnavailableError: the backend named cannot run here.

    >>> x = torch.tensor([[1.0], [1.0], [1.0]])
    >>> spikes, v, _ = alif_multi_step(x, 0.0, torch.tensor(0.0), torch.tensor(0.7))
    >>> spikes.flatten().tolist(), v.tolist()  # H = 0.5, 0.75 (fires), 0.5
    ([0.0, 1.0, 0.0], [0.5])
    """
    check_call(x_seq, v, w, v_threshold)
    check_counts(surrogate_function, v_reset, w is not None)
    x_seq = savable(x_seq)
    if isinstance(v, Tensor):
        v = savable(v).to(state_dtype(x_seq.dtype))
    return backends.resolve(backend, x_seq, surrogate_function).multi_step(
        x_seq,
        v,
        w,
        v_threshold,
        decay_input=decay_input,
        v_reset=v_reset,
        surrogate_function=surrogate_function,
        detach_reset=detach_reset,
        store_v_seq=store_v_seq,
    )


def alif_step(
    x: Tensor, v: Tensor | float, w: Tensor | None, v_threshold: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """One time step of :func:`alif_multi_step`, bit for bit: ``x`` ``[N, *]`` -> spikes, voltage.

    Takes the same options but ``store_v_seq``.

    >>> spike, v = alif_step(torch.tensor([1.0]), 0.0, torch.tensor(0.0), torch.tensor(0.4))
    >>> spike.item(), v.item()  # H = 0.5 fires and resets to 0
    (1.0, 0.0)
    """
    spike_seq, v_last, _ = alif_multi_step(as_sequence(x), v, w, v_threshold, **options)
    return spike_seq[0], v_last


def as_sequence(x: Tensor) -> Tensor:
    """One time step ``[N, *]`` as a sequence of one."""
    _check_floating("x", x)
    if x.dim() < 1:
        raise ValueError("x must be [N, *], but it is a scalar; add a batch axis: x.unsqueeze(0)")
    return x.unsqueeze(0)


def lower_bound(x: Tensor, bound: float) -> Tensor:
    """``max(x, bound)`` whose gradient also passes below the bound where it leads back up.

    With ``clamp`` a parameter that fell below the bound would never learn again.

    >>> p = torch.tensor(-1.0, requires_grad=True)
    >>> lower_bound(p, 0.1).backward(torch.tensor(-1.0))  # descent would raise p: passes
    >>> p.grad
    tensor(-1.)
    """
    return _LowerBound.apply(x, bound)


class _LowerBound(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, bound: float) -> Tensor:
        return x.clamp(min=bound)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        x, ctx.bound = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return grad * ((x >= ctx.bound) | (grad < 0)), None


def _check_floating(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(
            f"{name} must be a floating-point tensor, but it is {got}; convert it: {name}.float()"
        )


def check_call(
    x_seq: Tensor, v: Any, w: Any, v_threshold: Any, label: Callable[[], str] = str
) -> None:
    """Raise an error unless a sequence, its start and the parameters fit each other.

    A parameter that is ``None`` is a number, which fits. ``label`` names the neuron in an error.
    """
    _check_floating("x_seq", x_seq)
    if x_seq.dim() < 2 or x_seq.shape[0] == 0:
        raise ValueError(
            f"x_seq must be [T, N, *] with T >= 1, but its shape is {list(x_seq.shape)}; "
            "for one time step [N, *] use sj_taid.functional.alif_step, or a node in step_mode='s'"
        )
    _check_state(v, x_seq, label)
    for name, parameter in (("w", w), ("v_threshold", v_threshold)):
        if parameter is not None:
            _check_parameter(name, parameter, x_seq)


def check_counts(surrogate_function: Any, v_reset: Any, has_state: bool = True) -> None:
    """Raise an error unless the options fit spikes, or counts."""
    if not counts(surrogate_function):
        if not has_state:
            raise ValueError(
                "a neuron without state (init_tau=None, w=None) gives counts alone: take levels=4, "
                "or surrogate_function=sj_taid.ops.surrogate.MultiLevelSpikeCount(4)"
            )
    elif v_reset is not None:
        raise ValueError(
            "a neuron that counts needs a soft reset, which subtracts the count times the "
            f"threshold, but v_reset={v_reset!r} would set one voltage after any count; take "
            "v_reset=None"
        )
    elif (levels := levels_of(surrogate_function)) > LARGEST_COUNT:
        raise ValueError(
            f"a neuron counts to {LARGEST_COUNT} at most, which four bits hold, not to {levels}"
        )


def _check_state(v: Any, x_seq: Tensor, label: Callable[[], str]) -> None:
    if not isinstance(v, Tensor):
        if isinstance(v, int | float | torch.SymFloat):
            return
        raise TypeError(
            f"the membrane potential v must be a tensor or a number, but it is {v!r}; 0.0 is rest"
        )
    if v.shape != x_seq.shape[1:]:
        who = label()
        raise ValueError(
            f"the membrane potential{who and f' of {who}'} has shape {list(v.shape)}, but one "
            f"step of the input has {list(x_seq.shape[1:])}; reset between sequences: "
            "functional.reset_net(net), or run each in 'with sj_taid.fresh_state(net):'"
        )
    _check_device("the membrane potential", v, x_seq)


def savable(x: Tensor) -> Tensor:
    """``x``, or a copy where autograd could not save it, which inference mode made."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not x.is_inference():
        return x
    return x.clone()


def _check_parameter(name: str, parameter: Tensor, x_seq: Tensor) -> None:
    if not isinstance(parameter, Tensor):
        raise TypeError(
            f"{name} must be a tensor, but it is {parameter!r}; make it one: "
            f"torch.tensor({parameter!r})"
        )
    if parameter.dim() > 1:
        raise ValueError(
            f"{name} must be a scalar or one value per channel [C], but its shape is "
            f"{list(parameter.shape)}"
        )
    if parameter.dim() == 1 and (x_seq.dim() < 3 or x_seq.shape[2] != len(parameter)):
        raise ValueError(
            f"{name} has {len(parameter)} channels, so one step of the input must be "
            f"[N, {len(parameter)}, *], but it is {list(x_seq.shape[1:])}"
        )
    _check_device(name, parameter, x_seq)


def _check_device(name: str, tensor: Tensor, x_seq: Tensor) -> None:
    if tensor.device != x_seq.device:
        raise ValueError(
            f"{name} is on {tensor.device} but the input on {x_seq.device}; "
            "move them to one device: net.to(device)"
        )
