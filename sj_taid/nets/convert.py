"""Conversion of SpikingJelly's neurons to ALIF and back, and of a net's own classes."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from spikingjelly.activation_based import neuron
from torch import is_tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._pytree import tree_leaves

from .._internal import compat
from ..fused_neuron import restore
from ..monitoring import notes_on_thresholds, warn_of
from ..neuron import ALIFNode
from ..ops import backends
from ..ops.step.reference import state_dtype
from ..ops.surrogate import is_integer
from ..state import name_neurons
from .comparison import compare
from .neurons import (
    Site,
    as_inputs,
    check_net,
    copy_net,
    describe_equality,
    describe_single_steps,
    find_neurons,
    nearest_w,
    need_neurons,
    why_not_alif,
    why_not_firing,
)
from .report import Row, table_of


@dataclass(frozen=True)
class Report:
    """What :func:`.swap_neurons` changed in a net; ``print`` it for a table.

    Attributes:
        rows: a :class:`Row` for each neuron.
        remark: what else there is to say of the net, or "".
        new_parameters: how many learned parameters an optimizer made before does not have.
    """

    rows: tuple[Row, ...]
    remark: str = ""
    new_parameters: int = 0

    def __str__(self) -> str:
        swapped = sum(row.state == "swapped" for row in self.rows)
        head = f"{swapped} swapped, {len(self.rows) - swapped} left alone"
        new = f"{self.new_parameters} learned parameters are new: make the optimizer after the swap"
        after = new if self.new_parameters else ""
        return "\n".join(filter(None, (head, table_of(self.rows), after, self.remark)))

    __repr__ = __str__


#: ``w`` of a neuron without leak (IF): its sigmoid is 0, in float64 too. Not -inf, which would make
#: averaged weights NaN.
NO_LEAK_W = -1024.0


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
    half precision. Make the optimizer after: one made before does not move the parameters that are
    new, the thresholds and, but for PLIF, the time constants. The outputs are bit for
    bit equal for PLIF (without ``decay_input`` on 2.x only), for IF, for LIF with a tau of 2, 4, 8
    or 16, and for integer LIF with one of these or 4/3, its default; else equal to rounding, as LIF
    divides by tau and ALIF multiplies by :math:`\mathrm{sigmoid}(w)`. IF has no leak: its ``w`` is
    frozen where :math:`1/\tau` is 0, from where no gradient leads away.

    The report says which neurons are kept and why. Each one stays the same object, of another
    class, so that whatever holds it has the ALIF. A neuron that only a list holds is not seen.

    Args:
        net: any module with SpikingJelly neurons, or of the classes in ``replace``.
        replace: classes of the net's own, or of SpikingJelly, and for each a function of a module
            of exactly this class that gives its successor, or the module itself to keep it. The
            successor gets the device, the dtype, the mode, the hooks and those attributes that it
            lacks, but for tensors; the note names the others.
        example: an input of ``net`` (a tuple for several). Each module of ``replace`` is compared
            with its successor on the input that it gets there, in training and in eval mode, twice
            in a row and once after a reset: outputs and their structure, what is written into the
            input, and the gradients of the input and of parameters that both have. What rounding
            moves across a threshold is no difference, if it is rare. The note names state that a
            net may read, and that differs.
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
    layer  kind     done      note
    1      LIFNode  ALIFNode  equal outputs, v_threshold >= 0.01
    2 learned parameters are new: make the optimizer after the swap
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
        if type(site.node) in replace:
            new, notes[site] = _successor(site, replace[type(site.node)], new_of.values())
        else:
            new, notes[site] = _swapped(site, filter, options)
        if new is not None:
            _check_becomes(site, new)
            new_of[site] = new
    if example is not None:
        own = {site: new for site, new in new_of.items() if type(site.node) in replace}
        for site, note in compare(net, own, as_inputs(example)).items():
            notes[site] += f", {note}"
    done = {site: type(new).__name__ for site, new in new_of.items()}
    rows = tuple(
        site.row(done[site], notes[site], "swapped") if site in done else site.row("", notes[site])
        for site in sites
    )
    before = set(net.parameters())
    compat.forget_reset_cache()
    for site, new in new_of.items():  # after the last error
        if isinstance(site.node, neuron.ParametricLIFNode) and type(site.node) not in replace:
            new.w.requires_grad_(learn_tau and site.node.w.requires_grad)  # the two share w
        _become(site.node, new)
    name_neurons(net)
    new_parameters = sum(p.requires_grad and p not in before for p in net.parameters())
    return Report(rows, describe_single_steps(sites), new_parameters)


def _successor(site: Site, function: Any, others: Collection[Any]) -> tuple[Any, str]:
    """The successor of a module by ``replace``, ``None`` to keep it, and a note.

    It is none of ``others``, which stand in other places.
    """
    is_function = callable(function) and not isinstance(function, type | nn.Module)
    new = function(site.node) if is_function else f"no function but {function!r:.60}"
    if new is site.node:
        return None, "kept by replace="
    if not isinstance(new, nn.Module) or new in others or site.node in new.modules():
        raise TypeError(
            f"replace= must give a module of its own for each {type(site.node).__name__}, which "
            f"does not hold the old one, but for {site.path!r} it gave {new!r:.80}; write "
            "{Class: lambda old: ALIFNode(...)}"
        )
    common = vars(nn.Module())
    own = {name: value for name, value in vars(site.node).items() if name not in common}
    state = [name for name, value in own.items() if any(map(is_tensor, tree_leaves(value)))]
    _take_over(site.node, new, known=state)
    lost = [name for name in own if name[0] != "_" and not _has(new, name, own[name])]
    note = f"by replace=, not kept: {', '.join(lost)}" if lost else "by replace="
    return new.to(site.device, site.dtype), note


def _has(new: nn.Module, name: str, value: Any) -> bool:
    """Whether a module has an attribute, of this value."""
    has: Any = getattr(new, name, None)
    try:
        numbers: Any = has.tolist() if is_tensor(has) else has
        return has is value or bool(numbers == value) or math.isclose(numbers, value, rel_tol=1e-6)
    except (TypeError, ValueError, RuntimeError):  # no numbers, or arrays of many
        return False


def to_lif(net: nn.Module) -> nn.Module:
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

    Raises:
        ValueError: neurons are not expressible, or were parametrized after :func:`.accelerate`; the
            message says which and why.

    >>> to_lif(nn.Sequential(ALIFNode(init_tau=2.0, v_threshold=0.5)))[0].v_threshold
    0.5
    """
    check_net(net)
    copied = copy_net(net)
    restore(copied)
    sites = [site for site in find_neurons(copied) if isinstance(site.node, ALIFNode)]
    if refused := [site.row("", reason) for site in sites if (reason := _why_not_lif(site.node))]:
        raise ValueError(
            f"LIFNode cannot express {len(refused)} of the neurons:\n{table_of(refused)}"
        )
    for site in sites:
        _become(site.node, _to_lif(site.node))
    warn_of(notes_on_thresholds(copied))
    return copied


def _check_becomes(site: Site, new: nn.Module) -> None:
    """Raise a ``TypeError`` if no object of the module's class can become one of ``new``'s."""
    try:
        object.__setattr__(object.__new__(type(site.node)), "__class__", type(new))
    except TypeError as error:
        raise TypeError(
            f"{site.path!r} cannot become a {type(new).__name__} ({error}); leave out __slots__"
        ) from error


def _become(old: nn.Module, new: nn.Module) -> None:
    """Make ``old`` the module that ``new`` is, in every place that holds it; its hooks stay."""
    for name in vars(nn.Module()):
        is_of_calls = "forward" in name or "backward" in name  # not of state_dict
        if is_of_calls and (hooks := getattr(old, name)) is not None:
            if isinstance(hooks, dict):
                # The old dictionaries themselves, so that handles to remove a hook still work.
                hooks.update(getattr(new, name))
            vars(new)[name] = hooks
    object.__setattr__(old, "__class__", type(new))
    old.__dict__ = vars(new)


def _take_over(old: nn.Module, new: nn.Module, known: Collection[str]) -> None:
    """Give ``new`` the mode of ``old``, and its attributes but for ``known`` and those it has.

    Modules that both hold keep their modes, and so does what is in eval mode within ``new``.
    """
    for name, value in vars(old).items():
        if name not in known and not name.startswith("_taid_") and not hasattr(new, name):
            vars(new)[name] = value
    held = set(old.modules())
    for module in new.modules():
        module.training &= old.training or module in held
    new.training = old.training


def _swapped(site: Site, filter: Any, options: dict[str, Any]) -> tuple[Any, str]:
    """The ALIF of a neuron, ``None`` to keep it, and a note."""
    if reason := _why_not_swapped(site, filter):
        return None, reason
    try:
        alif = _to_alif(site, **options)
    except ValueError as error:
        raise ValueError(f"the neuron {site.path!r}: {error}") from error
    note = describe_equality(site)
    if isinstance(site.node, neuron.IFNode):
        note += ", w frozen: no leak"
    if alif.min_v_threshold is not None:
        note += f", v_threshold >= {alif.min_v_threshold:g}"
    return alif, note


def _why_not_swapped(site: Site, filter: Callable[[str, nn.Module], bool] | None) -> str | None:
    """Why a neuron is not swapped, or ``None``."""
    node = site.node
    if isinstance(node, ALIFNode):
        return f"already ALIF; its backend stays {node.backend}: node.backend = ... chooses one"
    if is_parametrized(node):
        return "it is parametrized"
    if reason := why_not_alif(node) or why_not_firing(node):
        return reason
    if names := compat.added_names(node, *compat.PLAIN_NEURONS):
        return f"it has its own {', '.join(names)}, which ALIF lacks"
    return "declined by filter" if filter and not filter(site.path, node) else None


def _why_not_lif(node: Any) -> str | None:
    """Why a LIF node cannot express an ALIF, or ``None``."""
    if type(node) is not ALIFNode:
        return "a subclass of ALIFNode, whose own behaviour LIF would lose"
    if names := compat.added_names(node, ALIFNode):
        return f"it has its own {', '.join(names)}, which LIF lacks"
    if node.tau is None or node.normalize:
        return "it has no state" if node.tau is None else "it divides its counts"
    if node.tau.is_meta:
        return "it is on the meta device, where its tau has no value"
    taus, thresholds = node.tau.unique().tolist(), node.effective_v_threshold.unique().tolist()
    if any(math.isnan(value) for value in (*taus, *thresholds)):
        return "its tau or threshold is nan: its training diverged, take an earlier checkpoint"
    if len(taus) > 1 or len(thresholds) > 1:
        return f"its channels have {len(taus)} taus and {len(thresholds)} thresholds; LIF has one"
    if taus[0] == 1.0:
        return "its tau is 1 to float32's precision; LIF needs more"
    if taus[0] == math.inf and node.decay_input:
        return "its tau is infinite, so that its input has no effect"
    if is_integer(node.surrogate_function) and not compat.INTEGER_LIF:
        return "it counts, and SpikingJelly 0.0.0.0.14 has no ILIFNode"
    if is_integer(node.surrogate_function) and taus[0] == math.inf:
        return "it counts, and an ILIFNode has a finite tau"
    return None


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
    _take_over(node, alif, vars(compat.kind_of(node)()))
    return alif


def _to_lif(node: Any) -> neuron.BaseNode:
    tau, v_threshold = (t.max().item() for t in (node.tau, node.effective_v_threshold))
    options = {"v_threshold": v_threshold, **_shared_options(node)}
    scale = 1.0
    if is_integer(node.surrogate_function):
        # It has no decay_input: with undivided input every voltage is tau times as large.
        scale = tau if node.decay_input else 1.0
        options["v_threshold"] *= scale
        del options["v_reset"]
        plain = compat.INTEGER_LIF[0](tau=tau, **options)
    elif tau == math.inf:
        plain = neuron.IFNode(**options)
    else:
        plain = neuron.LIFNode(tau=tau, decay_input=node.decay_input, **options)
    _copy_voltage(node, plain, scale)
    _take_over(node, plain, vars(ALIFNode()))
    return plain


def _shared_options(node: Any) -> dict[str, Any]:
    names = ("v_reset", "surrogate_function", "detach_reset", "step_mode", "store_v_seq")
    return {name: getattr(node, name) for name in names}


def _copy_voltage(old: Any, new: Any, scale: float = 1.0) -> None:
    new.set_reset_value("v", scale * compat.reset_value(old, "v"))
    new.v = old.v if scale == 1.0 else scale * old.v
