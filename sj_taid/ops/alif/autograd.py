"""Autograd over a backend's plans, and the operators that ``torch.compile`` takes into its graph.

Nothing is saved for backward but the input, the parameters, the initial voltage if it is a tensor,
a norm's numbers per channel, and the plan's checkpoints; the rest is recomputed.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ... import _graph
from .. import bits, surrogate
from ..bits import is_dense
from .norm import Norm, batch_norm
from .plan import (
    Dynamics,
    Engine,
    Needs,
    NormPlan,
    NormSpec,
    Plan,
    Spec,
    find_norm_plan,
    find_plan,
)
from .reference import state_dtype


def unsupported(
    device: str, dtypes: tuple[torch.dtype, ...], x_seq: Tensor, surrogate_function: Any
) -> str | None:
    """Why a fused operator of a device and of these dtypes cannot take the call, or ``None``."""
    if x_seq.device.type != device:
        return f"the input is on {x_seq.device}, expected on {device}; move it: x.to({device!r})"
    if x_seq.dtype not in dtypes:
        return (
            f"the input is {x_seq.dtype}, expected one of {', '.join(map(str, dtypes))}; "
            "convert it, or use backend='torch'"
        )
    return surrogate_function and surrogate.unsupported(surrogate_function)


_UNFUSED = "backend='torch' for ALIF, sj_taid.unaccelerate(net) for an accelerated net"


class FusedALIF(torch.autograd.Function):
    """A call of a plan in autograd; ``None`` for outputs that were not asked for, which cost time.

    ``apply`` is given x, v0, w, v_threshold, weight, bias, the plan, its spec, ``v_init``, a norm's
    numbers and what errors call the neuron; it gives spikes, last voltage, every voltage, and bits.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor | None, ...]:
        # One parameter: apply looks at each of the signature's at every call.
        x, v0, w, v_threshold, _, _, plan, _, v_init, numbers, _ = inputs
        spike_seq, v, v_seq, checkpoint, packed = plan.forward(
            x, v0, v_init, w, v_threshold, numbers
        )
        _save(ctx, inputs, checkpoint)
        if packed is not None:
            ctx.mark_non_differentiable(packed)
        return spike_seq, v, v_seq, packed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return *_gradients(ctx, *grads), *_NO_GRADIENTS


apply_fused = _graph.apply_of(FusedALIF)
#: of the inputs that are no tensors
_NO_GRADIENTS = (None,) * 5


def _gradients(
    ctx: Any, grad_spike_seq: Any, grad_v: Any, grad_v_seq: Any = None, *unused: Any
) -> tuple[Tensor | None, ...]:
    """The plan's backward."""
    plan, spec, v_init, strides, name = ctx.call
    # Hooks on saved tensors need not keep their layout.
    x, v0, w, v_threshold, checkpoint, numbers = _saved_tensors(ctx, name)
    if checkpoint is not None and not checkpoint.is_contiguous():
        checkpoint = checkpoint.contiguous()
    if numbers is not None and not numbers.is_contiguous():
        numbers = numbers.contiguous()
    step = spec.strides[1:]
    need_x, need_v0, need_w, need_v_threshold, need_weight, need_bias = ctx.needs_input_grad[:6]
    arguments = (
        Needs(need_x, need_v0, need_w, need_v_threshold, need_weight or need_bias),
        arranged(grad_spike_seq, spec.strides),
        arranged(grad_v, step),
        arranged(grad_v_seq, spec.strides),
        arranged(x, strides),
        arranged(v0, step),
        *(v_init, w, v_threshold, checkpoint, numbers),
    )
    # create_graph=True, and torch.func always
    if torch.is_grad_enabled():
        grads = _Backward.apply(plan, *arguments)
    else:
        grads = plan.backward(*arguments)
    if need_weight == need_bias:
        return grads
    # A plan computes both or none, and a missing input of autograd's must get none.
    return *grads[:4], grads[4] if need_weight else None, grads[5] if need_bias else None


def _save(ctx: Any, inputs: tuple[Any, ...], checkpoint: Tensor | None) -> None:
    x, v0, w, v_threshold, _, _, plan, spec, v_init, numbers, name = inputs
    ctx.call = plan, spec, v_init, x.stride(), name
    ctx.save_for_backward(x, v0, w, v_threshold, checkpoint, numbers)
    # An output that nobody used has no gradient to read.
    ctx.set_materialize_grads(False)


def _saved_tensors(ctx: Any, name: str) -> tuple[Tensor, ...]:
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        if "inplace operation" not in str(error):
            raise
        raise RuntimeError(
            f"{f'the neuron {name!r}' if name else 'an ALIF neuron'} reads its input, voltage "
            "and parameters again in its backward, but one was changed in place since its "
            "forward: write h = h + o instead of h += o, change parameters after the backward, "
            f"or use what does not read the input again: {_UNFUSED}"
        ) from error


class TransformedALIF(FusedALIF):
    """The same for torch.func and torch.compile, which ask for forward and context apart.

    That takes apply twice the time.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        x, v0, w, v_threshold, _, _, plan, _, v_init, _, _ = inputs
        return plan.forward(x, v0, v_init, w, v_threshold, None)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _save(ctx, inputs, output[3])
        ctx.mark_non_differentiable(output[3])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        stored = 2 + ctx.call[0].store_v_seq  # else v_seq is a tensor of no elements
        results, needs = _gradients(ctx, *grads[:stored]), ctx.needs_input_grad
        wanted = (
            result if need else None for result, need in zip(results[:4], needs, strict=False)
        )
        return *wanted, *[None] * 7


class _Backward(torch.autograd.Function):
    """The backward as a function of all it reads, so that a second derivative raises an error.

    ``once_differentiable`` looks at the incoming gradients alone.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(plan: Plan, *arguments: Any) -> tuple[Tensor | None, ...]:
        return plan.backward(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            "the fused operator has no second derivatives, which torch.autograd.functional.jvp "
            f"needs too: use {_UNFUSED}"
        )


# ---- for torch.compile and torch.func ------------------------------------------------------------

_library = torch.library.Library("sj_taid", "FRAGMENT")
_DYNAMICS = (
    "bool decay_input, float? v_reset, bool detach_reset, str surrogate, float a, float b, "
    "int levels"
)


class Operators(NamedTuple):
    """A backend's registered operators as a :class:`~.plan.Plan`, for neurons without a norm.

    Operators cannot return ``None``: what was not asked for is a tensor of no elements.
    """

    forward_operator: Any
    backward_operator: Any
    dynamics: tuple[Any, ...] = ()
    store_v_seq: bool = False
    checkpoints: int = 0

    def forward(
        self, x: Tensor, v0: Any, v_init: float, w: Any, v_threshold: Tensor, numbers: None
    ) -> tuple[Tensor, ...]:
        return self.forward_operator(
            *(x, v0, v_init, w, v_threshold, *self.dynamics, self.store_v_seq, self.checkpoints)
        )

    def backward(
        self, needs: Needs, grad_spike: Any, grad_v: Any, grad_v_seq: Any, *rest: Any
    ) -> tuple[Tensor, ...]:
        x, v0, v_init, w, v_threshold, checkpoint, _ = rest
        grads = grad_spike, grad_v, grad_v_seq if self.store_v_seq else None
        operands = *grads, x, v0, v_init, w, v_threshold, checkpoint
        return self.backward_operator(*operands, *self.dynamics, *needs[:4])


def register(name: str, dispatch_key: str, engine: Engine) -> Operators:
    """Make a backend's plans the operators ``sj_taid::{name}_forward`` and ``{name}_backward``."""

    def plan_of(
        x: Tensor, w: Any, v_threshold: Tensor, dynamics: Any, store_v_seq: bool, saves: bool
    ) -> Plan:
        constants = _dynamics_of(w, dynamics)
        spec = spec_of(x, constants, v_threshold.dim() > 0, store_v_seq=store_v_seq, saves=saves)
        return find_plan(engine, spec)

    def forward(
        x: Tensor, v0: Any, v_init: float, w: Any, v_threshold: Tensor, *options: Any
    ) -> tuple[Tensor, ...]:
        *dynamics, store_v_seq, checkpoints = options
        check_layout(x, steps=(v0,))
        plan = plan_of(x, w, v_threshold, dynamics, store_v_seq, checkpoints > 0)
        outputs = plan.forward(x, v0, v_init, w, v_threshold, None)
        spike_seq, v, v_seq, checkpoint, _ = outputs
        if v_seq is None:
            v_seq = v.new_empty(0)
        if checkpoint is None:
            checkpoint = v.new_empty((0, x[0].numel()))
        return spike_seq, v, v_seq, checkpoint

    def backward(
        grad_spike: Any, grad_v: Any, grad_v_seq: Any, x: Tensor, v0: Any, *rest: Any
    ) -> tuple[Tensor, ...]:
        v_init, w, v_threshold, checkpoint, *dynamics, need_x, need_v0, need_w, need_v = rest
        check_layout(x, (grad_spike, grad_v_seq), (v0, grad_v))
        plan = plan_of(x, w, v_threshold, dynamics, grad_v_seq is not None, True)
        needs = Needs(need_x, need_v0, need_w, need_v, False)
        grads = plan.backward(
            *(needs, grad_spike, grad_v, grad_v_seq, x, v0, v_init, w, v_threshold),
            *(checkpoint, None),
        )
        return tuple(x.new_empty(0) if grad is None else grad for grad in grads[:4])

    neuron = "Tensor x, Tensor? v0, float v_init, Tensor? w, Tensor v_threshold"
    gradients = "Tensor? grad_spike, Tensor? grad_v, Tensor? grad_v_seq"
    needs = "bool need_x, bool need_v0, bool need_w, bool need_v_threshold"
    for what, arguments, function, fake in (
        (
            *("forward", f"{neuron}, {_DYNAMICS}, bool store_v_seq, int checkpoints"),
            *(forward, empty_outputs),
        ),
        (
            *("backward", f"{gradients}, {neuron}, Tensor checkpoint, {_DYNAMICS}, {needs}"),
            *(backward, empty_gradients),
        ),
    ):
        _library.define(f"{name}_{what}({arguments}) -> (Tensor, Tensor, Tensor, Tensor)")
        _library.impl(f"{name}_{what}", function, dispatch_key)
        torch.library.register_fake(f"sj_taid::{name}_{what}", fake, lib=_library)
    operators = torch.ops.sj_taid
    forward_operator, backward_operator = (
        getattr(operators, f"{name}_{what}").default for what in ("forward", "backward")
    )
    return Operators(forward_operator, backward_operator)


def empty_outputs(
    x: Tensor, v0: Any, v_init: float, w: Any, v_threshold: Tensor, *options: Any
) -> tuple[Tensor, ...]:
    """The results of a forward operator, allocated: spikes and voltages in ``x``'s layout.

    The kernels check layouts, not this: Inductor traces it with others, which it restores later.
    """
    *_, store_v_seq, checkpoints = options
    dtype, step = state_dtype(x.dtype), x[0]
    return (
        torch.empty_like(x),
        torch.empty_like(step, dtype=dtype),
        torch.empty_like(x, dtype=dtype) if store_v_seq else x.new_empty(0, dtype=dtype),
        x.new_empty((checkpoints, step.numel()), dtype=dtype),
    )


def empty_gradients(
    grad_spike: Any, grad_v: Any, grad_v_seq: Any, x: Tensor, v0: Any, v_init: float,
    w: Any, v_threshold: Tensor, checkpoint: Tensor, *options: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The results of a backward operator, allocated, in ``x``'s layout."""
    *_, need_x, need_v0, need_w, need_v_threshold = options
    return (
        torch.empty_like(x) if need_x else x.new_empty(0),
        torch.empty_like(x[0], dtype=state_dtype(x.dtype)) if need_v0 else x.new_empty(0),
        torch.empty_like(v_threshold) if need_w else x.new_empty(0),
        torch.empty_like(v_threshold) if need_v_threshold else x.new_empty(0),
    )


def check_layout(
    x_seq: Tensor, sequences: tuple[Tensor | None, ...] = (), steps: tuple[Tensor | None, ...] = ()
) -> None:
    """Raise an error unless the operator's tensors have the layout that kernels rely on."""
    strides = x_seq.stride()
    if not (
        is_dense(x_seq)
        and all(t is None or _has_strides(t, strides) for t in sequences)
        and all(t is None or _has_strides(t, strides[1:]) for t in steps)
    ):
        raise ValueError(
            "a fused operator takes a dense input with time outermost, and voltages and gradients "
            "in its layout; sj_taid.functional.alif_multi_step makes any tensor so"
        )


# ---- calls ---------------------------------------------------------------------------------------


def _dynamics_of(w: Tensor | None, options: Any) -> Dynamics:
    """The dynamics of a call with tensors; ``options``: all others of a :class:`Dynamics`."""
    decay_input, *rest = options
    return Dynamics(math.inf if w is None else None, decay_input, None, *rest)


def spec_of(
    x_seq: Tensor,
    dynamics: Dynamics,
    per_channel: bool,
    norm: bool = False,
    fixed_norm: bool = False,
    store_v_seq: bool = False,
    pack: bool = False,
    saves: bool = False,
) -> Spec:
    """The spec of a dense ``x_seq`` ``[T, N, *]``."""
    steps = len(x_seq)
    neurons = x_seq.numel() // steps
    channels = x_seq.shape[2] if per_channel or norm else 1
    return Spec(
        *(dynamics, x_seq.dtype, x_seq.device, steps, neurons, channels),
        x_seq.stride(2) if channels > 1 else max(neurons, 1),
        *(tuple(x_seq.shape), x_seq.stride(), per_channel, norm, fixed_norm),
        *(store_v_seq, pack, saves),
    )


def multi_step(
    engine: Engine,
    operators: Operators,
    x_seq: Tensor,
    v: Tensor | float,
    w: Tensor | None,
    v_threshold: Tensor,
    *,
    decay_input: bool,
    v_reset: float | None,
    surrogate_function: Any,
    detach_reset: bool,
    store_v_seq: bool,
    norm: Norm | None = None,
    return_bits: bool = False,
) -> tuple[Any, ...]:
    """:func:`sj_taid.ops.alif.reference.multi_step` by a fused engine.

    A dense ``x_seq`` with time outermost is taken in its own layout (contiguous, channels-last);
    any other is made contiguous once.
    """
    dtype, kind = state_dtype(x_seq.dtype), x_seq.dtype
    # What is traced, transformed or no plain tensor takes the registered operators.
    transformed = not _graph.is_eager() or type(x_seq) not in (Tensor, nn.Parameter)
    if transformed and norm is not None:  # torch's own norm, which it compiles and transforms
        x_seq, norm = batch_norm(x_seq.to(dtype), norm), None
    x_seq = x_seq if is_dense(x_seq) else x_seq.contiguous()
    v0 = arranged(v if isinstance(v, Tensor) else None, x_seq.stride()[1:])
    v_threshold = v_threshold.to(dtype)
    if w is not None:
        w = w.to(dtype)
        if w.shape != v_threshold.shape:
            w, v_threshold = torch.broadcast_tensors(w, v_threshold)
        w = w.contiguous()
    weight, bias = (None, None) if norm is None else norm[:2]
    leaves = (x_seq, v0, w, v_threshold.contiguous(), weight, bias)
    _refuse_forward_mode(leaves)
    fires = (*surrogate.derivative_of(surrogate_function), surrogate.levels_of(surrogate_function))
    dynamics = (decay_input, v_reset, detach_reset, *fires)
    v_init: Any = 0.0 if v0 is not None else v
    if transformed:
        checkpoints = engine.checkpoints(len(x_seq), x_seq.dtype) if _saves(leaves) else 0
        operators = operators._replace(
            dynamics=dynamics, store_v_seq=store_v_seq, checkpoints=checkpoints
        )
        results = _run_operators(operators, leaves, v_init, kind)
        return (*results, bits.pack_whole(results[0], fires[-1])) if return_bits else results
    results = _run_plan(engine, leaves, v_init, norm, dynamics, store_v_seq, return_bits)
    return results if return_bits else results[:3]


def _refuse_forward_mode(leaves: tuple[Tensor | None, ...]) -> None:
    if any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in leaves):
        raise NotImplementedError(
            "a fused ALIF backend has no forward-mode derivatives: use reverse mode "
            "(torch.func.vjp, jacrev), or backend='torch' with a surrogate that defines jvp"
        )


def _saves(leaves: tuple[Tensor | None, ...]) -> bool:
    """Whether a backward may follow."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in leaves)


def _run_operators(
    operators: Operators, leaves: tuple[Any, ...], v_init: Any, kind: torch.dtype
) -> tuple[Any, ...]:
    """Spikes of dtype ``kind``, last voltage and every voltage, by the registered operators."""
    arguments = (*leaves, operators, _Strides(leaves[0].stride()), v_init, None, "")
    run = TransformedALIF.apply if _saves(leaves) else TransformedALIF.forward
    spike_seq, v_last, v_seq, _ = run(*arguments)
    return spike_seq.to(kind), v_last, v_seq if operators.store_v_seq else None


def _run_plan(
    engine: Engine, leaves: tuple[Any, ...], v_init: Any, norm: Norm | None,
    dynamics: tuple[Any, ...], store_v_seq: bool, pack: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Spikes, last voltage, every voltage and bits, by the engine's plan."""
    x_seq, v0, w, v_threshold, *_ = leaves
    saves = _saves(leaves)
    is_fixed = norm is not None and norm.fixed
    flags = (norm is not None, is_fixed, store_v_seq, pack, saves)
    spec = spec_of(x_seq, _dynamics_of(w, dynamics), v_threshold.dim() > 0, *flags)
    numbers = None if norm is None else _numbers(engine, norm, x_seq, spec.neurons)
    plan = find_plan(engine, spec)
    if saves:
        return apply_fused(*leaves, plan, spec, v_init, numbers, "")
    spike_seq, v_last, v_seq, _, packed = plan.forward(x_seq, v0, v_init, w, v_threshold, numbers)
    return spike_seq, v_last, v_seq, packed


class _Strides(NamedTuple):
    """The part of a spec that a backward by operators reads."""

    strides: tuple[int, ...]


def _numbers(engine: Engine, norm: Norm, x_seq: Tensor, neurons: int) -> Tensor:
    """A norm's numbers for ``x_seq``; its running statistics are updated."""
    spec = NormSpec(
        *(x_seq.dtype, x_seq.device, x_seq.numel(), x_seq.shape[2]),
        x_seq.stride(2) if x_seq.shape[2] > 1 else neurons,
        *(norm.fixed, norm.momentum, norm.eps),
    )
    tensors = norm.weight, norm.bias, norm.running_mean, norm.running_var
    return cast_numbers(find_norm_plan(engine, spec), x_seq, tensors, None)


@torch.no_grad()
def cast_numbers(plan: NormPlan, x: Tensor, tensors: Any, batches: Tensor | None) -> Tensor:
    """A norm's numbers, where its weight, bias and running statistics have any dtype."""
    floats = [t if t is None else t.float().contiguous() for t in tensors]
    weight, bias, mean, var = floats
    numbers = plan.numbers(x, weight, bias, mean, var, batches)
    for old, new in zip(tensors[2:], (mean, var), strict=True):
        if old is not None and new is not old:
            old.data.copy_(new)
    return numbers


def arranged(tensor: Any, strides: tuple[int, ...]) -> Any:
    """``tensor``, or ``None``, in memory by ``strides``; a copy only where it is not."""
    if tensor is None or tensor.stride() == strides or _has_strides(tensor, strides):
        return tensor
    return tensor.new_empty_strided(tensor.shape, strides).copy_(tensor)


def _has_strides(tensor: Tensor, strides: tuple[int, ...]) -> bool:
    if tensor.stride() == strides:
        return True
    axes = zip(tensor.stride(), strides, tensor.shape, strict=True)
    return all(stride == wanted for stride, wanted, size in axes if size != 1)
