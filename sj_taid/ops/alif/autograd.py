"""Autograd over a fused forward and backward, shared by the fused backends.

A backend brings an :class:`Engine`, plain functions over flat arguments; :func:`register` makes
them operators that ``torch.compile`` takes into its graph; :func:`multi_step` runs them. The
``autograd.Function`` stays outside the operators: it costs less per call than an autograd formula
registered on them.

Nothing is saved for backward but the input, the parameters, the initial voltage if it is a tensor,
and the engine's checkpoints; the rest is recomputed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ... import _graph
from .. import bits, surrogate
from ..bits import is_dense
from . import norm as norms
from .norm import Affine, Layout, Norm
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


class Engine(NamedTuple):
    """A fused ALIF: functions with the arguments of :class:`Forward` and :class:`Backward`.

    They may rely on this: ``x_seq`` is dense with time outermost, in any order of the other axes;
    ``v0`` and the gradients, where given, have its layout; ``grad_spike_seq`` has its dtype, and
    ``v0``, ``w``, ``v_threshold`` and voltages are in :func:`state_dtype`; ``w`` and
    ``v_threshold`` have one shape, ``[]`` or ``[C]``, and are contiguous. Without ``v0`` every
    neuron starts at ``v_init``.

    Operators cannot return ``None``, so what was not asked for is a tensor of no elements.
    ``grad_parameters`` stacks the gradients of those of ``w`` and ``v_threshold`` that need one.

    With ``norm``, the table of :class:`.norm.Affine`, the neuron runs on ``(x - shift) gain +
    offset``. With ``need_norm`` backward then gives ``norm_sums``. With ``fixed_norm`` its
    ``grad_x_seq`` is that of ``x_seq``, ``gain G_y``. Otherwise :mod:`.norm` makes A and B, ``ab``,
    of the sums alone, and all else comes from a second backward, which is given ``ab``.

    Where ``does_norm``, backward is given the ``kernel_numbers`` of :class:`.norm.Affine` and gives
    ``grad_x_seq`` at once, and as ``norm_sums`` the gradients of bias and weight.
    """

    forward: Callable[..., tuple[Tensor, ...]]
    backward: Callable[..., tuple[Tensor, ...]]
    #: x_seq -> each channel's mean and biased variance, float64 ``[2, C]``
    statistics: Callable[[Tensor], Tensor]
    #: T, dtype -> how many voltages per neuron forward saves for backward's recomputation
    checkpoints: Callable[[int, torch.dtype], int]
    #: whether the backward of such an x_seq can do all of a norm
    does_norm: Callable[[Tensor], bool] = lambda x_seq: False


class Forward(NamedTuple):
    """The arguments of a forward, in the operator's order.

    Its results are spikes, V, every V, checkpoint and bits.
    """

    x_seq: Tensor
    v0: Tensor | None
    v_init: float
    w: Tensor
    v_threshold: Tensor
    decay_input: bool
    v_reset: float | None
    store_v_seq: bool
    checkpoints: int
    norm: Tensor | None = None
    pack: bool = False

    def check_layout(self) -> None:
        check_layout(self.x_seq, steps=(self.v0,))


class Backward(NamedTuple):
    """The arguments of backward, in the operator's order: gradients of x, v0, parameters, sums."""

    grad_spike_seq: Tensor | None
    grad_v: Tensor | None
    grad_v_seq: Tensor | None
    x_seq: Tensor
    v0: Tensor | None
    v_init: float
    w: Tensor
    v_threshold: Tensor
    checkpoint: Tensor
    decay_input: bool
    v_reset: float | None
    detach_reset: bool
    surrogate: str
    a: float
    b: float
    need_x: bool
    need_v0: bool
    need_w: bool
    need_v_threshold: bool
    norm: Tensor | None = None
    need_norm: bool = False
    fixed_norm: bool = False
    ab: Tensor | None = None
    numbers: Tensor | None = None

    def check_layout(self) -> None:
        check_layout(self.x_seq, (self.grad_spike_seq, self.grad_v_seq), (self.v0, self.grad_v))


_library = torch.library.Library("sj_taid", "FRAGMENT")


def register(name: str, dispatch_key: str, engine: Engine) -> Engine:
    """Make ``engine``'s functions the operators ``sj_taid::{name}_forward`` and so on."""
    operators = {}
    for what, arguments, results, fake in (
        ("forward", _schema(Forward), 5, empty_outputs),
        ("backward", _schema(Backward), 4, empty_gradients),
        ("statistics", "Tensor x_seq", 1, empty_statistics),
    ):
        _library.define(f"{name}_{what}({arguments}) -> ({', '.join(['Tensor'] * results)})")
        _library.impl(f"{name}_{what}", getattr(engine, what), dispatch_key)
        torch.library.register_fake(f"sj_taid::{name}_{what}", fake, lib=_library)
        operators[what] = getattr(torch.ops.sj_taid, f"{name}_{what}").default
    return engine._replace(**operators)


def _schema(arguments: Any) -> str:
    """The arguments of an operator, as torch writes them."""
    return ", ".join(
        f"{kind.__forward_arg__.replace(' | None', '?')} {name}"
        + (f"={arguments._field_defaults[name]}" if name in arguments._field_defaults else "")
        for name, kind in arguments.__annotations__.items()
    )


def empty_outputs(*arguments: Any) -> tuple[Tensor, ...]:
    """The results of :class:`Forward`, allocated: spikes and voltages in ``x_seq``'s layout.

    The kernels check layouts, not this: Inductor traces it with others, which it restores later.
    """
    call = Forward(*arguments)
    x_seq, dtype = call.x_seq, state_dtype(call.x_seq.dtype)
    step, room = x_seq[0], x_seq.new_empty
    neurons = step.numel()
    return (
        torch.empty_like(x_seq),
        torch.empty_like(step, dtype=dtype),
        torch.empty_like(x_seq, dtype=dtype) if call.store_v_seq else room(0, dtype=dtype),
        room((call.checkpoints, neurons), dtype=dtype),
        room((call.pack * bits.count_bytes(len(x_seq)), neurons), dtype=torch.uint8),
    )


def empty_gradients(*arguments: Any) -> tuple[Tensor, ...]:
    """The results of :class:`Backward`, allocated, in ``x_seq``'s layout."""
    call = Backward(*arguments)
    x_seq, dtype = call.x_seq, state_dtype(call.x_seq.dtype)
    channels = call.norm.shape[1] if call.norm is not None and call.need_norm else 0
    return (
        torch.empty_like(x_seq) if call.need_x else x_seq.new_empty(0),
        torch.empty_like(x_seq[0], dtype=dtype)
        if call.need_v0
        else x_seq.new_empty(0, dtype=dtype),
        call.w.new_empty((call.need_w + call.need_v_threshold, *call.w.shape)),
        x_seq.new_empty((2, channels), dtype=torch.float64),
    )


def empty_statistics(x_seq: Tensor) -> Tensor:
    """Each channel's mean and variance, allocated."""
    return x_seq.new_empty((2, x_seq.shape[2]), dtype=torch.float64)


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


_UNFUSED = "backend='torch' for ALIF, sj_taid.unaccelerate(net) for an accelerated net"


def _run(*inputs: Any) -> tuple[Tensor, ...]:
    # One parameter: apply looks at each of the signature's at every call.
    x_seq, v0, w, v_threshold, _, _, affine, engine, options, _, layout = inputs
    tensors = {"x_seq": x_seq, "v0": v0, "w": w, "v_threshold": v_threshold, "norm": affine[0]}
    spike_seq, v, v_seq, *rest = engine.forward(*Forward(**tensors, **options))
    if layout is not None:
        spike_seq, v = _laid_out(spike_seq, layout), _laid_out(v, _of_step(layout))
        v_seq = _laid_out(v_seq, layout) if options["store_v_seq"] else v_seq
    return spike_seq, v, v_seq, *rest


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x_seq, v0, w, v_threshold = inputs[:4]
    affine, ctx.engine, options, ctx.options, ctx.layout = inputs[6:]
    ctx.has_v_seq, ctx.form = options["store_v_seq"], (x_seq.shape, x_seq.stride())
    ctx.save_for_backward(x_seq, v0, w, v_threshold, output[3], *affine)
    # An output that nobody used has no gradient to read.
    ctx.set_materialize_grads(False)


class _FusedALIF(torch.autograd.Function):
    """The operator in autograd; ``None`` for outputs that were not asked for, which cost time."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor | None, ...]:
        output = _run(*inputs)
        _save(ctx, inputs, output)
        spike_seq, v, v_seq, _, packed = output
        ctx.mark_non_differentiable(packed)
        packs = inputs[8]["pack"]
        return spike_seq, v, v_seq if ctx.has_v_seq else None, None, packed if packs else None

    @staticmethod
    def backward(
        ctx: Any,
        grad_spike_seq: Tensor | None,
        grad_v: Tensor | None,
        grad_v_seq: Tensor | None,
        *unused: None,
    ) -> tuple[Tensor | None, ...]:
        # Hooks on saved tensors need not keep their layout.
        saved, (_, strides) = _saved_tensors(ctx), ctx.form
        small = (t if t is None else t.contiguous() for t in saved[2:])
        w, v_threshold, checkpoint, table, mean_rstd = small
        x_seq, v0 = arranged(saved[0], strides), arranged(saved[1], strides[1:])
        if ctx.layout is not None:
            form = ctx.form
            grad_spike_seq = _in_order(grad_spike_seq, ctx.layout, form)
            grad_v = _in_order(grad_v, _of_step(ctx.layout), _of_step(form))
            grad_v_seq = _in_order(grad_v_seq, ctx.layout, form) if ctx.has_v_seq else None
        need_x, need_v0, need_w, need_v_threshold, need_weight, need_bias = ctx.needs_input_grad[:6]
        needs_ab = need_x and table is not None and not ctx.options["fixed_norm"]
        affine = None if table is None else Affine(table, mean_rstd)
        does_norm = needs_ab and ctx.engine.does_norm(x_seq)
        # create_graph=True, and torch.func always
        backward = _Backward.apply if torch.is_grad_enabled() else _Backward.forward
        call = Backward(
            grad_spike_seq=arranged(grad_spike_seq, strides),
            grad_v=arranged(grad_v, strides[1:]),
            grad_v_seq=arranged(grad_v_seq, strides) if ctx.has_v_seq else None,
            x_seq=x_seq,
            v0=v0,
            w=w,
            v_threshold=v_threshold,
            checkpoint=checkpoint,
            need_x=need_x,
            need_v0=need_v0,
            need_w=need_w,
            need_v_threshold=need_v_threshold,
            norm=table,
            need_norm=table is not None,
            numbers=affine.kernel_numbers(x_seq) if affine and does_norm else None,
            **ctx.options,
        )
        sums = None
        if affine and needs_ab and not does_norm:
            # The norm's sums first, then all that depends on them or can wait.
            first = call._replace(need_x=False, need_v0=False, need_w=False, need_v_threshold=False)
            *_, sums = backward(ctx.engine, *first)
            ab = norms.mean_terms(affine, sums, x_seq)
            call = call._replace(ab=ab, need_norm=False)
        grad_x_seq, grad_v0, grad_parameters, norm_sums = backward(ctx.engine, *call)
        grad_weight = grad_bias = None
        if does_norm:
            grad_bias, grad_weight = norm_sums.float().unbind()
        elif affine:
            grad_weight, grad_bias = norms.gradients(affine, norm_sums if sums is None else sums)
        parameters = grad_parameters.unbind()
        return (
            grad_x_seq if need_x else None,
            grad_v0 if need_v0 else None,
            parameters[0] if need_w else None,
            parameters[-1] if need_v_threshold else None,
            grad_weight if need_weight else None,
            grad_bias if need_bias else None,
            *[None] * 5,
        )


def _saved_tensors(ctx: Any) -> tuple[Tensor, ...]:
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        if "inplace operation" not in str(error):
            raise
        name = ctx.metadata.get("neuron")
        raise RuntimeError(
            f"{f'the neuron {name!r}' if name else 'an ALIF neuron'} reads its input, voltage "
            "and parameters again in its backward, but one was changed in place since its "
            "forward: write h = h + o instead of h += o, change parameters after the backward, "
            f"or use what does not read the input again: {_UNFUSED}"
        ) from error


class _TransformedALIF(_FusedALIF):
    """The same for torch.func and torch.compile, which ask for forward and context apart.

    That takes apply twice the time.
    """

    generate_vmap_rule = True
    forward = staticmethod(_run)  # type: ignore[assignment]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _save(ctx, inputs, output)
        ctx.mark_non_differentiable(*output[3:])


class _Backward(torch.autograd.Function):
    """The backward as a function of all it reads, so that a second derivative raises an error.

    ``once_differentiable`` looks at the incoming gradients alone.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(engine: Engine, *arguments: Any) -> tuple[Tensor, ...]:
        return engine.backward(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            "the fused operator has no second derivatives, which torch.autograd.functional.jvp "
            f"needs too: use {_UNFUSED}"
        )


def multi_step(
    engine: Engine,
    x_seq: Tensor,
    v: Tensor | float,
    w: Tensor,
    v_threshold: Tensor,
    *,
    decay_input: bool,
    v_reset: float | None,
    surrogate_function: Any,
    detach_reset: bool,
    store_v_seq: bool,
    norm: Norm | None = None,
    return_bits: bool = False,
    layout: Layout | None = None,
) -> tuple[Any, ...]:
    """:func:`sj_taid.ops.alif.reference.multi_step` by a fused engine.

    A dense ``x_seq`` with time outermost is taken in its own layout (contiguous, channels-last);
    any other is made contiguous once. Voltages and results have the ``layout``, if there is one.
    """
    x_seq = x_seq if is_dense(x_seq) else x_seq.contiguous()
    dtype = state_dtype(x_seq.dtype)
    v0 = v if isinstance(v, Tensor) else None
    if layout is not None:
        v0 = _in_order(v0, _of_step(layout), _of_step((x_seq.shape, x_seq.stride())))
    v0 = arranged(v0, x_seq.stride()[1:])
    w, v_threshold = w.to(dtype), v_threshold.to(dtype)
    if w.shape != v_threshold.shape:
        w, v_threshold = torch.broadcast_tensors(w, v_threshold)
    w, v_threshold = w.contiguous(), v_threshold.contiguous()
    leaves = (x_seq, v0, w, v_threshold, *((None, None) if norm is None else norm[:2]))
    if any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in leaves):
        raise NotImplementedError(
            "a fused ALIF backend has no forward-mode derivatives: use reverse mode "
            "(torch.func.vjp, jacrev), or backend='torch' with a surrogate that defines jvp"
        )
    name, a, b = surrogate.derivative_of(surrogate_function)
    saves = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in leaves)
    neuron: dict[str, Any] = {
        "v_init": 0.0 if isinstance(v, Tensor) else v,
        "decay_input": decay_input,
        "v_reset": v_reset,
    }
    forward = neuron | {
        "store_v_seq": store_v_seq,
        "checkpoints": engine.checkpoints(x_seq.shape[0], x_seq.dtype) if saves else 0,
        "pack": return_bits,
    }
    backward = neuron | {
        "detach_reset": detach_reset,
        "surrogate": name,
        "a": a,
        "b": b,
        "fixed_norm": norm is not None and norm.fixed,
    }
    affine: Affine | tuple[None, None] = (None, None)
    if norm is not None:
        affine = norm.affine or norms.affine(norm, x_seq, engine.statistics)
    run = _run
    if saves:
        transformed = torch.compiler.is_compiling() or _graph.is_transformed()
        run = (_TransformedALIF if transformed else _FusedALIF).apply
    rest = (affine, engine, forward, backward, layout)
    spike_seq, v_last, v_seq, _, packed = run(*leaves, *rest)
    results = (spike_seq, v_last, v_seq if store_v_seq else None)
    return (*results, packed) if return_bits else results


def _of_step(layout: Layout) -> Layout:
    """The layout of one step of a sequence."""
    shape, strides = layout
    return shape[1:], strides[1:]


def _laid_out(tensor: Tensor, layout: Layout) -> Tensor:
    """The tensor in a layout of its memory; no view, which autograd would not let change."""
    return tensor.new_empty(0).set_(tensor.untyped_storage(), 0, *layout)


def _in_order(tensor: Any, layout: Layout, form: Layout) -> Any:
    """View ``tensor`` of ``layout``, or ``None``, as ``form``: a layout of the same memory."""
    return None if tensor is None else arranged(tensor, layout[1]).as_strided(*form)


def arranged(tensor: Any, strides: tuple[int, ...]) -> Any:
    """``tensor``, or ``None``, in memory by ``strides``; a copy only where it is not."""
    if tensor is None or _has_strides(tensor, strides):
        return tensor
    return tensor.new_empty_strided(tensor.shape, strides).copy_(tensor)


def _has_strides(tensor: Tensor, strides: tuple[int, ...]) -> bool:
    if tensor.stride() == strides:
        return True
    axes = zip(tensor.stride(), strides, tensor.shape, strict=True)
    return all(stride == wanted for stride, wanted, size in axes if size != 1)
