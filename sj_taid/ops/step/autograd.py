"""Autograd over a backend's plans.

Nothing is saved for backward but the input, the parameters, the initial voltage if it is a tensor,
a norm's mean and rstd, and the plan's checkpoints; the rest is recomputed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._internal import graph
from .plan import arranged


def unsupported(device: str, dtypes: tuple[torch.dtype, ...], x_seq: Tensor) -> str | None:
    """Why a fused operator of a device and of these dtypes cannot take the input, or ``None``."""
    if x_seq.device.type != device:
        return f"the input is on {x_seq.device}, expected on {device}; move it: x.to({device!r})"
    if x_seq.dtype not in dtypes:
        return (
            f"the input is {x_seq.dtype}, expected one of {', '.join(map(str, dtypes))}; "
            "convert it, or use backend='torch'"
        )
    return None


_UNFUSED = "backend='torch' for ALIF, sj_taid.unaccelerate(net) for an accelerated net"


class FusedNeuronFunction(torch.autograd.Function):
    """A call of a plan in autograd; ``None`` for outputs that were not asked for, which cost time.

    ``apply`` is given the plan, ``v_init``, what errors call the neuron, and the plan's operands.
    It gives spikes, last voltage, every voltage, and bits.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor | None, ...]:
        # One parameter: apply looks at each of the signature's at every call.
        plan, v_init, name, *operands = inputs
        if operands[-4] is not None:  # there is a norm
            operands[-2:] = map(_plain, operands[-2:])
        *outputs, checkpoint, packed = plan.forward(v_init, *operands)
        ctx.call = plan, v_init, operands[0].stride(), name
        ctx.save_for_backward(checkpoint, *operands)
        # An output that nobody used has no gradient to read.
        ctx.set_materialize_grads(False)
        if packed is not None:
            ctx.mark_non_differentiable(packed)
        return *outputs, packed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        plan, v_init, strides, name = ctx.call
        checkpoint, *operands = _saved_tensors(ctx, name)
        *needs, _, _, need_weight, need_bias = ctx.needs_input_grad[3:]
        arguments = (*needs, need_weight or need_bias), v_init, strides, *grads[:-1]
        is_seen = torch.is_grad_enabled() or graph.is_transformed()
        run: Any = _Backward.apply if is_seen else _Backward.forward
        *found, grad_weight, grad_bias = run(plan, *arguments, checkpoint, *operands)
        # A plan computes both or none, and a missing input of autograd's must get none.
        of_norm = grad_weight if need_weight else None, grad_bias if need_bias else None
        return None, None, None, *found, None, None, *of_norm


apply_fused = graph.apply_of(FusedNeuronFunction)


def _plain(parameter: Tensor | None) -> Tensor | None:
    """A norm's parameter as a plan takes it: float32 and contiguous."""
    if parameter is None or (parameter.dtype == torch.float32 and parameter.is_contiguous()):
        return parameter
    return parameter.float().contiguous()


def _saved_tensors(ctx: Any, name: str) -> tuple[Tensor, ...]:
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        if "inplace operation" not in str(error):
            raise
        raise RuntimeError(
            f"the neuron{f' {name!r}' if name else ''} reads its input, voltage "
            "and parameters again in its backward, but one was changed in place since its "
            "forward: write h = h + o instead of h += o, change parameters after the backward, "
            f"or use what does not read the input again: {_UNFUSED}"
        ) from error


class _Backward(torch.autograd.Function):
    """The backward as a function of all it reads, so that a second derivative raises an error.

    ``once_differentiable`` looks at the incoming gradients alone.
    """

    @staticmethod
    def forward(
        plan: Any, needs: Any, v_init: Any, strides: Any, *tensors: Any
    ) -> tuple[Tensor | None, ...]:
        # Hooks on saved tensors need not keep their layout.
        last = 1 + len(plan.states)  # of the gradients of the next states
        upstream, operands = [*tensors[: last + 2]], [*tensors[last + 2 :]]
        order, step = plan.spec.strides, plan.spec.strides[1:]
        try:
            for k in (0, last):
                upstream[k] = arranged(upstream[k], order)
            if upstream[-1] is not None:
                upstream[-1] = upstream[-1].contiguous()
            operands[0] = arranged(operands[0], strides)
            for k in range(1, last):
                upstream[k], operands[k] = arranged(upstream[k], step), arranged(operands[k], step)
            return plan.backward(needs, v_init, tuple(upstream), tuple(operands))
        except RuntimeError:  # a batch has no memory
            if not any(graph.is_batched(t) for t in tensors[: last + 1] if t is not None):
                raise
        return graph.map_batch(_Backward.vmap, (plan, needs, v_init, strides, *tensors))

    @staticmethod
    def vmap(info: Any, axes: Any, *arguments: Any) -> tuple[Any, Any]:
        """The gradients of each of a batch that ``torch.func.vmap`` maps over, one by one."""
        pairs = [*zip(arguments, axes, strict=True)]
        batch = [
            _Backward.apply(
                *(a.select(axis, i) if isinstance(axis, int) else a for a, axis in pairs)
            )
            for i in range(info.batch_size)
        ]
        grads = [None if one[0] is None else torch.stack(one) for one in zip(*batch, strict=True)]
        return tuple(grads), tuple(None if grad is None else 0 for grad in grads)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            "the fused operator has no second derivatives, which torch.autograd.functional.jvp "
            f"needs too: use {_UNFUSED}"
        )
