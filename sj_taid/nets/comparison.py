"""Comparison of modules with their successors, on the inputs that they get in a net."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves, tree_map_only

from .._internal import compat
from .._internal.context import forked
from ..ops.alif.reference import state_dtype
from ..state import reset
from .neurons import Site, copy_net

#: a change of the input, relative, that moves nothing but what lies at a threshold
_NUDGE = 1e-5
#: what counts as a difference, relative to the largest value
_TOLERANCE = 1e-4
#: the share of values that may lie at a threshold
_AT_THRESHOLD = 1e-3


@torch.inference_mode(False)
@torch.enable_grad()
@compat.quiet_triton()
def compare(net: nn.Module, new_of: Mapping[Site, nn.Module], inputs: Any) -> dict[Site, str]:
    """Compare modules with their successors on what they get in ``net(*inputs)``: notes.

    The random state stays as it is, and hooks on saved tensors that the caller has open see
    nothing: the innermost ones alone are called.
    """
    trial = copy_net(net)
    calls: dict[Site, list[Any]] = {site: [] for site in new_of}
    for site, found in calls.items():

        def keep(module: Any, args: Any, kwargs: Any, found: list[Any] = found) -> None:
            found.append(tree_map_only(Tensor, lambda t: t.detach().clone(), (args, kwargs)))

        trial.get_submodule(site.path).register_forward_pre_hook(keep, with_kwargs=True)
    reset(trial)
    with (
        forked(trial.parameters()),
        torch.no_grad(),
        torch.compiler.set_stance("force_eager"),
    ):
        trial(*inputs)  # compiled code would not call the hooks
    with saved_tensors_hooks(lambda t: t, lambda t: t):
        return {site: _compare_one(site, new, calls[site]) for site, new in new_of.items()}


def _compare_one(site: Site, new: nn.Module, calls: list[Any]) -> str:
    """Compare a module with its successor: a note, or an error that names the difference."""
    if not calls:
        return "not reached by the example"
    dtype, shows = state_dtype(site.dtype), False
    olds = [copy_net(site.node).to(dtype) for _ in range(3)]
    new = copy_net(new).to(dtype)
    for mode in ("training", "eval"):
        for module in (*olds, new):
            module.train(mode == "training")
        plain, *nudged = (  # without the old module's hooks, which its successor gets
            _results(old, old.forward, calls, factor)
            for old, factor in zip(olds, (1.0, 1.0 + _NUDGE, 1.0 - _NUDGE), strict=True)
        )
        try:
            got = _results(new, new, calls)
        except Exception as error:
            error.add_note(f"raised by what replace= gives for {site.path!r}, on its input there")
            raise
        for name, old in plain.items():
            shows |= name.startswith("output") and bool((old != old.flatten()[:1]).any())
            if reason := _difference(old, [others[name] for others in nudged], got.get(name)):
                raise ValueError(
                    f"replace= would change {site.path!r}, a {type(site.node).__name__}: in {mode} "
                    f"mode the {name} {reason}; the net stays as it was"
                )
    return "equal on the example" if shows else "not compared: it gives one value on the example"


def _results(
    module: nn.Module, forward: Any, calls: list[Any], factor: float = 1.0
) -> dict[str, Tensor]:
    """Outputs and gradients of the inputs of calls in a row, twice and once after a reset."""
    leaves: list[Tensor] = []
    outputs: list[Tensor] = []

    def leaf(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        leaves.append(x.detach().to(state_dtype(x.dtype)).requires_grad_())
        return leaves[-1] * factor

    with forked(tree_leaves(calls)):  # each run draws the same random numbers
        for repeat in range(3):
            if repeat != 1:
                reset(module)
            for call in calls:
                args, kwargs = tree_map_only(Tensor, leaf, call)
                found = [y for y in tree_leaves(forward(*args, **kwargs)) if isinstance(y, Tensor)]
                outputs += filter(Tensor.is_floating_point, found)
    terms = [
        (y * torch.arange(y.numel(), device=y.device).cos().view(y.shape)).sum()
        for y in outputs
        if y.requires_grad
    ]
    terms += [0.0 * x.sum() for x in leaves]  # the gradient where there is none
    grads = torch.autograd.grad(terms, leaves) if leaves else ()
    named = {f"output {n}": y.detach() for n, y in enumerate(outputs, 1)}
    return named | {f"gradient of input {n}": grad for n, grad in enumerate(grads, 1)}


def _difference(old: Tensor, nudged: list[Tensor], got: Tensor | None) -> str | None:
    """How a result differs from the old one by more than rounding may change it, or ``None``."""
    if got is None or got.shape != old.shape:
        return f"has the shape {got if got is None else [*got.shape]}, not {[*old.shape]}"
    scale = float(old.nan_to_num(0.0, 0.0, 0.0).abs().max()) if old.numel() else 0.0

    def differs(other: Tensor) -> Tensor:
        return ~torch.isclose(other, old, rtol=0.0, atol=_TOLERANCE * scale, equal_nan=True)

    wrong = differs(got)
    if wrong.float().mean() <= _AT_THRESHOLD:
        wrong &= ~(differs(nudged[0]) | differs(nudged[1]))
    if not wrong.any():
        return None
    most, step = (got - old).abs()[wrong].max(), int(torch.atleast_1d(wrong).nonzero()[0, 0])
    return f"differs by up to {most:.3g}, of {scale:.3g} at most, first at step {step}"
