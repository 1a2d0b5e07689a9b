"""The neuron as one operator in a graph of ``torch.compile``.

Inductor would compile the definition, too, but a graph of all its steps takes it up to four times
as long. A norm before the neuron is torch's own there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..bits import is_dense
from .plan import ENGINES, Charge, Dynamics, Needs, arranged, find_plan, spec_of
from .reference import state_dtype

_NEURON = "Tensor x, Tensor? v0, float v_init, Tensor? w, Tensor v_threshold"
_DYNAMICS = (
    "int charge, float? v_reset, bool detach_reset, str surrogate, float a, float b, int levels, "
    "float[] parameters"
)
_GRADS = "Tensor? grad_spike, Tensor? grad_v, Tensor? grad_v_seq"
_NO_NORM = (None,) * 4


def _plan_of(x: Tensor, v_threshold: Tensor, dynamics: Any, store_v_seq: bool, saves: bool) -> Any:
    charge, *rest, parameters = dynamics
    about: Any = Charge(charge), None, None, *rest, tuple(parameters)
    dynamics = Dynamics(*about)
    spec = spec_of(x, dynamics, v_threshold.dim() > 0, store_v_seq=store_v_seq, saves=saves)
    return find_plan(ENGINES[x.device.type], spec)


@torch.library.custom_op(
    "sj_taid::alif",
    mutates_args=(),
    schema=f"({_NEURON}, {_DYNAMICS}, bool store_v_seq) -> (Tensor, Tensor, Tensor)",
)
def alif(*arguments: Any) -> tuple[Tensor, ...]:
    """Spikes, last voltage and, if asked for, every voltage; else a tensor of no elements."""
    x, v0, v_init, w, v_threshold, *dynamics, store_v_seq = arguments
    x = x if is_dense(x) else x.contiguous()  # Inductor compares the layout of what it is given
    v0 = arranged(v0, x.stride()[1:])
    plan = _plan_of(x, v_threshold, dynamics, store_v_seq, False)
    spike_seq, v, v_seq, *_ = plan.forward(v_init, x, v0, w, v_threshold, *_NO_NORM)
    return spike_seq, v, v.new_empty(0) if v_seq is None else v_seq


@alif.register_fake
def _(x: Tensor, *others: Any) -> tuple[Tensor, ...]:
    dtype = state_dtype(x.dtype)
    v_seq = torch.empty_like(x, dtype=dtype) if others[-1] else x.new_empty(0, dtype=dtype)
    return torch.empty_like(x), torch.empty_like(x[0], dtype=dtype), v_seq


@torch.library.custom_op(
    "sj_taid::alif_backward",
    mutates_args=(),
    schema=f"({_GRADS}, {_NEURON}, {_DYNAMICS}, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor)",
)
def alif_backward(grad_spike: Any, grad_v: Any, grad_v_seq: Any, *others: Any) -> tuple[Any, ...]:
    """The gradients of x, v0, w and v_threshold; of no elements where they are not needed."""
    x, v0, v_init, w, v_threshold, *dynamics, needs = others
    x = x if is_dense(x) else x.contiguous()
    strides, step = x.stride(), x.stride()[1:]
    plan = _plan_of(x, v_threshold, dynamics, grad_v_seq is not None, True)
    operands = x, arranged(v0, step), w, v_threshold, *_NO_NORM
    checkpoint = plan.forward(v_init, *operands)[3] if plan.has_checkpoint else None
    grads = arranged(grad_spike, strides), arranged(grad_v, step), arranged(grad_v_seq, strides)
    found = plan.backward(Needs._make([*needs, False]), v_init, (*grads, checkpoint), operands)
    return tuple(x.new_empty(0) if grad is None else grad for grad in found[:4])


@alif_backward.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    x, _, _, _, v_threshold, *_, needs = arguments[3:]
    likes = x, x[0].to(state_dtype(x.dtype)), v_threshold, v_threshold
    pairs = zip(needs, likes, strict=True)
    return tuple(torch.empty_like(like) if need else x.new_empty(0) for need, like in pairs)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, v0, v_init, w, v_threshold, *options = inputs
    ctx.save_for_backward(x, v0, w, v_threshold)
    ctx.call = v_init, options
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_spike: Any, grad_v: Any, grad_v_seq: Any) -> tuple[Any, ...]:
    x, v0, w, v_threshold = ctx.saved_tensors
    v_init, (*dynamics, store_v_seq) = ctx.call
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 3, 4)]
    grads = grad_spike, grad_v, grad_v_seq if store_v_seq else None
    found = alif_backward(*grads, x, v0, v_init, w, v_threshold, *dynamics, needs)
    wanted = [grad if need else None for grad, need in zip(found, needs, strict=True)]
    return *wanted[:2], None, *wanted[2:], *[None] * (len(dynamics) + 1)


alif.register_autograd(_differentiate, setup_context=_save)
