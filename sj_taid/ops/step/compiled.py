"""The neuron as one operator in a graph of ``torch.compile``.

Inductor would compile the definition, too, but a graph of all its steps takes it up to four times
as long. A norm before the neuron is torch's own there.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from operator import and_
from typing import Any

import torch
from torch import Tensor

from ..._internal.graph import constant_in_graphs
from ..bits import is_dense
from .plan import ENGINES, arranged, find_plan, spec_of
from .program import Reading
from .reference import state_dtype

#: a hash -> the reading: the same in every process, since torch keeps compiled graphs on disk
_READINGS: dict[str, Reading] = {}
#: the classes of neurons in graphs, which are read again before a graph runs
KINDS: set[type] = set()

#: the states that are tensors, as ``starts`` says, and numbers for the others
_NEURON = "Tensor x, Tensor[] states, bool[] starts, float[] v_init, Tensor[] parameters, str key"
_GRADS = "Tensor[] grads, bool[] given"
_NO_NORM = (None,) * 4


@lru_cache(maxsize=4096)
def key_of(reading: Reading) -> str:
    """The name of a reading in graphs."""
    key = hashlib.sha256(repr(reading).encode()).hexdigest()[:32]
    _READINGS[key] = reading
    return key


@constant_in_graphs
def is_known(key: str, kind: type) -> bool:
    """Whether this process has the reading of a class that a graph is traced of."""
    KINDS.add(kind)
    return key in _READINGS


def run(
    x: Tensor, states: Any, v_init: Any, parameters: Any, key: str, store_v_seq: bool
) -> tuple[Any, ...]:
    """Outputs, last states and, if asked for, every voltage; a state is ``None`` for its number."""
    starts = [v is not None for v in states]
    given = [v for v in states if v is not None]
    found = neuron(x, given, starts, list(v_init), list(parameters), key, store_v_seq)
    return *found[:-1], found[-1] if store_v_seq else None


def _plan_of(x: Tensor, key: str, store_v_seq: bool, saves: bool) -> Any:
    spec = spec_of(x, _READINGS[key], store_v_seq=store_v_seq, saves=saves)
    return find_plan(ENGINES[x.device.type], spec)


def _spread(tensors: Any, are_given: Any, strides: Any) -> list[Tensor | None]:
    """The tensors in memory by ``strides``, with ``None`` at the places of those not given."""
    left = iter(tensors)
    return [arranged(next(left), strides) if given else None for given in are_given]


@torch.library.custom_op(
    "sj_taid::neuron",
    mutates_args=(),
    schema=f"({_NEURON}, bool store_v_seq) -> Tensor[]",
)
def neuron(*arguments: Any) -> list[Tensor]:
    """Outputs, last states and, if asked for, every voltage; else a tensor of no elements."""
    x, states, starts, v_init, parameters, key, store_v_seq = arguments
    x = x if is_dense(x) else x.contiguous()  # Inductor compares the layout of what it is given
    plan = _plan_of(x, key, store_v_seq, False)
    states = _spread(states, starts, x.stride()[1:])
    *found, v_seq, _, _ = plan.forward(tuple(v_init), x, *states, *parameters, *_NO_NORM)
    return [*found, x.new_empty(0, dtype=torch.float32) if v_seq is None else v_seq]


@neuron.register_fake
def _(x: Tensor, states: Any, starts: Any, *others: Any) -> list[Tensor]:
    dtype = state_dtype(x.dtype)
    v_seq = torch.empty_like(x, dtype=dtype) if others[-1] else x.new_empty(0, dtype=dtype)
    last = [torch.empty_like(x[0], dtype=dtype) for _ in starts]
    return [torch.empty_like(x), *last, v_seq]


@torch.library.custom_op(
    "sj_taid::neuron_backward",
    mutates_args=(),
    schema=f"({_GRADS}, {_NEURON}, bool[] needs) -> Tensor[]",
)
def neuron_backward(*arguments: Any) -> list[Tensor]:
    """The gradients of x, states and parameters; of no elements where they are not needed."""
    grads, given, x, states, starts, v_init, parameters, key, needs = arguments
    x = x if is_dense(x) else x.contiguous()
    plan = _plan_of(x, key, given[-1], True)
    order, step = x.stride(), x.stride()[1:]
    operands = x, *_spread(states, starts, step), *parameters, *_NO_NORM
    v_init = tuple(v_init)
    checkpoint = plan.forward(v_init, *operands)[-2] if plan.has_checkpoint else None
    left = iter(grads)
    upstream = [next(left) if is_given else None for is_given in given]
    of_states = [arranged(grad, step) for grad in upstream[1:-1]]
    upstream = [arranged(upstream[0], order), *of_states, arranged(upstream[-1], order)]
    found = plan.backward((*needs, False), v_init, (*upstream, checkpoint), operands)
    return [x.new_empty(0) if grad is None else grad for grad in found[:-2]]


@neuron_backward.register_fake
def _(*arguments: Any) -> list[Tensor]:
    _, _, x, _, starts, _, parameters, _, needs = arguments
    likes = x, *[x[0].to(state_dtype(x.dtype)) for _ in starts], *parameters
    pairs = zip(needs, likes, strict=True)
    return [torch.empty_like(like) if need else x.new_empty(0) for need, like in pairs]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, states, starts, v_init, parameters, *others = inputs
    ctx.save_for_backward(x, *states, *parameters)
    ctx.call = starts, v_init, len(states), others
    ctx.needs = (
        x.requires_grad,
        [t.requires_grad for t in states],
        [t.requires_grad for t in parameters],
    )
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, found: Any) -> tuple[Any, ...]:
    x, *tensors = ctx.saved_tensors
    starts, v_init, size, (key, store_v_seq) = ctx.call
    states, parameters = tensors[:size], tensors[size:]
    grads = [*found[:-1], found[-1] if store_v_seq else None]
    given = [grad is not None for grad in grads]
    needs_x, of_states, of_parameters = ctx.needs
    left = iter(of_states)
    needs = [needs_x, *(start and next(left) for start in starts), *of_parameters]
    _, found_by = _READINGS[key].program.used(tuple(given[:-1]), given[-1], len(x))
    needs = [*map(and_, needs, found_by)]
    about = x, states, starts, v_init, parameters, key
    grad_x, *rest = neuron_backward([g for g in grads if g is not None], given, *about, needs)
    rest = [grad if need else None for grad, need in zip(rest, needs[1:], strict=True)]
    last = len(starts)
    of_states = [grad for grad, start in zip(rest[:last], starts, strict=True) if start]
    return grad_x if needs[0] else None, of_states, None, None, rest[last:], None, None


neuron.register_autograd(_differentiate, setup_context=_save)
