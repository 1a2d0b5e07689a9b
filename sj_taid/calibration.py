"""Calibration: thresholds set from data, so that every layer fires at a target rate."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from spikingjelly.activation_based import base, functional, neuron
from torch import Tensor, nn

from ._checks import check_net, is_number
from .monitoring import LayerState, monitor, spikes_of
from .report import table

__all__ = ["Calibrated", "CalibrationReport", "calibrate"]

#: Relative tolerance on the target firing rate.
TOLERANCE = 0.2
#: The distances of a threshold from its lowest value that are searched, as powers of 2, and the
#: number of bisections: the threshold is found to 1e-4 of the distance.
_RANGE = (-60.0, 60.0)
_BISECTIONS = 20


@dataclass(frozen=True)
class Calibrated:
    """What :func:`.calibrate` did with one layer of neurons.

    Attributes:
        name: its path in the net.
        rate_before: spikes per neuron and time step before; ``None`` for a layer that does not run.
        rate: the same after.
        v_threshold_before: threshold voltage before, the mean over channels.
        v_threshold: the same after.
        note: why the layer, or some of its channels, misses the rate, or ``""``.
    """

    name: str
    rate_before: float | None
    rate: float | None
    v_threshold_before: float
    v_threshold: float
    note: str


@dataclass(frozen=True)
class CalibrationReport:
    """What :func:`.calibrate` did, one :class:`Calibrated` per layer; ``print`` it for a table."""

    rows: tuple[Calibrated, ...]

    @property
    def missed(self) -> tuple[Calibrated, ...]:
        """The layers that miss the rate, with the reason in ``note``."""
        return tuple(row for row in self.rows if row.note)

    def __str__(self) -> str:
        head = f"{len(self.rows) - len(self.missed)} layers calibrated, {len(self.missed)} missed"
        lines = [
            (
                row.name,
                "-" if row.rate is None else f"{row.rate_before:.4g} -> {row.rate:.4g}",
                f"{row.v_threshold_before:.4g} -> {row.v_threshold:.4g}",
                row.note,
            )
            for row in self.rows
        ]
        return f"{head}\n{table(('layer', 'rate', 'threshold', 'note'), lines)}"


@torch.no_grad()
def calibrate(
    net: nn.Module,
    x_seq: Any,
    *,
    rate: float = 0.2,
    run: Callable[[Any], Any] | None = None,
) -> CalibrationReport:
    r"""Set every neuron's threshold so that its layer fires at ``rate``, in place.

    For a net that starts dead or saturated. Each threshold is found by bisection on the input that
    the calibrated layers before it give for one batch, from rest,

    .. math::
        V_{th} = \max\,\{\vartheta : r(\vartheta) \ge \text{rate}\}, \qquad
        r(\vartheta) = \frac{1}{T N \ldots} \sum_{t, n, \ldots} S_\vartheta[t, n, \ldots]

    to 1e-4 of its distance from the reset voltage, or the next greater one if its rate is nearer
    and not 0. A threshold of ``[C]`` has a rate per channel. It stays above the reset voltage (with
    a soft reset, above 0) and at or above ALIF's ``min_v_threshold``.

    Works on every SpikingJelly neuron whose output is 0 or 1, with the net in the mode it is in.
    Only thresholds change; states, running statistics, gradients and torch's random numbers are
    restored. Your hooks see the passes, one per layer and two more, without gradients. Thresholds
    of SpikingJelly's own neurons are plain numbers, which ``state_dict`` leaves out:
    :mod:`sj_taid.thresholds` saves them.

    Args:
        net: any module with SpikingJelly neurons.
        x_seq: one batch, as large as you can: a rate has steps of 1 / (number of neurons, samples
            and time steps), for a channel of a linear layer 1 / (T N).
        rate: spikes per neuron and time step, in (0, 1).
        run: runs a whole sequence. The default is ``net(x_seq)`` if a module of the net is in step
            mode ``"m"``, otherwise ``net(x)`` for each ``x`` of ``x_seq`` ``[T, N, *]``. A net in
            step mode ``"s"`` that loops over time itself needs ``run=net``.

    Returns:
        The report. A layer is missed if its rate, or a channel's, is more than 20 % off. One that
        no threshold makes fire keeps its threshold. One whose own spikes change its input, as in a
        recurrent layer, or whose threshold a later one shares, is set once and may miss.

    Raises:
        ValueError: ``rate`` is not in (0, 1), ``net`` has no neurons, or it needs ``run``.
        TypeError: ``net`` is no module.
        Exception: what ``run`` raises; the thresholds are then as before.

    >>> from sj_taid import ALIFNode
    >>> net = nn.Sequential(nn.Linear(8, 64), ALIFNode(v_threshold=10.0, step_mode="m"))
    >>> report = calibrate(net, torch.rand(4, 32, 8), rate=0.1)
    >>> report.rows[0].rate_before, round(report.rows[0].rate, 2), report.missed
    (0.0, 0.1, ())
    """
    check_net(net, "calibrate")
    if not (is_number(rate) and 0.0 < rate < 1.0):
        raise ValueError(
            f"rate must be spikes per neuron and time step, more than 0 and less than 1, as 0.2, "
            f"but it is {rate!r}"
        )
    by_step = run is None and all(getattr(m, "step_mode", "s") == "s" for m in net.modules())
    run = run or (partial(_run_steps, net) if by_step else net)
    run_batch = partial(_run_from_rest, net, partial(run, x_seq))
    paths = {m: path for path, m in net.named_modules() if isinstance(m, neuron.BaseNode)}
    with _restore_states(net), monitor(net) as watch:
        order: list[nn.Module] = []
        run_batch(paths, lambda node, args, kwargs: order.append(node))
        if by_step:
            _check_by_step(order, len(x_seq))
        before = watch.layers()
        found = {node: _calibrate(node, run_batch, rate) for node in dict.fromkeys(order)}
        watch.clear()
        run_batch()
        after = watch.layers()
    return CalibrationReport(
        tuple(
            _describe(path, before[path], after[path], found.get(node), rate)
            for node, path in paths.items()
        )
    )


def _run_steps(net: nn.Module, x_seq: Tensor) -> list[Any]:
    try:
        return [net(x) for x in x_seq]
    except Exception as error:
        error.add_note(f"calibrate ran net(x) for each x of x_seq: {_RUN}")
        raise


_RUN = (
    "if the net loops over time itself give run=net, otherwise "
    "run=lambda x_seq: [net(x) for x in x_seq]"
)


def _check_by_step(order: Iterable[nn.Module], steps: int) -> None:
    if min(Counter(order).values(), default=0) > steps:
        raise ValueError(
            "calibrate ran net(x) for each x of x_seq, but every neuron ran more than once in "
            f"each: {_RUN}"
        )


#: Whether a call starts from rest, and the neuron's forward on its input.
_Call = tuple[bool, Callable[[], Any]]


class _Found(NamedTuple):
    """The rate of a layer with the threshold found, and why that is not the target, or ""."""

    rate: float
    note: str


def _describe(
    path: str, before: LayerState, after: LayerState, found: _Found | None, rate: float
) -> Calibrated:
    if found is None or after.firing_rate is None:
        note = "it does not run on x_seq"
    elif math.isnan(after.firing_rate):
        note = "its voltage is not finite"
    elif abs(after.firing_rate - found.rate) > TOLERANCE * rate:
        note = f"set to {found.rate:.3g}, but its input or threshold changed after"
    else:
        note = found.note
    rates = before.firing_rate, after.firing_rate
    return Calibrated(path, *rates, before.v_threshold, after.v_threshold, note)


def _run_from_rest(
    net: nn.Module,
    run: Callable[[], Any],
    nodes: Iterable[nn.Module] = (),
    hook: Callable[..., Any] = lambda *_: None,
) -> None:
    """Run the batch once, with ``hook`` before each call of ``nodes``."""
    handles = [node.register_forward_pre_hook(hook, with_kwargs=True) for node in nodes]
    devices = {t.device for t in chain(net.parameters(), net.buffers()) if t.is_cuda}
    try:
        functional.reset_net(net)
        # The same dropout in every pass; compiled code would not call the hook.
        with torch.random.fork_rng(devices), torch.compiler.set_stance("force_eager"):
            run()
    finally:
        for handle in handles:
            handle.remove()


def _calibrate(node: Any, run_batch: Callable[..., None], rate: float) -> _Found:
    """Record the calls of ``node`` in a pass, and search its threshold on them."""
    calls: list[_Call] = []

    def record(node: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # The net may change its tensors in place.
        args = tuple(v.clone() if isinstance(v, Tensor) else v for v in args)
        from_rest = not any(isinstance(value, Tensor) for value in node.memories())
        calls.append((from_rest, partial(node.forward, *args, **kwargs)))

    run_batch([node], record)
    return _search(node, calls, rate)


def _search(node: Any, calls: list[_Call], rate: float) -> _Found:
    """Set the threshold with which ``node`` fires at ``rate``, by bisection."""
    before = _threshold(node).double()
    if before.dim() > 1:
        return _Found(math.nan, f"its threshold has the shape {list(before.shape)}")
    floor = node.v_reset or 0.0
    bound = getattr(node, "min_v_threshold", None)

    def threshold_at(exponent: Tensor) -> Tensor:
        threshold = floor + exponent.exp2()
        return threshold if bound is None else threshold.clamp(min=bound)

    def fire_at(exponent: Tensor) -> list[Tensor]:
        _set_threshold(node, threshold_at(exponent))
        return _replay(node, calls)

    # The least distance from the reset voltage that float32 resolves.
    least = _RANGE[0] if floor == 0.0 else math.log2(abs(floor)) - 20.0
    low, high = torch.full_like(before, least), torch.full_like(before, _RANGE[1])
    spikes = fire_at(low)
    if not all(((s == 0) | (s == 1)).all() for s in spikes):
        _set_threshold(node, before)
        return _Found(math.nan, "its output is not 0 or 1")
    most = at_low = _rates(node, spikes, before)
    at_high = torch.zeros_like(most)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        found = _rates(node, fire_at(middle), before)
        fires = found >= most.clamp(max=rate)
        low, at_low = torch.where(fires, middle, low), torch.where(fires, found, at_low)
        high, at_high = torch.where(fires, high, middle), torch.where(fires, at_high, found)
    nearer = (at_high > 0) & (rate - at_high < at_low - rate)
    threshold = threshold_at(torch.where(nearer, high, low))
    _set_threshold(node, torch.where(most > 0, threshold, before))
    rates = torch.where(nearer, at_high, at_low)
    off = rates[(rates - rate).abs() > TOLERANCE * rate]
    channels = f"in {off.numel()} of {rates.numel()} channels, " if rates.dim() else ""
    note = f"no threshold gives the rate: {channels}the nearest is {off.mean():.3g}"
    return _Found(rates.mean().item(), note if off.numel() else "")


def _replay(node: Any, calls: list[_Call]) -> list[Tensor]:
    """The spikes of ``node`` by itself on ``calls``."""
    spikes = []
    for from_rest, forward in calls:
        if from_rest:
            node.reset()
        spikes.append(spikes_of(forward()))
    return spikes


def _rates(node: Any, spikes: list[Tensor], threshold: Tensor) -> Tensor:
    """Spikes per neuron and step over several calls, in the shape of ``threshold``."""
    if threshold.numel() == 1:
        spikes = [s.reshape(-1) for s in spikes]
    else:
        channel = 2 if node.step_mode == "m" else 1
        spikes = [s.movedim(channel, 0).flatten(1) for s in spikes]
    total = torch.stack([s.sum(-1, dtype=torch.float64) for s in spikes]).sum(0)
    count = sum(s.shape[-1] for s in spikes)
    return (total / count).reshape(threshold.shape).to(threshold)


def _threshold(node: Any) -> Tensor:
    value = node.v_threshold
    return value.detach() if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)


def _set_threshold(node: Any, threshold: Tensor) -> None:
    if isinstance(node.v_threshold, Tensor):
        node.v_threshold.copy_(threshold)
    else:
        node.v_threshold = threshold.item()


@contextmanager
def _restore_states(net: nn.Module) -> Iterator[None]:
    """Restore the states and buffers of ``net`` afterwards, and after an error the thresholds."""
    nodes = (module for module in net.modules() if isinstance(module, neuron.BaseNode))
    thresholds = [(node, _threshold(node).clone()) for node in nodes]
    modules = [module for module in net.modules() if isinstance(module, base.MemoryModule)]
    states = [(m, dict(m.named_memories()), vars(m).get("v_seq")) for m in modules]
    buffers = [(buffer, buffer.clone()) for buffer in net.buffers()]
    try:
        yield
    except BaseException:
        for node, threshold in thresholds:
            _set_threshold(node, threshold)
        raise
    finally:
        for module, memories, v_seq in states:
            for name, value in memories.items():
                setattr(module, name, value)
            if "v_seq" in vars(module):
                module.v_seq = v_seq
        for buffer, value in buffers:
            if not torch.equal(buffer, value):  # so that graphs that saved it stay valid
                buffer.copy_(value)
