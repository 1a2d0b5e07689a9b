"""ALIF as functions of explicit state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from spikingjelly.activation_based import surrogate
from torch import Tensor

from .ops import backends
from .ops.bits import LARGEST_COUNT
from .ops.step.program import NotRead
from .ops.step.reference import state_dtype
from .ops.surrogate import is_integer, levels_of

__all__ = ["alif_multi_step", "lower_bound"]


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
        x_seq: input current ``[T, N, *]``, one time step as ``x.unsqueeze(0)``; half precision is
            computed in float32.
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
        TypeError: ``x_seq``, ``w`` or ``v_threshold`` is no floating-point tensor, or ``v`` neither
            tensor nor number.
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
    options: Any = {"decay_input": decay_input, "v_reset": v_reset}
    options |= {"detach_reset": detach_reset, "store_v_seq": store_v_seq}
    options["surrogate_function"] = surrogate_function
    found = backends.resolve(backend, x_seq)
    try:
        return found.multi_step(x_seq, v, w, v_threshold, **options)
    except NotRead as error:
        reason = f"no fused backend can take this call: {error}"
        if backends.is_chosen(backend):
            raise backends.BackendUnavailableError(reason) from error
        backends.warn_once(f"{reason}. Falling back to 'torch'; say backend=... to choose.")
    return backends.resolve("torch", x_seq).multi_step(x_seq, v, w, v_threshold, **options)


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


def check_call(
    x_seq: Tensor, v: Any, w: Any, v_threshold: Any, label: Callable[[], str] = str
) -> None:
    """Raise an error unless a sequence, its start and the parameters fit each other.

    A parameter that is ``None`` is a number, which fits. ``label`` names the neuron in an error.
    """
    _check_floating("x_seq", x_seq)
    if x_seq.dim() < 2 or x_seq.shape[0] == 0:
        raise ValueError(
            f"x_seq must be [T, N, *] with T >= 1, but its shape is {list(x_seq.shape)}; one time "
            "step [N, *] is x.unsqueeze(0), or an input of a node in step_mode='s'"
        )
    if isinstance(v, Tensor):
        if v.shape != x_seq.shape[1:]:
            raise ValueError(
                f"the membrane potential{(who := label()) and f' of {who}'} has shape "
                f"{list(v.shape)}, but one step of the input has {list(x_seq.shape[1:])}; reset "
                "between sequences: functional.reset_net(net), or run each in 'with "
                "sj_taid.fresh_state(net):'"
            )
        _check_device("the membrane potential", v, x_seq)
    elif not isinstance(v, int | float | torch.SymFloat):
        raise TypeError(
            f"the membrane potential v must be a tensor or a number, but it is {v!r}; 0.0 is rest"
        )
    for name, parameter in (("w", w), ("v_threshold", v_threshold)):
        if parameter is not None:
            _check_floating(name, parameter)
            shape = list(parameter.shape)
            if shape and (x_seq.dim() < 3 or shape != [x_seq.shape[2]]):
                raise ValueError(
                    f"{name} must be a scalar or one value per channel of [T, N, C, *], but its "
                    f"shape is {shape} and the input's {list(x_seq.shape)}"
                )
            _check_device(name, parameter, x_seq)


def _check_floating(name: str, x: Any) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name} must be a floating-point tensor, but it is {got}")


def _check_device(name: str, tensor: Tensor, x_seq: Tensor) -> None:
    if tensor.device != x_seq.device:
        raise ValueError(
            f"{name} is on {tensor.device} but the input on {x_seq.device}; "
            "move them to one device: net.to(device)"
        )


def check_counts(surrogate_function: Any, v_reset: Any, has_state: bool = True) -> None:
    """Raise an error unless the options fit spikes, or counts."""
    if not is_integer(surrogate_function):
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


def savable(x: Tensor) -> Tensor:
    """``x``, or a copy where autograd could not save it, which inference mode made."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not x.is_inference():
        return x
    return x.clone()
