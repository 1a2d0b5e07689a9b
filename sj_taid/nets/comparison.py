"""Comparison of modules with their successors, on the inputs that they get in a net."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import is_dataclass
from numbers import Number
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import _pytree as pytree

from .._internal import compat
from .._internal.context import forked
from ..ops.step.reference import state_dtype
from ..state import reset
from .neurons import Site, copy_net

#: a change of the input, relative, that moves nothing but what lies at a threshold
_NUDGE = 1e-5
#: what counts as a difference, relative to the largest value of the channel, step and so on
_TOLERANCE = 1e-4
#: what rounding may be, relative to the largest value of all
_ROUNDING = 1e-6
#: the same of a sum over all values, relative to its likely size where the terms do not cancel
_ROUNDING_OF_SUMS = 1e-5
#: the share of values that may lie at a threshold
_AT_THRESHOLD = 1e-3
#: attributes of every module or neuron, which are no state of a class's own
_COMMON = {*vars(nn.Module()), "_memories", "_memories_rv"}
_NUMBERS = (Number, np.ndarray)


@torch.inference_mode(False)
@torch.enable_grad()
@compat.quiet_triton()
def compare(net: nn.Module, new_of: Mapping[Site, nn.Module], inputs: Any) -> dict[Site, str]:
    """Compare modules with their successors on what they get in ``net(*inputs)``: notes.

    The inputs and random states stay as they are, and hooks on saved tensors that the caller has
    open see nothing: the innermost ones alone are called.
    """
    trial = copy_net(net)
    calls: dict[Site, list[Any]] = {site: [] for site in new_of}
    for site, found in calls.items():

        def keep(module: Any, args: Any, kwargs: Any, found: list[Any] = found) -> None:
            found.append(_copies((args, kwargs)))

        trial.get_submodule(site.path).register_forward_pre_hook(keep, with_kwargs=True)
    reset(trial)
    with (
        forked(trial.parameters()),
        torch.no_grad(),
        torch.compiler.set_stance("force_eager"),
    ):
        trial(*_copies(inputs))  # compiled code would not call the hooks
    with saved_tensors_hooks(lambda t: t, lambda t: t):
        return {site: _compare_one(site, new, calls[site]) for site, new in new_of.items()}


def _copies(tree: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), tree)


def _compare_one(site: Site, new: nn.Module, calls: list[Any]) -> str:
    """Compare a module with its successor: a note, or an error that names the difference."""
    if not calls:
        return "not reached by the example"
    dtype, names = state_dtype(site.dtype), _parameters_of_both(site.node, new)
    shows, lost = False, set()
    olds = [copy_net(site.node).to(dtype) for _ in range(3)]
    with _noted(site):
        new = copy_net(new).to(dtype)
    own = {part: part.training for module in (*olds, new) for part in module.modules()}
    for mode in ("training", "eval", "mixed")[: 1 + len({*own.values()})]:
        for module in (*olds, new):
            module.train(mode != "eval")
        for part, training in own.items() if mode == "mixed" else ():
            part.training = training
        before = _state(olds[0])
        plain, *nudged = (  # without the old module's hooks, which its successor gets
            _results(old, old.forward, calls, {name: name for name in names}, factor)
            for old, factor in zip(olds, (1.0, 1.0 + _NUDGE, 1.0 - _NUDGE), strict=True)
        )
        with _noted(site):
            found = _differences(plain, nudged, _results(new, new, calls, names))
        shows |= any(
            bool((y != y.flatten()[:1]).any())
            for name, y in plain.items()
            if name.startswith("output") and isinstance(y, Tensor)
        )
        for name, reason in found.items():
            if not name.startswith("state"):
                raise ValueError(
                    f"replace= would change {site.path!r}, a {type(site.node).__name__}: in {mode} "
                    f"mode the {name} {reason}; the net stays as it was"
                )
            if _difference(plain[name], [], before.get(name)):  # the calls changed it
                lost.add(name.removeprefix("state ").partition("[")[0])
    note = "equal on the example" if shows else "not compared: it gives one value on the example"
    return note + (f" but for its {', '.join(sorted(lost))}" if lost else "")


@contextmanager
def _noted(site: Site) -> Iterator[None]:
    """Add to an error of a successor's which module it replaces."""
    try:
        yield
    except Exception as error:
        error.add_note(f"raised by what replace= gives for {site.path!r}, on its input there")
        raise


def _parameters_of_both(old: nn.Module, new: nn.Module) -> dict[str, str]:
    """The parameters that two modules share, or have by one name and value: new names by old."""
    return {
        name: of_new
        for of_new, q in new.named_parameters()
        for name, p in old.named_parameters()
        if p is q or (name == of_new and p.shape == q.shape and torch.equal(p.to(q), q))
    }


def _results(
    module: nn.Module, forward: Any, calls: list[Any], names: Mapping[str, str], factor: float = 1.0
) -> dict[str, Any]:
    """What a net can see of calls in a row, twice and once after a reset, by name.

    These are the outputs, the inputs after the calls, which may have written into them, the
    gradients of inputs and parameters through both, and the module's state at the end.
    """
    leaves: list[Tensor] = []

    def leaf(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x.clone()
        leaves.append(x.detach().to(state_dtype(x.dtype)).requires_grad_())
        return leaves[-1] * factor

    outputs: dict[str, Any] = {}
    inputs: dict[str, Any] = {}
    with forked(pytree.tree_leaves(calls)):  # each run draws the same random numbers
        for n, call in enumerate(calls * 3):
            if n in (0, 2 * len(calls)):
                reset(module)
            args, kwargs = pytree.tree_map_only(Tensor, leaf, call)
            outputs |= _parts(f"output {n + 1}", forward(*args, **kwargs))
            given = args[0] if len(args) == 1 and not kwargs else (*args, *kwargs.values())
            inputs |= _parts(f"input after call {n + 1}", given)
    of = {f"input {n}": x for n, x in enumerate(leaves, 1)}
    of |= {f"parameter {name}": module.get_parameter(own) for name, own in names.items()}
    gradients = _gradients("gradient", outputs, of)
    gradients |= _gradients("gradient through what is written", inputs, of)
    return outputs | inputs | gradients | _state(module)


def _parts(name: str, value: Any) -> dict[str, Any]:
    """The structure of a value, and its leaves by name, numbers as tensors."""

    def open_up(x: Any) -> Any:
        return {type(x).__name__: vars(x)} if is_dataclass(x) else x

    def kind(x: Any) -> str:
        return "Tensor" if isinstance(x, Tensor) else type(x).__name__

    value = pytree.tree_map(open_up, value)
    parts: dict[str, Any] = {f"structure of {name}": f"{pytree.tree_map(kind, value)}"}
    for path, x in pytree.tree_flatten_with_path(value)[0]:
        parts[name + pytree.keystr(path)] = torch.as_tensor(x) if isinstance(x, _NUMBERS) else x
    return parts


def _state(module: nn.Module) -> dict[str, Tensor]:
    """The numbers that a module and its parts hold, by name."""
    found = {}
    for path, part in module.named_modules():
        kept = vars(part) | part._parameters | part._buffers | getattr(part, "_memories", {})
        for name in kept.keys() - _COMMON:
            for n, x in enumerate(pytree.tree_leaves(kept[name])):
                if isinstance(x, (Tensor, *_NUMBERS)):
                    full = f"{path}.{name}".lstrip(".")
                    found[f"state {full}[{n}]"] = torch.as_tensor(x).detach().clone()
    return found


def _gradients(
    name: str, results: Mapping[str, Any], of: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The gradients, by name, of a sum of results in which each value counts differently."""
    found = {f"{name} of {what}": torch.zeros_like(x) for what, x in of.items()}
    asked = {f"{name} of {what}": x for what, x in of.items() if x.requires_grad}
    tensors = [_real(y) for y in results.values() if isinstance(y, Tensor) and y.requires_grad]
    if asked and tensors:
        terms = [
            (y * torch.arange(y.numel(), device=y.device).cos().view(y.shape)).sum()
            for y in tensors
        ]
        grads = torch.autograd.grad(
            terms, [*asked.values()], retain_graph=True, materialize_grads=True
        )
        found |= zip(asked, grads, strict=True)
    return found


def _differences(
    plain: Mapping[str, Any], nudged: Iterable[Mapping[str, Any]], got: Mapping[str, Any]
) -> dict[str, str]:
    """How results differ by more than rounding may change them, by name."""
    terms = [t for name, t in plain.items() if name.startswith("gradient of input") and t.numel()]
    of_sums = max((float(_size(t).max()) for t in terms), default=0.0)
    of_sums *= sum(t.numel() for t in terms) ** 0.5
    found = {
        name: _difference(
            old,
            [run.get(name) for run in nudged],
            got.get(name),
            of_sums if "of parameter" in name else None,
        )
        for name, old in plain.items()
    }
    return {name: reason for name, reason in found.items() if reason}


def _difference(old: Any, nudged: list[Any], got: Any, of_sum: float | None = None) -> str | None:
    """How a result differs by more than rounding may change it, or ``None``.

    A parameter's gradient is a sum, which each value at a threshold moves, and whose terms round
    though they may cancel: ``of_sum`` is the likely size of a sum of all of them.
    """
    if not isinstance(old, Tensor):
        return None if got == old else f"is {got!s:.80}, not {old!s:.80}"
    if _kind(got) != _kind(old):
        return f"is {_kind(got)}, not {_kind(old)}"
    rounds = old.is_floating_point() or old.is_complex()
    others = [t for t in nudged if _kind(t) == _kind(old)]
    old, got, *others = (_real(t.detach()).cpu().double() for t in (old, got, *others))
    if not old.numel():
        return None
    size = _size(old)
    scale = size.max().expand_as(size)
    for axis, n in enumerate(size.shape):
        of_each = size.movedim(axis, 0).reshape(n, -1).amax(1)
        scale = scale.minimum(of_each.view(-1, *[1] * (size.dim() - axis - 1)))
    of_terms = _ROUNDING_OF_SUMS * (of_sum or 0.0) / old.numel() ** 0.5
    rounding = max(_ROUNDING * float(size.max()), of_terms)
    bound = (_TOLERANCE * scale).clamp(min=rounding) * rounds
    if of_sum is not None:
        bound += sum((t - old).abs().nan_to_num() for t in others)

    def differs(t: Tensor) -> Tensor:
        return ~((t == old) | (t.isnan() & old.isnan()) | ((t - old).abs() <= bound))

    wrong = differs(got)
    if wrong.double().mean() <= _AT_THRESHOLD:
        for t in others:
            wrong &= ~differs(t)
    if not wrong.any():
        return None
    error = (got - old).abs().where(wrong, 0.0)
    most, step = error.max(), int(torch.atleast_1d(wrong).nonzero()[0, 0])
    of = scale.flatten()[error.argmax()]
    return f"differs by up to {most:.3g}, of {of:.3g} at most, first at step {step}"


def _kind(x: Any) -> str:
    """What two results must have in common to be compared by their values."""
    if not isinstance(x, Tensor):
        return f"{x!s:.80}"
    return f"{[*x.shape]} of {'floats' if x.is_floating_point() else x.dtype}"


def _size(t: Tensor) -> Tensor:
    return _real(t).nan_to_num(0.0, 0.0, 0.0).abs()


def _real(t: Tensor) -> Tensor:
    return torch.view_as_real(t.resolve_conj()) if t.is_complex() else t
