"""LIF, PLIF and IF neurons in less memory and time, with all else as it was."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from functools import partial
from statistics import median
from typing import Any

import torch
from spikingjelly.activation_based import functional, neuron
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from . import _compat, _graph, _spikes, _sums, convert
from ._checks import check_example_input, check_net
from ._forward import PackingForward
from ._fused_neuron import KINDS, FusedNeuron, restore
from .fusion import fuse_norm, unfuse_norm
from .ops import backends, surrogate
from .ops.alif import reference
from .packing import packed_spikes
from .report import Row, table_of
from .tracing import has_hooks

__all__ = ["Acceleration", "accelerate", "unaccelerate"]

_ALREADY = "on the fused operator already"


def accelerate(net: nn.Module, example_input: Any = None) -> Acceleration:
    """Train ``net`` in less memory and time with equal outputs; changes it in place.

    Its LIF, PLIF and IF neurons run on the fused operator and learn what they learned before, its
    norms are fused (:func:`.fuse_norm`) and its spikes saved as bits (:func:`.packed_spikes`). A
    residual sum of a norm's output with spikes, or with another's, is computed again in backward.
    Outputs are equal as :func:`.swap_neurons` promises, and to rounding behind a fused norm. Every
    module stays the same object, with its parameters, ``state_dict`` keys, hooks and voltages, so
    optimizers and checkpoints made before go on working; only a neuron's class becomes a subclass
    of its own. In half precision these neurons compute, and keep voltages, in float32.

    Args:
        net: any module with SpikingJelly neurons, ALIF included, in step mode ``"m"``.
        example_input: an input of ``net`` (a tuple for several), to measure a training step before
            and after, on a copy.

    Raises:
        ValueError: ``net`` has no neuron.
        TypeError: ``net`` is no module, or ``example_input`` neither a tensor nor a tuple.

    >>> net = nn.Sequential(nn.Linear(4, 3), neuron.LIFNode(step_mode="m"))
    >>> with accelerate(net) as report:
    ...     print(report)
    1 neurons on the fused operator, 0 norms fused, spikes saved as bits
    layer  kind     done            note
    1      LIFNode  fused operator  equal outputs
    >>> type(net[1]) is neuron.LIFNode
    True
    """
    check_net(net, "accelerate")
    convert.need_neurons(net, "accelerate")
    measured: Any = (None, None)
    if example_input is not None:
        check_example_input(example_input)
        measured = _measure(net, example_input)
    report = Acceleration(net)
    report.saved_bytes, report.step_ms = measured
    return report


def unaccelerate(net: nn.Module) -> None:
    """Undo :func:`.accelerate` in place without its report, as in a copy or a loaded net.

    It undoes :func:`.fuse_norm` and :func:`.packed_spikes` too, and leaves reports made before with
    nothing to undo.

    >>> import copy
    >>> net = nn.Sequential(nn.Linear(4, 3), neuron.LIFNode(step_mode="m"))
    >>> report = accelerate(net)
    >>> loaded = copy.deepcopy(net)
    >>> unaccelerate(loaded)
    >>> type(loaded[1]) is neuron.LIFNode, type(net[1]) is neuron.LIFNode
    (True, False)
    """
    check_net(net, "unaccelerate")
    restore(net)


class Acceleration(AbstractContextManager["Acceleration"]):
    """The report of :func:`.accelerate`: ``print`` it. The end of ``with`` calls :meth:`undo`.

    Attributes:
        rows: a :class:`~sj_taid.report.Row` for each neuron and norm.
        saved_bytes: bytes saved for backward, before and after, if there was an example input.
        step_ms: milliseconds of a training step, before and after, measured in turns.
    """

    saved_bytes: tuple[int, int] | None = None
    step_ms: tuple[float, float] | None = None

    def __init__(self, net: nn.Module) -> None:
        self._net, self._bits = net, "no spikes saved as bits"
        self._nodes: list[neuron.BaseNode] = []
        #: what takes back each change
        self._undo: list[Callable[[], Any]] = []
        try:
            rows = self._change(net)
        except BaseException:
            self.undo()
            raise
        self.rows = tuple(rows[path] for path, _ in net.named_modules() if path in rows)

    def _change(self, net: nn.Module) -> dict[str, Row]:
        """Accelerate ``net``; the row of each neuron and norm by its path."""
        rows: dict[str, Row] = {}
        find: Any = net.get_submodule
        mark = object()
        for site in convert.find_neurons(net, neuron.BaseNode):
            node, reason = site.node, _why_not(site)
            note = reason or convert.describe_equality(site)
            rows[site.path] = site.row("" if reason else "fused operator", note)
            if not reason:
                node.__class__, node._name, node._mark = _accelerated(type(node)), site.path, mark
                self._undo.append(partial(_restore, node, mark))
                self._nodes.append(node)
        fused = fuse_norm(net)
        rows |= {row.layer: row for row in fused.rows}
        readers = {node.norm: node for node in net.modules() if isinstance(node, FusedNeuron)}
        for norm in (find(row.layer) for row in fused.changed):
            self._undo.append(partial(_unfuse, readers[norm], norm.forward))
        for norm, reader in _sums.recompute_sums(net).items():
            rows[norm] = rows[norm]._replace(
                done=f"recomputed for {reader}", note="equal outputs, and its sum is not saved"
            )
            self._undo.append(find(norm).forward.remove)
        if any(type(module) in KINDS for module in net.modules()):
            with suppress(ValueError):  # no layer saves spikes
                self._undo.append(packed_spikes(net).remove)
                self._bits = "spikes saved as bits"
        return rows

    def undo(self) -> None:
        """Take back what this call did, in place; warns if neurons have left the net since.

        Of a copy or a loaded net, :func:`.unaccelerate` takes everything back.
        """
        while self._undo:
            self._undo.pop()()
        if gone := len({*self._nodes} - {*self._net.modules()}):
            message = (
                f"{gone} accelerated neurons have left the net; undo() does not bring them back"
            )
            warnings.warn(message, stacklevel=2)

    def __exit__(self, *error: object) -> None:
        self.undo()

    def __str__(self) -> str:
        said = [row.done or row.note for row in self.rows]
        neurons = sum(text in ("fused operator", _ALREADY) for text in said)
        norms = sum(text.startswith(("fused into", "fused already")) for text in said)
        lines = [f"{neurons} neurons on the fused operator, {norms} norms fused, {self._bits}"]
        if self.saved_bytes and self.step_ms:
            (old_bytes, new_bytes), (old, new) = self.saved_bytes, self.step_ms
            slower = "" if new <= 1.1 * old else " (slower: undo() takes it back)"
            lines.append(
                f"saved for backward {old_bytes / 1e6:.3g} -> {new_bytes / 1e6:.3g} MB, "
                f"step {old:.3g} -> {new:.3g} ms{slower}"
            )
        return "\n".join([*lines, table_of(self.rows)])


def _restore(node: Any, mark: object) -> None:
    """Give a neuron back, unless :func:`unaccelerate` has."""
    if vars(node).get("_mark") is mark:
        node.restore()


def _unfuse(node: Any, pass_on: object) -> None:
    """Take a norm out of a neuron, unless :func:`unaccelerate` has."""
    norm = getattr(node, "norm", None)
    if norm is not None and vars(norm).get("forward") is pass_on:
        unfuse_norm(node)


def _why_not(site: convert.Site) -> str | None:
    """Why a neuron is left as it is, or ``None``."""
    node, forward = site.node, vars(site.node).get("forward")
    if isinstance(node, convert.ALIFNode) and node.backend == "torch":
        return "its backend is torch"
    if isinstance(node, FusedNeuron):
        return _ALREADY
    if node.step_mode != "m":
        return (
            "it runs step by step: functional.set_step_mode(net, 'm') first, but only if the net's "
            "forward takes the whole sequence [T, N, *] and does not loop over time"
        )
    if reason := convert.why_no_alif(node) or surrogate.unsupported(node.surrogate_function):
        return reason
    patched = _spikes.is_patched(node, forward if isinstance(forward, PackingForward) else None)
    if patched or has_hooks(node.surrogate_function):
        return "a function of its own or a hook in it, which the fused operator would not call"
    x = torch.empty(1, 1, dtype=site.dtype, device=site.device)
    backend = backends.resolve(backends.AUTO, x, node.surrogate_function)
    if backend.multi_step is reference.multi_step:
        return f"no fused operator for {x.dtype} on {x.device.type}: python -m sj_taid.doctor"
    return None


@torch.inference_mode(False)
def _measure(net: nn.Module, inputs: Any) -> tuple[Any, Any]:
    """Bytes saved by a training step and its milliseconds, each before and after, in turns."""
    net, turns = convert.copy_net(net), []
    inputs = tree_map_only(Tensor, lambda t: t.detach().requires_grad_(t.requires_grad), inputs)
    with torch.random.fork_rng({p.device for p in net.parameters() if p.is_cuda}):
        for _ in range(6):  # the first compiles the kernels
            before = _run_step(net, inputs)
            with Acceleration(net):
                turns.append((before, _run_step(net, inputs)))
    (old_bytes, _), (new_bytes, _) = turns[0]
    old, new = (median(ms for _, ms in steps[1:]) for steps in zip(*turns, strict=True))
    return (old_bytes, new_bytes), (old, new)


@torch.enable_grad()
def _run_step(net: nn.Module, inputs: Any) -> tuple[int, float]:
    """Forward from rest and, if something requires a gradient, backward: saved bytes and ms."""
    functional.reset_net(net)
    start = time.perf_counter()

    def forward() -> list[Tensor]:
        outputs = tree_leaves(net(*inputs) if isinstance(inputs, tuple) else net(inputs))
        return [t.float().sum() for t in outputs if isinstance(t, Tensor) and t.requires_grad]

    losses, saved = _graph.record_saved(net, forward)
    saved_bytes = sum(tensor.untyped_storage().nbytes() for tensor in saved)
    del saved
    if losses:
        torch.stack(losses).sum().backward()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return saved_bytes, 1e3 * (time.perf_counter() - start)


class _Accelerated(FusedNeuron):
    """A SpikingJelly neuron whose forward is the fused operator; all else is its own."""

    def restore(self) -> None:
        super().restore()
        self.__class__ = type(self).__bases__[1]
        for name in ("_name", "_mark"):
            self.__dict__.pop(name, None)

    def materialize_states(
        self, inputs: tuple[Tensor, ...], states: tuple[Any, ...], step_mode: str
    ) -> tuple[Any, ...]:
        """As in SpikingJelly: 2.x moves a voltage, and starts again if its shape is another."""
        x, v = inputs[0], states[0]
        if isinstance(v, Tensor) and _compat.FUNCTIONAL_STATES:
            fits = v.shape == (x.shape[1:] if step_mode == "m" else x.shape)
            v = v.to(x.device) if fits else self.v_reset or 0.0
        return (v,)

    def _operands(self, x_seq: Tensor) -> dict[str, Any]:
        node: Any = self
        dtype = reference.state_dtype(x_seq.dtype)
        w = getattr(node, "w", convert.NO_LEAK_W)  # PLIF's own, or IF's
        if isinstance(node, neuron.LIFNode):
            if reason := convert.why_no_w(node.tau):
                raise ValueError(f"{self._label()}: {reason}; sj_taid.unaccelerate(net) first")
            w = convert.nearest_w(node.tau, dtype)
        operands = {
            name: value if isinstance(value, Tensor) else x_seq.new_full((), value, dtype=dtype)
            for name, value in {"w": w, "v_threshold": node.v_threshold}.items()
        }
        return operands | {"decay_input": getattr(node, "decay_input", False)}


class IFNode(_Accelerated, neuron.IFNode):
    """IF on the fused operator."""


class LIFNode(_Accelerated, neuron.LIFNode):
    """LIF on the fused operator."""


class ParametricLIFNode(_Accelerated, neuron.ParametricLIFNode):
    """PLIF on the fused operator."""


#: They have SpikingJelly's names, which reports, errors and ``print(net)`` say.
_ACCELERATED = {kind.__bases__[1]: kind for kind in _Accelerated.__subclasses__()}
KINDS.update(_ACCELERATED.values())


def _accelerated(kind: type) -> type:
    """The accelerated class of a plain neuron, or of a subclass that only fills in defaults."""
    if kind not in _ACCELERATED:
        _ACCELERATED[kind] = type(kind.__name__, (_Accelerated, kind), {"__doc__": kind.__doc__})
        KINDS.add(_ACCELERATED[kind])
    return _ACCELERATED[kind]
