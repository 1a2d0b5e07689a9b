"""From SpikingJelly's neurons to ALIF, and back: the same outputs at the moment of the swap."""

import copy
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from spikingjelly.activation_based import functional, neuron
from torch import Tensor, nn

from . import _compat
from ._checks import check_net
from ._table import table
from .folding import fold_thresholds
from .neuron import ALIFNode
from .ops import backends
from .state import name_neurons

#: The neurons with an ALIF that has the same outputs.
_KINDS = (neuron.LIFNode, neuron.ParametricLIFNode, neuron.IFNode)

#: sigmoid(-128) is 0 in float32: no leak, the IF neuron. Finite, so that averaging keeps it.
NO_LEAK_W = -128.0

#: Where torch keeps a module's hooks. The dictionaries move, so handles to remove them still work.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)

_HIDDEN = "a Python list, dict or tuple hides it from torch; use nn.ModuleList or nn.ModuleDict"

Channels = str | Mapping[str, int] | Callable[[str, nn.Module], int | None] | None


@dataclass(frozen=True)
class Swap:
    """What happened to one neuron.

    Attributes:
        names: every path in the net; several for a module used in several places, also in lists,
            dicts and tuples.
        kind: the class it had.
        swapped: whether it was replaced.
        note: how equal the outputs are, or why it was left alone.
    """

    names: tuple[str, ...]
    kind: str
    swapped: bool
    note: str


@dataclass(frozen=True)
class SwapReport:
    """What :func:`.swap_neurons` did, one :class:`Swap` a neuron; ``print`` it for a table."""

    rows: tuple[Swap, ...]

    @property
    def swapped(self) -> tuple[Swap, ...]:
        """The neurons that were replaced."""
        return tuple(row for row in self.rows if row.swapped)

    @property
    def kept(self) -> tuple[Swap, ...]:
        """The neurons that were left alone, with the reason in ``note``."""
        return tuple(row for row in self.rows if not row.swapped)

    def __str__(self) -> str:
        head = f"{len(self.swapped)} neurons swapped, {len(self.kept)} kept"
        return f"{head}\n{_table(self.rows)}" if self.rows else head


def swap_neurons(
    net: nn.Module,
    *,
    channels: Channels = None,
    example_input: Any = None,
    learn_tau: bool = True,
    learn_threshold: bool = True,
    min_v_threshold: float | None = None,
    filter: Callable[[str, nn.Module], bool] | None = None,
    backend: str = backends.AUTO,
) -> SwapReport:
    r"""Replace the LIF, PLIF and IF nodes of ``net`` by :class:`~sj_taid.ALIFNode`, in place.

    Kept from each node: tau, threshold, reset, ``decay_input``, surrogate (the same object),
    ``detach_reset``, step mode, ``store_v_seq``, ``training``, device, hooks, the voltage and its
    reset value, and PLIF's ``w`` itself (the same parameter, unless ``channels`` makes it ``[C]``
    or it is in half precision), so that an optimiser made before the swap still holds it. A module
    used in several places stays one module. The outputs at the swap are

    * bit for bit equal for PLIF (without ``decay_input`` on 2.x only), for IF, and for LIF with a
      tau that is a power of two;
    * equal to rounding otherwise: LIF divides by tau and ALIF multiplies by
      :math:`\mathrm{sigmoid}(w)`, whose ``w`` is the float32 that brings it nearest to
      :math:`1/\tau`. A spike can differ where the voltage meets the threshold to the last bits.

    IF has no leak: it becomes an ALIF without input decay whose :math:`1/\tau` is exactly 0. No
    gradient leads away from there, so its ``w`` is frozen and its threshold alone learns.

    Left alone and reported: subclasses of these nodes, which may do something else; other neurons
    that are a ``BaseNode`` (SpikingJelly's ``PSN`` and ``SimpleLIFNode`` are none); nodes that
    ``filter`` declines, whose threshold is a tensor, whose tau is 1, or that have a precision
    policy of their own; neurons that only a Python list, dict or tuple holds, which hides them from
    ``parameters()`` and ``reset_net`` too; and ``net`` itself, for which there is no place to put
    another. A replaced neuron that still runs, since a closure or another object that is not looked
    into holds it, warns.

    Args:
        net: any module with SpikingJelly neurons.
        channels: ``None`` for one tau and threshold a layer; ``"infer"`` for one a channel,
            counted by running ``example_input`` through a copy of ``net``; or a mapping from paths
            to C, or a function of path and node that returns C or ``None``.
        example_input: an input of ``net`` (a tuple for several), for ``channels="infer"``.
        learn_tau: whether ``w`` receives a gradient; a frozen PLIF ``w`` stays frozen.
        learn_threshold: whether ``v_threshold`` receives a gradient.
        min_v_threshold: a lower bound that keeps the learned thresholds positive.
        filter: ``filter(path, node)`` says whether to swap the node.
        backend: one of :func:`sj_taid.ops.backends.names`.

    Returns:
        The report: ``print`` it.

    Raises:
        ValueError: ``channels`` is unknown, names no neuron, or is ``"infer"`` without
            ``example_input``; a neuron's value that ALIF cannot take, such as a threshold below
            ``min_v_threshold``.
        TypeError: ``net`` is no module.

    >>> from spikingjelly.activation_based import layer, neuron
    >>> net = nn.Sequential(layer.Linear(4, 3), neuron.LIFNode(tau=2.0))
    >>> print(swap_neurons(net))
    1 neurons swapped, 0 kept
    name  was      now   note
    1     LIFNode  ALIF  equal outputs
    >>> net[1].tau.item(), net[1].v_threshold.requires_grad
    (2.0, True)
    """
    check_net(net, "swap_neurons")
    backends.check_name(backend)
    sites = _sites(net)
    counts = _channel_counts(net, sites, channels, example_input)
    rows = []
    swaps: dict[nn.Module, nn.Module] = {}
    for site in sites:
        count = counts.get(site.path)
        unknown = count if channels == "infer" and isinstance(count, str) else None
        note = _why_keep(site, filter) or unknown
        if note is None:
            try:
                swaps[site.node] = _to_alif(
                    site,
                    channels=count,
                    learn_tau=learn_tau,
                    learn_threshold=learn_threshold,
                    min_v_threshold=min_v_threshold,
                    backend=backend,
                )
            except ValueError as error:
                raise ValueError(f"the neuron {site.path!r}: {error}") from error
        rows.append(
            Swap(site.paths, type(site.node).__name__, note is None, note or _equality(site))
        )
    # Only now, so that an error above leaves the net as it was.
    _replace(net, swaps)
    name_neurons(net)
    _compat.forget_reset_cache(net)
    return SwapReport(tuple(rows))


def to_lif(net: nn.Module, *, strict: bool = True, fold_threshold: bool = False) -> nn.Module:
    r"""A copy of ``net`` with plain ``LIFNode`` s of the learned tau and threshold.

    Everything SpikingJelly does with LIF works on the copy: NIR export, operation counters, energy
    estimates, its own kernels. The outputs are equal bit for bit where tau is a power of two, and
    otherwise to rounding (LIF divides by tau). An ALIF without leak becomes an ``IFNode``.

    A LIF node has one tau and one threshold, so per-channel parameters are expressible only where
    all channels have the same.

    With ``fold_threshold`` every threshold becomes 1, for hardware and exporters that have one.
    Where ``V_reset`` is 0 or the reset soft, dividing input, voltage and threshold by the same
    number leaves every spike as it is; another ``V_reset`` is divided too. So the layer that a
    neuron alone reads is divided by the threshold, per channel if it has one a channel: a batch
    norm's weight and bias,

    .. math::
        \gamma' = \gamma / V_{th}, \qquad \beta' = \beta / V_{th},

    or those of a convolution or linear layer (whose features are then the channels: its output is
    ``[T, N, C]``, and no longer input is taken into account). SpikingJelly's
    own LIF, PLIF and IF in the net are treated alike. Outputs are equal bit for bit where the
    thresholds are powers of two, and otherwise to rounding. Gradients are not, since the surrogate
    keeps its width. Voltages are divided too, so a neuron whose voltage or threshold a ``forward``
    of the net reads keeps its threshold, as one with an infinite threshold does. A threshold that
    cannot be folded stays, with a warning that says why.

    Args:
        net: any module with :class:`~sj_taid.ALIFNode` s.
        strict: raise if a neuron is not expressible; otherwise warn and leave it as ALIF.
        fold_threshold: put the thresholds into the layers before the neurons.

    Returns:
        The copy; ``net`` is unchanged.

    Raises:
        ValueError: a neuron is not expressible and ``strict``; the message says which and why.
        TypeError: ``net`` is no module.

    >>> to_lif(nn.Sequential(ALIFNode(init_tau=2.0, v_threshold=0.5)))[0].v_threshold
    0.5
    """
    check_net(net, "to_lif")
    # A net that is one neuron has no parent to hold the new node.
    holder = nn.ModuleList([_copied(net)])
    for module in holder.modules():
        if isinstance(module, ALIFNode):
            module.apply_norm(None)
    unfolded = fold_thresholds(holder) if fold_threshold else {}
    if unfolded:
        rows = [(_inside(path), note) for path, note in unfolded.items()]
        message = f"these thresholds stay as they are:\n{table(('name', 'why'), rows)}"
        warnings.warn(message, stacklevel=2)
    refused = []
    swaps: dict[nn.Module, nn.Module] = {}
    for site in _sites(holder, ALIFNode):
        node = site.node
        paths = tuple(map(_inside, site.paths))
        tau, threshold = _distinct(node.tau), _distinct(node.effective_v_threshold)
        if type(node) is not ALIFNode:
            note = "a subclass of ALIFNode, whose own behaviour LIF would lose"
        elif site.hidden:
            note = _HIDDEN
        elif any(math.isnan(value) for value in (*tau, *threshold)):
            note = "its tau or threshold is nan: its training diverged, take an earlier checkpoint"
        elif len(tau) > 1 or len(threshold) > 1:
            note = f"its channels have {len(tau)} taus and {len(threshold)} thresholds; LIF has one"
        elif tau[0] == 1.0:
            note = "its tau is 1 to float32's precision; LIF needs more"
        elif tau[0] == math.inf and node.decay_input:
            note = "its tau is infinite, so that its input has no effect"
        else:
            swaps[node] = _to_plain(node, tau[0], threshold[0])
            continue
        refused.append(Swap(paths, type(node).__name__, False, note))
    if refused:
        message = f"LIFNode cannot express {len(refused)} of the neurons:\n{_table(refused)}"
        if strict:
            raise ValueError(f"{message}\nstrict=False leaves them as they are")
        warnings.warn(message, stacklevel=2)
    _replace(holder, swaps)
    _compat.forget_reset_cache(holder)
    return holder[0]


def _inside(path: str) -> str:
    """The path in the net of one in the list that holds it."""
    return path.removeprefix("0").removeprefix(".") or "net"


@dataclass
class _Site:
    """A neuron and every path to it; ``hidden`` if ``named_modules`` has none of them."""

    node: Any
    paths: tuple[str, ...]
    hidden: bool
    device: torch.device
    dtype: torch.dtype

    @property
    def path(self) -> str:
        return self.paths[0]


def _sites(net: nn.Module, kind: type = neuron.BaseNode) -> list[_Site]:
    """Every neuron of ``kind`` in the tree, once, with the device and dtype of its surroundings."""
    paths = defaultdict(list)
    for path, module in net.named_modules(remove_duplicate=False):
        paths[module].append(path)

    def note(path: str, module: nn.Module) -> nn.Module:
        if path not in paths[module]:
            paths[module].append(path)
        return module

    registered = set(paths)
    _walk(net, "", note, set())
    sites = []
    # A neuron without parameters lives where the parameter before it does.
    near = _parameter(net.parameters(), torch.empty(0))
    for module, names in paths.items():
        near = _parameter(module.parameters(recurse=False), near)
        if isinstance(module, kind):
            hidden = module not in registered
            sites.append(_Site(module, tuple(names), hidden, near.device, near.dtype))
    return sites


def _walk(
    value: Any,
    path: str,
    visit: Callable[[str, nn.Module], nn.Module],
    seen: set[int],
    member: str = "{}[{!r}]",
) -> Any:
    """Put ``visit(path, module)`` in the place of each module that ``value`` leads to.

    That is through the attributes of modules and through lists, dicts and tuples; the others are
    changed in place, and a tuple is replaced. ``seen`` has the ``id`` of those already walked.
    """
    if isinstance(value, nn.Module):
        new = visit(path, value)
        if new is value:
            for members in (value._modules, vars(value)):
                _walk(members, path, visit, seen, "{}.{}" if path else "{}{}")
        return new
    if isinstance(value, tuple):
        items = [_walk(item, f"{path}[{i}]", visit, seen) for i, item in enumerate(value)]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        return value._make(items) if hasattr(value, "_make") else type(value)(items)
    if not isinstance(value, list | dict) or id(value) in seen:
        return value
    seen.add(id(value))
    for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
        new = _walk(item, member.format(path, key), visit, seen)
        if new is not item:
            value[key] = new
    return value


def _replace(net: nn.Module, swaps: Mapping[nn.Module, nn.Module]) -> None:
    """Put the new neurons in the old ones' places, with their hooks."""
    for old, new in swaps.items():
        new.train(old.training)
        fresh = nn.Module()
        for hooks in _HOOKS:
            setattr(new, hooks, getattr(old, hooks))
            setattr(old, hooks, getattr(fresh, hooks))
        old.register_forward_pre_hook(_warn_replaced)
    _walk(net, "", lambda path, module: swaps.get(module, module), set())


def _warn_replaced(node: nn.Module, inputs: Any) -> None:
    warnings.warn(
        f"a {type(node).__name__} runs that swap_neurons or to_lif has replaced: something other "
        "than an attribute, list, dict or tuple of the net still holds it, such as a closure. Let "
        "that look the neuron up in the net when it is called.",
        stacklevel=5,
    )


def _parameter(parameters: Iterator[nn.Parameter], default: Tensor) -> Tensor:
    return next((p for p in parameters if p.is_floating_point()), default)


def _why_keep(site: _Site, filter: Callable[[str, nn.Module], bool] | None) -> str | None:
    """Why a neuron is not swapped, or ``None``."""
    node = site.node
    if isinstance(node, ALIFNode):
        return f"already ALIF; its backend stays {node.backend}: node.backend = ... chooses one"
    if type(node) not in _KINDS:
        base = next((kind for kind in _KINDS if isinstance(node, kind)), None)
        if base is None:
            return "not a LIF, PLIF or IF neuron"
        return f"a subclass of {base.__name__}, which may behave differently"
    if not site.path:
        return "it is the net itself; put it in a module: nn.Sequential(net)"
    if site.hidden:
        return _HIDDEN
    if filter is not None and not filter(site.path, node):
        return "declined by filter"
    if isinstance(node.v_threshold, Tensor):
        return "its threshold is a tensor; ALIF starts from a number"
    if not _compat.in_default_precision(node):
        return "it has a precision policy of its own"
    if getattr(node, "tau", 2.0) <= 1.0:
        return f"its tau is {node.tau}, and sigmoid(w) = 1/tau needs more than 1"
    return None


def _to_alif(site: _Site, channels: int | None, learn_tau: bool, **options: Any) -> ALIFNode:
    node = site.node
    alif = ALIFNode(
        decay_input=getattr(node, "decay_input", False),  # an IF node does not scale its input
        v_threshold=node.v_threshold,
        channels=channels,
        learn_tau=learn_tau,
        **_shared_options(node),
        **options,
    )
    if site.dtype == torch.float64:
        alif.double()
    alif.to(site.device)
    if isinstance(node, neuron.ParametricLIFNode):
        if channels is None and node.w.dtype == alif.w.dtype:
            alif.w = node.w
        else:
            alif.w.data.copy_(node.w.detach())
        alif.w.requires_grad_(learn_tau and node.w.requires_grad)
    elif isinstance(node, neuron.LIFNode):
        alif.w.data.fill_(_w_of(node.tau, alif.w.dtype))
    else:
        alif.w.data.fill_(NO_LEAK_W)
        alif.w.requires_grad_(False)
    return _with_voltage(node, alif)


def _shared_options(node: Any) -> dict[str, Any]:
    names = ("v_reset", "surrogate_function", "detach_reset", "step_mode", "store_v_seq")
    return {name: getattr(node, name) for name in names}


def _with_voltage(old: Any, new: Any) -> Any:
    new.set_reset_value("v", _compat.reset_value(old, "v"))
    new.v = old.v
    return new


def _w_of(tau: float, dtype: torch.dtype) -> float:
    """The ``w`` of ``dtype`` whose sigmoid is nearest to ``1/tau``.

    ``-log(tau - 1)`` rounded to ``dtype`` can be a few units in the last place off; a neighbour
    is often exact.
    """
    w = torch.tensor(-math.log(tau - 1.0), dtype=dtype)
    candidates = [w]
    for direction in (-math.inf, math.inf):
        neighbour = w
        for _ in range(16):
            neighbour = torch.nextafter(neighbour, torch.full_like(w, direction))
            candidates.append(neighbour)
    return min(candidates, key=lambda c: abs(c.sigmoid().item() - 1.0 / tau)).item()


def _equality(site: _Site) -> str:
    """How equal the outputs of a swapped neuron are to those it had."""
    node = site.node
    notes = []
    if isinstance(node, neuron.ParametricLIFNode):
        equal = _compat.FUNCTIONAL_STATES or node.decay_input
    elif isinstance(node, neuron.LIFNode):
        equal = math.frexp(node.tau)[0] == 0.5
    else:
        equal = True
        notes.append("w frozen: no leak")
    if site.dtype.itemsize < 4:
        equal = False
        notes.append(f"computes in float32, not {site.dtype}")
    return ", ".join([f"equal outputs{'' if equal else ' to rounding'}", *notes])


def _distinct(parameter: Tensor) -> list[float]:
    return parameter.detach().unique().tolist()


def _to_plain(node: ALIFNode, tau: float, v_threshold: float) -> neuron.BaseNode:
    options = {"v_threshold": v_threshold, **_shared_options(node)}
    if tau == math.inf:
        return _with_voltage(node, neuron.IFNode(**options))
    options |= {"tau": tau, "decay_input": node.decay_input}
    return _with_voltage(node, neuron.LIFNode(**options))


def _channel_counts(
    net: nn.Module, sites: list[_Site], channels: Channels, example_input: Any
) -> dict[str, Any]:
    """Path -> C or ``None``; a string says why it is unknown."""
    if channels is None:
        return {}
    if channels == "infer":
        if example_input is None:
            raise ValueError("channels='infer' needs example_input, an input that net accepts")
        return _inferred_channels(net, sites, example_input)
    if isinstance(channels, Mapping):
        unknown = set(channels) - {path for site in sites for path in site.paths}
        if unknown:
            raise ValueError(
                f"channels names {sorted(unknown)}, where net has no neuron; "
                f"its neurons are {[site.path for site in sites]}"
            )
        return {
            site.path: next((channels[path] for path in site.paths if path in channels), None)
            for site in sites
        }
    if callable(channels):
        return {site.path: channels(site.path, site.node) for site in sites}
    raise ValueError(
        "channels must be None, 'infer', a mapping from paths to numbers of channels, or a "
        f"function of path and node, but it is {channels!r}"
    )


def _inferred_channels(net: nn.Module, sites: list[_Site], example_input: Any) -> dict[str, Any]:
    sites = [site for site in sites if not site.hidden]
    # On a copy, so that statistics, states and training flags of the net stay as they are.
    trial = _copied(net).eval()
    functional.reset_net(trial)  # its voltages may be of another batch
    seen: dict[str, set[int | None]] = {site.path: set() for site in sites}

    def record(path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(node: Any, inputs: tuple[Any, ...]) -> None:
            axis = 2 if node.step_mode == "m" else 1
            shape = inputs[0].shape
            seen[path].add(shape[axis] if len(shape) > axis else None)

        return hook

    for site in sites:
        trial.get_submodule(site.path).register_forward_pre_hook(record(site.path))
    with torch.no_grad():
        trial(*example_input) if isinstance(example_input, tuple) else trial(example_input)
    why = {0: "it does not run on example_input, so its channels are unknown"}
    several = "it runs on several numbers of channels"
    return {
        path: next(iter(counts)) if len(counts) == 1 else why.get(len(counts), several)
        for path, counts in seen.items()
    }


def _copied(net: nn.Module) -> nn.Module:
    """A copy that has the voltages too, which torch does not copy where they have a graph."""
    places = [place for m in net.modules() for place in (getattr(m, "_memories", {}), vars(m))]
    held = [value for place in places for value in place.values()]  # store_v_seq's too
    made = [value for value in held if isinstance(value, Tensor) and not value.is_leaf]
    return copy.deepcopy(net, {id(value): value.detach().clone() for value in made})


def _table(rows: list[Swap] | tuple[Swap, ...]) -> str:
    return table(
        ("name", "was", "now", "note"),
        [(" = ".join(r.names), r.kind, "ALIF" if r.swapped else "-", r.note) for r in rows],
    )
