"""Conversion of SpikingJelly's neurons to ALIF and back, and of a net's own classes."""

import math
import operator
import warnings
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any, Literal

import torch
from spikingjelly.activation_based import neuron
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._pytree import tree_leaves, tree_map_only

from . import _compat
from ._fused_neuron import restore
from .neuron import ALIFNode
from .neurons import (
    NO_LEAK_W,
    Site,
    as_inputs,
    check_net,
    copy_net,
    describe_equality,
    describe_single_steps,
    find_neurons,
    nearest_w,
    need_neurons,
    why_no_alif,
    why_silent,
)
from .ops import backends
from .ops.alif.reference import state_dtype
from .ops.surrogate import counts
from .report import Report, table_of
from .state import name_neurons, reset
from .thresholds import warn_at_reset

#: Beginnings of the names under which torch keeps a module's hooks.
_HOOKS = ("_forward", "_backward", "_is_full_backward")


#: a change of the input, relative, that moves nothing but what lies at a threshold
_NUDGE = 1e-5
#: what counts as a difference, relative to the largest value
_TOLERANCE = 1e-4
#: the share of values that may lie at a threshold
_AT_THRESHOLD = 1e-3


def swap_neurons(
    net: nn.Module,
    *,
    replace: Mapping[type, Callable[[Any], nn.Module]] | None = None,
    example: Any = None,
    learn_tau: bool = True,
    learn_threshold: bool = True,
    min_v_threshold: float | Literal["auto"] | None = "auto",
    filter: Callable[[str, nn.Module], bool] | None = None,
    backend: str = backends.AUTO,
) -> Report:
    r"""Replace the LIF, PLIF, IF and integer LIF nodes of ``net`` by ALIF, in place.

    Each neuron keeps its options, voltage and hooks, and PLIF its parameter ``w``, unless it is in
    half precision. Make the optimiser after: thresholds are new parameters. The outputs are bit for
    bit equal for PLIF (without ``decay_input`` on 2.x only), for IF, for LIF with a tau of 2, 4, 8
    or 16, and for integer LIF with one of these or 4/3, its default; else equal to rounding, as LIF
    divides by tau and ALIF multiplies by :math:`\mathrm{sigmoid}(w)`.

    IF has no leak: it becomes an ALIF without input decay whose :math:`1/\tau` is 0. No gradient
    leads away from there, so its ``w`` is frozen and only its threshold learns.

    The report says which neurons are kept and why: neurons of other kinds, or that ALIF cannot
    express. A module is exchanged wherever it stands: in modules, and in lists, tuples and dicts
    that are their attributes. A neuron that only such a list holds is not seen: use
    ``nn.ModuleList``.

    Args:
        net: any module with SpikingJelly neurons, or of the classes in ``replace``.
        replace: classes of the net's own, or of SpikingJelly, and for each a function of a module
            of exactly this class that gives its successor, or the module itself to keep it. The
            successor gets the device, the dtype, the mode and the hooks.
        example: an input of ``net`` (a tuple for several). Each module of ``replace`` is compared
            with its successor on the input that it gets there, in training and in eval mode, twice
            in a row and once after a reset: outputs and the gradient of the input. What rounding
            moves across a threshold is no difference, if it is rare.
        learn_tau: whether ``w`` receives a gradient; a frozen PLIF ``w`` stays frozen.
        learn_threshold: whether ``v_threshold`` receives a gradient.
        min_v_threshold: lower bound of the learned thresholds. ``"auto"`` is 1 % of the way from
            the reset voltage (0 for a soft reset) to the threshold, since at the reset a neuron
            fires at every step, without input; ``None`` leaves them free (the paper).
        filter: ``filter(path, node)`` says whether to swap a neuron of SpikingJelly's.
        backend: one of :func:`sj_taid.ops.backends.names`.

    Raises:
        ValueError: no neuron or no module of a class in ``replace``, a value that ALIF cannot
            take, or a successor that computes something else; the net stays.
        TypeError: a function of ``replace`` gives no module, or ``example`` is no input.

    >>> net = nn.Sequential(nn.Linear(4, 3), neuron.LIFNode(tau=2.0, step_mode="m"))
    >>> print(swap_neurons(net))
    1 swapped, 0 left alone
    layer  kind     done  note
    1      LIFNode  ALIF  equal outputs, v_threshold >= 0.01

    A class of the net's own that gives counts:

    >>> class Count(nn.Module):
    ...     def forward(self, x):
    ...         y = x.clamp(0, 4)
    ...         return y + (y.round() - y).detach()
    >>> net = nn.Sequential(nn.Linear(4, 3), Count())
    >>> count = lambda old: ALIFNode(levels=4, init_tau=None, learn_threshold=False)
    >>> print(swap_neurons(net, replace={Count: count}, example=torch.randn(8, 4)))
    1 swapped, 0 left alone
    layer  kind   done  note
    1      Count  ALIF  by replace=, equal on the example
    """
    replace = replace or {}
    if example is not None and not replace:
        raise ValueError("example= compares the modules that replace= names, but it names none")
    options: dict[str, Any] = {
        "learn_tau": learn_tau,
        "learn_threshold": learn_threshold,
        "min_v_threshold": min_v_threshold,
        "backend": backend,
    }
    sites = need_neurons(net, "swap", replace)
    new_of: dict[Site, Any] = {}
    notes: dict[Site, str] = {}
    for site in sites:
        if type(site.node) in replace and site.path:
            notes[site] = "kept by replace="
            new = _successor(site, replace[type(site.node)], new_of.values())
            if new is not site.node:
                new_of[site], notes[site] = new, "by replace="
        elif (reason := _why_keep(site, filter)) is not None:
            notes[site] = reason
        else:
            try:
                new_of[site] = _to_alif(site, **options)
            except ValueError as error:
                raise ValueError(f"the neuron {site.path!r}: {error}") from error
            notes[site] = _describe_swap(site, new_of[site])
    if example is not None:
        own = {site: new for site, new in new_of.items() if type(site.node) in replace}
        for site, note in _compare(net, own, as_inputs(example)).items():
            notes[site] += f", {note}"
    for site, new in new_of.items():  # after the last error, as the two share w
        if isinstance(site.node, neuron.ParametricLIFNode) and type(site.node) not in replace:
            new.w.requires_grad_(learn_tau and site.node.w.requires_grad)
    _replace(net, {site.node: new for site, new in new_of.items()})
    name_neurons(net)
    _compat.forget_reset_cache()
    rows = tuple(site.row(_label(new_of.get(site)), notes[site]) for site in sites)
    return Report(rows, describe_single_steps(sites))


def _label(new: nn.Module | None) -> str:
    """What a report calls a successor."""
    if new is None:
        return ""
    return "ALIF" if isinstance(new, ALIFNode) else type(new).__name__


def _successor(site: Site, function: Callable[[Any], Any], others: Collection[Any]) -> nn.Module:
    """What a function of ``replace`` gives for a module."""
    new = function(site.node)
    if not isinstance(new, nn.Module) or new in others:
        raise TypeError(
            f"replace= must give a module of its own for each {type(site.node).__name__}, but for "
            f"{site.path!r} it gave {new!r:.80}"
        )
    return new if new is site.node else new.to(site.device, site.dtype)


@torch.inference_mode(False)
@torch.enable_grad()
@_compat.quiet_triton()
def _compare(net: nn.Module, new_of: Mapping[Site, nn.Module], inputs: Any) -> dict[Site, str]:
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
    devices = {tensor.device for tensor in trial.parameters() if tensor.is_cuda}
    fork = partial(torch.random.fork_rng, devices)
    with fork(), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        trial(*inputs)  # compiled code would not call the hooks
    with saved_tensors_hooks(lambda t: t, lambda t: t):
        return {site: _compare_one(site, new, calls[site], fork) for site, new in new_of.items()}


def _compare_one(site: Site, new: nn.Module, calls: list[Any], fork: Any) -> str:
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
            _results(old, old.forward, calls, fork, factor)
            for old, factor in zip(olds, (1.0, 1.0 + _NUDGE, 1.0 - _NUDGE), strict=True)
        )
        try:
            got = _results(new, new, calls, fork)
        except Exception as error:
            error.add_note(f"raised by what replace= gives for {site.path!r}, on its input there")
            raise
        for name, old in plain.items():
            shows |= name.startswith("output") and old.unique().numel() > 1
            if reason := _difference(old, [others[name] for others in nudged], got.get(name)):
                raise ValueError(
                    f"replace= would change {site.path!r}, a {type(site.node).__name__}: in {mode} "
                    f"mode the {name} {reason}; the net stays as it was"
                )
    return "equal on the example" if shows else "not compared: it gives one value on the example"


def _results(
    module: nn.Module, forward: Any, calls: list[Any], fork: Any, factor: float = 1.0
) -> dict[str, Tensor]:
    """Outputs and gradients of the inputs of calls in a row, twice and once after a reset."""
    leaves: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def leaf(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        name = f"gradient of input {len(leaves) + 1}"
        leaves[name] = x.detach().to(state_dtype(x.dtype)).requires_grad_()
        return leaves[name] * factor

    with fork():  # so that each run draws the same random numbers
        for repeat in range(3):
            if repeat != 1:
                reset(module)
            for call in calls:
                args, kwargs = tree_map_only(Tensor, leaf, call)
                for y in tree_leaves(forward(*args, **kwargs)):
                    if isinstance(y, Tensor) and y.is_floating_point():
                        outputs[f"output {len(outputs) + 1}"] = y
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    terms = [(y * draw(y.shape).to(y)).sum() for y in outputs.values() if y.requires_grad]
    terms += [0.0 * x.sum() for x in leaves.values()]  # the gradient where there is none
    grads = torch.autograd.grad(terms, [*leaves.values()]) if leaves else ()
    return {n: y.detach() for n, y in outputs.items()} | dict(zip(leaves, grads, strict=True))


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


def to_lif(net: nn.Module, *, strict: bool = True) -> nn.Module:
    r"""A copy of ``net`` with plain ``LIFNode`` s of the learned tau and threshold.

    It is for SpikingJelly's NIR export, counters, energy estimates and kernels. The outputs are
    equal bit for bit where tau is a power of two, and otherwise to rounding (LIF divides by tau).
    An ALIF without leak becomes an ``IFNode``, one that counts an ``ILIFNode``. All channels must
    have one tau and one threshold. Warns of thresholds at or below the reset voltage, where a
    neuron fires without input.

    A ``LIFNode`` keeps tau and threshold as plain numbers, which its ``state_dict`` does not have:
    save the ``state_dict`` of ``net``, and call this after loading it.

    Args:
        net: any module with :class:`~sj_taid.ALIFNode` s; it is not changed.
        strict: raise if a neuron is not expressible; otherwise warn and leave it as ALIF.

    Raises:
        ValueError: a neuron is not expressible and ``strict``, or was parametrized after
            :func:`.accelerate`; the message says which and why.

    >>> to_lif(nn.Sequential(ALIFNode(init_tau=2.0, v_threshold=0.5)))[0].v_threshold
    0.5
    """
    check_net(net)
    copied = copy_net(net)
    restore(copied)
    refused = []
    new_of: dict[nn.Module, nn.Module] = {}
    for site in find_neurons(copied, ALIFNode):
        reason = _why_no_lif(site)
        if reason is None:
            new_of[site.node] = _to_lif(site.node)
        else:
            refused.append(site.row("", reason))
    if refused:
        message = f"LIFNode cannot express {len(refused)} of the neurons:\n{table_of(refused)}"
        if strict:
            raise ValueError(f"{message}\nstrict=False leaves them as they are")
        warnings.warn(message, stacklevel=2)
    _replace(copied, new_of)
    plain = new_of.get(copied, copied)  # a net may be one neuron
    warn_at_reset(dict(plain.named_modules()))
    return plain


def _replace(net: nn.Module, new_of: Mapping[nn.Module, nn.Module]) -> None:
    """Replace neurons of ``net`` by others, which take over their hooks."""
    for old, new in new_of.items():
        new.train(old.training)
        for name, none in vars(nn.Module()).items():
            if name.startswith(_HOOKS):
                # The old dictionaries themselves, so that handles to remove a hook still work.
                hooks = getattr(old, name)
                if isinstance(hooks, dict):
                    hooks.update(getattr(new, name))
                vars(new)[name], vars(old)[name] = hooks, none
        if old not in new.modules():
            old.register_forward_pre_hook(_warn_replaced)
    for parent in [*net.modules()]:
        for name, value in vars(parent).items():
            vars(parent)[name] = _exchange_in(value, new_of)


def _exchange_in(value: Any, new_of: Mapping[nn.Module, nn.Module]) -> Any:
    """An attribute with its modules exchanged: a list or dict in place, else a new one."""
    if isinstance(value, nn.Module):
        return new_of.get(value, value)
    if isinstance(value, dict):
        value.update({key: _exchange_in(item, new_of) for key, item in value.items()})
    elif isinstance(value, list | tuple):
        items = [_exchange_in(item, new_of) for item in value]
        if all(map(operator.is_, items, value)):
            return value
        if isinstance(value, tuple):
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        value[:] = items
    return value


def _warn_replaced(module: nn.Module, inputs: Any) -> None:
    warnings.warn(
        f"a {type(module).__name__} runs that swap_neurons or to_lif has replaced: a closure or "
        "an object that is no module still holds it; make it an attribute of a module",
        stacklevel=5,
    )


def _why_keep(site: Site, filter: Callable[[str, nn.Module], bool] | None) -> str | None:
    """Why a neuron is not swapped, or ``None``."""
    node = site.node
    if isinstance(node, ALIFNode):
        return f"already ALIF; its backend stays {node.backend}: node.backend = ... chooses one"
    if not site.path:
        return "it is the net itself; put it in a module: nn.Sequential(net)"
    if _compat.plain_kind(node) and filter is not None and not filter(site.path, node):
        return "declined by filter"
    if is_parametrized(node):
        return "it is parametrized"
    if names := _compat.added_methods(node):
        return f"a subclass that adds {', '.join(sorted(names))}, which ALIF lacks"
    return why_no_alif(node) or why_silent(node)


def _why_no_lif(site: Site) -> str | None:
    """Why a LIF node cannot express an ALIF, or ``None``."""
    node = site.node
    if node.w is None or node.normalize:
        return "it has no state" if node.w is None else "it divides its counts"
    taus, thresholds = node.tau.unique().tolist(), node.effective_v_threshold.unique().tolist()
    if type(node) is not ALIFNode:
        return "a subclass of ALIFNode, whose own behaviour LIF would lose"
    if any(math.isnan(value) for value in (*taus, *thresholds)):
        return "its tau or threshold is nan: its training diverged, take an earlier checkpoint"
    if len(taus) > 1 or len(thresholds) > 1:
        return f"its channels have {len(taus)} taus and {len(thresholds)} thresholds; LIF has one"
    if taus[0] == 1.0:
        return "its tau is 1 to float32's precision; LIF needs more"
    if taus[0] == math.inf and node.decay_input:
        return "its tau is infinite, so that its input has no effect"
    if counts(node.surrogate_function):
        return _why_no_integer_lif(node, taus[0])
    return None


def _why_no_integer_lif(node: ALIFNode, tau: float) -> str | None:
    """Why an integer LIF cannot express an ALIF that counts, or ``None``."""
    if not _compat.INTEGER_LIF:
        return "it counts, and SpikingJelly 0.0.0.0.14 has no ILIFNode"
    return "it counts, and an ILIFNode has a finite tau" if tau == math.inf else None


def _describe_swap(site: Site, alif: Any) -> str:
    """How equal the outputs are, and what of ``alif`` does not learn freely."""
    note = describe_equality(site)
    if isinstance(site.node, neuron.IFNode):
        note += ", w frozen: no leak"
    if alif.min_v_threshold is not None:
        note += f", v_threshold >= {alif.min_v_threshold:g}"
    return note


def _to_alif(site: Site, learn_tau: bool, **options: Any) -> ALIFNode:
    node = site.node
    if options["min_v_threshold"] == "auto":
        rest = node.v_reset or 0.0
        can_fall = options["learn_threshold"] and node.v_threshold > rest
        options["min_v_threshold"] = rest + 0.01 * (node.v_threshold - rest) if can_fall else None
    alif: Any = ALIFNode(
        decay_input=bool(getattr(node, "decay_input", False)),  # IF does not scale its input
        v_threshold=node.v_threshold,
        learn_tau=learn_tau,
        **_shared_options(node),
        **options,
    )
    alif.to(site.device, state_dtype(site.dtype)).v_threshold.data.fill_(node.v_threshold)
    if isinstance(node, neuron.ParametricLIFNode):
        if node.w.dtype == alif.w.dtype:
            alif.w = node.w
        else:
            alif.w.data.copy_(node.w.detach())
    elif isinstance(node, neuron.LIFNode):
        alif.w.data.fill_(nearest_w(node.tau, alif.w.dtype))
    else:
        alif.w.data.fill_(NO_LEAK_W)
        alif.w.requires_grad_(False)
    _copy_voltage(node, alif)
    return alif


def _to_lif(node: Any) -> neuron.BaseNode:
    tau, v_threshold = (t.max().item() for t in (node.tau, node.effective_v_threshold))
    options = {"v_threshold": v_threshold, **_shared_options(node)}
    scale = 1.0
    if counts(node.surrogate_function):
        # It has no decay_input: with undivided input every voltage is tau times as large.
        scale = tau if node.decay_input else 1.0
        options["v_threshold"] *= scale
        del options["v_reset"]
        plain = _compat.INTEGER_LIF[0](tau=tau, **options)
    elif tau == math.inf:
        plain = neuron.IFNode(**options)
    else:
        plain = neuron.LIFNode(tau=tau, decay_input=node.decay_input, **options)
    _copy_voltage(node, plain)
    if scale != 1.0:
        plain.set_reset_value("v", scale * _compat.reset_value(plain, "v"))
        plain.v = scale * plain.v
    return plain


def _shared_options(node: Any) -> dict[str, Any]:
    names = ("v_reset", "surrogate_function", "detach_reset", "step_mode", "store_v_seq")
    return {name: getattr(node, name) for name in names}


def _copy_voltage(old: Any, new: Any) -> None:
    new.set_reset_value("v", _compat.reset_value(old, "v"))
    new.v = old.v
