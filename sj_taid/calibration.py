"""Calibration: thresholds set from data, so that every layer fires at a target rate."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ._internal import compat
from ._internal.checks import check, check_numbers, is_number
from ._internal.context import forked
from .monitoring import LayerState, monitor, spikes_of
from .nets.neurons import check_net, find_neurons, need_neurons, why_not_firing
from .nets.report import table
from .ops.surrogate import levels_of
from .state import fresh_state, reset

#: Relative tolerance on the target firing rate.
TOLERANCE = 0.2
#: log2 of the threshold's distance from its lowest value: the interval searched. The bisections
#: narrow it to 1e-4, relative.
_RANGE = (-60.0, 60.0)
_BISECTIONS = 20


@dataclass(frozen=True)
class Calibrated:
    """What :func:`.calibrate` did with one layer of neurons.

    Attributes:
        layer: its path in the net.
        before: its rate and threshold, as :class:`.monitor` has them.
        after: the same after.
        note: why the layer, or some of its channels, misses the rate, or ``""``.
    """

    layer: str
    before: LayerState
    after: LayerState
    note: str


@dataclass(frozen=True)
class CalibrationReport:
    """What :func:`.calibrate` did, layer by layer; ``print`` it for a table.

    Attributes:
        rows: a :class:`Calibrated` for each layer.
        fixed_thresholds: path -> the threshold of a LIF, PLIF or IF, which no ``state_dict`` has;
            :func:`~.set_fixed_thresholds` puts them back.
    """

    rows: tuple[Calibrated, ...]
    fixed_thresholds: dict[str, float]

    @property
    def missed(self) -> tuple[Calibrated, ...]:
        """The layers that miss the rate, with the reason in ``note``."""
        return tuple(row for row in self.rows if row.note)

    def __str__(self) -> str:
        head = f"{len(self.rows) - len(self.missed)} layers calibrated, {len(self.missed)} missed"
        lines = []
        for row in self.rows:
            old, new = row.before, row.after
            ran = new.firing_rate is not None
            rates = f"{old.firing_rate:.4g} -> {new.firing_rate:.4g}" if ran else "-"
            thresholds = f"{old.v_threshold:.4g} -> {new.v_threshold:.4g}"
            lines.append((row.layer or "net", rates, thresholds, row.note))
        listed = f"{head}\n{table(('layer', 'rate', 'threshold', 'note'), lines)}"
        if not any(row.layer in self.fixed_thresholds and not row.note for row in self.rows):
            return listed
        return (
            f"{listed}\n{len(self.fixed_thresholds)} thresholds are no parameters and in no "
            "state_dict: sj_taid.swap_neurons(net) makes parameters of them; or save "
            "report.fixed_thresholds with it, and after load_state_dict call "
            "sj_taid.calibration.set_fixed_thresholds(net, them); sj-taid train does both"
        )

    __repr__ = __str__


@torch.no_grad()
@compat.quiet_triton()
def calibrate(net: nn.Module, x_seq: Any, *, rate: float = 0.2) -> CalibrationReport:
    """Set every neuron's threshold so that its layer fires at ``rate``, in place.

    For a net that starts dead or saturated. It runs one batch from rest, and calibrates neuron by
    neuron in the order of the forward, so that each sees what the calibrated ones before it give.
    Bisection finds, to 1e-4 of its distance from the reset voltage, the greatest threshold whose
    rate is at least ``rate``; if the rate of the next greater one is nearer, and not 0, that is
    taken. A threshold of ``[C]`` gets the rate in each channel. It stays above the reset voltage
    (with a soft reset, above 0) and at or above ALIF's ``min_v_threshold``: calibrate before
    :func:`~sj_taid.swap_neurons`, which bounds it by the threshold of that moment.

    Works on every neuron of SpikingJelly's ``BaseNode`` or ``SimpleBaseNode`` in step mode ``"m"``,
    with the net in the mode it is in, and warns of batch norms in eval mode that have never
    trained; others, such as ``PSN``, it does not see. Only thresholds
    change, and the net is reset. Thresholds of SpikingJelly's own neurons are plain numbers, which
    ``state_dict`` leaves out: save the report's ``fixed_thresholds`` with it.

    Args:
        net: any module with SpikingJelly neurons.
        x_seq: what ``net`` takes, one batch, as large as you can: a rate has steps of 1 / (number
            of neurons, samples and time steps), for a channel of a linear layer 1 / (T N).
        rate: spikes per neuron and time step, in (0, 1). A neuron that counts to D gives D times as
            many, a mean count of 0.8 where D is 4: as many as spikes in D steps.

    Returns:
        The report. A layer is missed if its rate, or a channel's, is more than 20 % off, or a
        voltage is NaN or infinite. A neuron in step mode ``"s"``, one called several times and one
        that shares its threshold keep it, as does one that no threshold makes fire, or every one.

    Raises:
        ValueError: ``rate`` is not in (0, 1), ``net`` has no neurons in step mode ``"m"``, or
            ``x_seq`` has no values, or some that are NaN.

    >>> from sj_taid import ALIFNode
    >>> net = nn.Sequential(nn.Linear(8, 64), ALIFNode(v_threshold=10.0, step_mode="m"))
    >>> report = calibrate(net, torch.rand(4, 32, 8), rate=0.1)
    >>> (row,) = report.rows
    >>> row.before.firing_rate, round(row.after.firing_rate, 2), report.missed
    (0.0, 0.1, ())
    """
    check(("more than 0 and less than 1", lambda x: is_number(x) and 0.0 < x < 1.0), rate=rate)
    paths = {site.node: site.path for site in need_neurons(net, "calibrate")}
    if all(node.step_mode == "s" for node in paths):
        raise ValueError(
            "calibrate runs net(x_seq) on a whole sequence, but all neurons are in step mode 's'; "
            "change it: functional.set_step_mode(net, 'm')"
        )
    if isinstance(x_seq, Tensor):
        if not x_seq.numel():
            raise ValueError(f"x_seq has no values: its shape is {list(x_seq.shape)}")
        if wrong := x_seq.isnan().sum():
            raise ValueError(f"{wrong} of {x_seq.numel()} values in x_seq are NaN")
    if new := [path for path, module in net.named_modules() if _is_new(module)]:
        warnings.warn(
            f"{len(new)} batch norms, such as {new[0]!r}, are in eval mode and have never trained, "
            "so these thresholds are not those for training: call net.train() before calibrate",
            stacklevel=4,
        )
    calls: Counter[nn.Module] = Counter()
    notes: dict[nn.Module, str] = {}

    def calibrate_next(node: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        def fire() -> Tensor:
            node.reset()
            return spikes_of(node, node.forward(*args, **kwargs))

        notes[node] = _search(node, fire, rate * levels_of(node.surrogate_function))
        node.reset()

    buffers = [(buffer, buffer.clone()) for buffer in net.buffers()]
    with fresh_state(net), monitor(net) as watch:
        try:
            _run(net, x_seq, paths, lambda node, *_: calls.update([node]))
            before = watch.layers()
            watch.clear()
            uses = Counter(id(node.v_threshold) for node in paths)
            notes |= {n: _why_not_own(n, calls[n], uses[id(n.v_threshold)]) or "" for n in paths}
            _run(net, x_seq, [node for node in paths if not notes[node]], calibrate_next)
        finally:
            for buffer, value in buffers:
                buffer.copy_(value)
        after = watch.layers()
    for node, path in paths.items():
        if math.isnan(after[path].firing_rate or 0.0):
            notes[node] = notes[node] or "its voltage is not finite"
    rows = [Calibrated(path, before[path], after[path], notes[n]) for n, path in paths.items()]
    return CalibrationReport(tuple(rows), fixed_thresholds(net))


def _is_new(module: nn.Module) -> bool:
    """Whether it is a batch norm in eval mode whose running statistics are those of its start."""
    batches = getattr(module, "num_batches_tracked", None)
    return not module.training and isinstance(batches, Tensor) and not batches


def _run(net: Any, x_seq: Any, nodes: Iterable[nn.Module], hook: Callable[..., Any]) -> None:
    """Run the batch once from rest, with ``hook`` before each call of ``nodes``."""
    # The same dropout in both passes; compiled code would not call the hook.
    tensors = (*net.parameters(), *net.buffers())
    with ExitStack() as hooks, forked(tensors), torch.compiler.set_stance("force_eager"):
        for node in nodes:
            hooks.enter_context(node.register_forward_pre_hook(hook, with_kwargs=True))
        reset(net)
        net(x_seq)


def _why_not_own(node: Any, calls: int, uses: int) -> str | None:
    """Why the threshold of ``node`` stays, or ``None``."""
    if node.step_mode == "s":
        return "it is in step mode 's'; calibrate sees whole sequences alone"
    if not calls:
        return "it does not run on x_seq"
    if calls > 1:
        return f"it is called {calls} times, and has one threshold"
    if uses > 1 and isinstance(node.v_threshold, Tensor):
        return "another neuron shares its threshold"
    if not getattr(node.surrogate_function, "spiking", True):
        return "it gives no spikes: its surrogate has spiking=False"
    if is_parametrized(node, "v_threshold"):
        return "its threshold is parametrized"
    return why_not_firing(node)


def _search(node: Any, fire: Callable[[], Tensor], rate: float) -> str:
    """Set the threshold with which ``node`` fires at ``rate``; why it does not, or ""."""
    before = torch.as_tensor(node.v_threshold, dtype=torch.float64).detach().clone()
    floor = node.v_reset or 0.0
    bound = getattr(node, "min_v_threshold", None)

    def set_threshold(threshold: Tensor) -> None:
        if isinstance(node.v_threshold, Tensor):
            node.v_threshold.copy_(threshold)
        else:
            node.v_threshold = threshold.item()

    def threshold_at(exponent: Tensor) -> Tensor:
        threshold = floor + exponent.exp2()
        return threshold if bound is None else threshold.clamp(min=bound)

    def rates_at(exponent: Tensor) -> Tensor:
        """Spikes per neuron and step of ``[T, N, C, *]``, in the shape of the threshold."""
        set_threshold(threshold_at(exponent))
        spikes = fire()
        axes = [axis for axis in range(spikes.dim()) if axis != 2 or before.numel() == 1]
        return spikes.double().mean(axes).reshape(before.shape)

    # The least distance from the reset voltage that float32 resolves.
    least = _RANGE[0] if floor == 0.0 else math.log2(abs(floor)) - 20.0
    low, high = torch.full_like(before, least), torch.full_like(before, _RANGE[1])
    most = rates_at(low)
    if ((most > 0) & (rates_at(high) >= most.clamp(max=rate))).all():
        set_threshold(before)
        return "it fires at any threshold"
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        fires = rates_at(middle) >= most.clamp(max=rate)
        low, high = torch.where(fires, middle, low), torch.where(fires, high, middle)
    at_low, at_high = rates_at(low), rates_at(high)
    nearer = (at_high > 0) & (rate - at_high < at_low - rate)
    set_threshold(torch.where(most > 0, threshold_at(torch.where(nearer, high, low)), before))
    rates = torch.where(nearer, at_high, at_low)
    off = rates[(rates - rate).abs() > TOLERANCE * rate]
    channels = f"in {off.numel()} of {rates.numel()} channels, " if rates.dim() else ""
    from_bound = "" if bound is None else f" from min_v_threshold={bound:g} up"
    nearest = f"{channels}the nearest is {off.mean():.3g}"
    return f"no threshold{from_bound} gives the rate: {nearest}" if off.numel() else ""


def fixed_thresholds(net: nn.Module) -> dict[str, float]:
    """The thresholds of ``net`` that are not parameters, by the paths of their neurons.

    >>> from spikingjelly.activation_based.neuron import LIFNode
    >>> fixed_thresholds(nn.Sequential(nn.Linear(2, 2), LIFNode(v_threshold=0.5)))
    {'1': 0.5}
    """
    check_net(net)
    thresholds = {site.path: site.node.v_threshold for site in find_neurons(net)}
    return {path: float(value) for path, value in thresholds.items() if is_number(value)}


def set_fixed_thresholds(net: nn.Module, thresholds: Mapping[str, Any]) -> None:
    """Set the thresholds that :func:`fixed_thresholds` returned.

    Raises:
        ValueError: ``net`` has no such threshold at a path, or a value is no number; nothing is
            set then.
    """
    there = fixed_thresholds(net)
    for path in thresholds:
        if path not in there:
            raise ValueError(f"no neuron with a fixed threshold at {path!r}; there are {[*there]}")
    check_numbers(**{f"the threshold of {path!r}": value for path, value in thresholds.items()})
    for path, value in thresholds.items():
        neuron: Any = net.get_submodule(path)
        neuron.v_threshold = float(value)
