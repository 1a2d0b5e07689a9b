"""Integer nets on spikes of 0 and 1 alone, with their additions counted: :func:`binary`."""

import csv
import math
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import BaseTorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ._internal import compat
from ._internal.checks import check_sizes
from ._internal.graph import storage_of
from .counts import Counts, split_counts
from .nets.neurons import check_net
from .nets.report import table
from .nets.summary import norms_of
from .ops.surrogate import levels_of

_aten = torch.ops.aten
_CONVOLUTION = _aten.convolution.default
_MATMUL = (_aten.mm.default, _aten.bmm.default, _aten.addmm.default, _aten.baddbmm.default)
_PRODUCTS = (_CONVOLUTION, *_MATMUL)
#: torch's names of what compares or divides, of products that are not taken apart, of those of
#: single values, and of their sums
_NO_SUM = re.compile("softmax|max_pool")
_UNKNOWN = re.compile(r"conv(?!ert)|(mm|mv|dot|addr|linear)_?$|attention|rnn|cdist|fft")
_SINGLE = re.compile(r"(mul|div|addcmul|addcdiv|pow|glu|prod|cumprod)_?$")
_SUMS = re.compile(r"(sum|mean|cumsum)_?$")
#: what copies values and makes none
_COPIES = re.compile(r"clone|_to_copy|cat$|stack$|max_pool")
#: what a tensor is made of: of nothing, of weights too, of an input too; and an input times weights
_CONSTANT, _WEIGHT, _ACTIVATION, _WEIGHTED = range(4)
_HEAD = ("layer", "operation", "reads", "ones", "additions", "macs", "energy_nj")


@dataclass
class Operation:
    """What an operation read and cost, over all its calls and samples."""

    layer: str  #: the path of the module that calls it
    operation: str  #: torch's name of it
    levels: list[float]  #: the largest count of each activation read, infinity of real numbers
    most: list[int | None]  #: the largest that the neuron gives that made it, if one did
    number: int = 1  #: of its calls in one of the layer: attention's first product, and its second
    values: int = 0  #: how many zeros and ones its slices have
    ones: int = 0  #: how many of them are ones
    additions: int = 0  #: ones times their fan-out
    macs: int = 0  #: multiply-accumulates, where it reads real numbers alone

    @property
    def energy_nj(self) -> float:
        """0.9 pJ an addition, 4.6 pJ a multiply-accumulate: Horowitz, ISSCC 2014, for 45 nm."""
        return (0.9 * self.additions + 4.6 * self.macs) / 1000

    @property
    def is_spiking(self) -> bool:
        """Whether it sums, and reads nothing but spikes and counts."""
        return math.inf not in self.levels and not _NO_SUM.search(self.operation)

    def cells(self, samples: int = 1, is_one: bool = True) -> tuple[str, ...]:
        """The row of a table, of one sample; ``is_one``: its layer has no other of its name."""
        names = dict.fromkeys(map(_describe, self.levels, self.most))
        share = f"{self.ones / self.values:.4f}" if self.values else ""
        costs = (f"{x / samples:.12g}" for x in (self.additions, self.macs, self.energy_nj))
        operation = self.operation if is_one else f"{self.operation} {self.number}"
        return (self.layer, operation, " and ".join(names), share, *costs)


@dataclass
class BinaryReport:
    """What ran inside :func:`.binary`; ``print`` it for a table of the costs of one sample."""

    samples: int = 1  #: how many samples ran, all together
    rows: list[Operation] = field(default_factory=list)  #: in the order of their first calls

    @property
    def energy_nj(self) -> float:
        """The energy of one sample."""
        return self._total().energy_nj / self.samples

    @property
    def not_spiking(self) -> list[Operation]:
        """What keeps the net from being spike-driven; its first product may read an image."""
        may_read = bool(self.rows) and not self.rows[0].operation.endswith("not counted")
        return [row for row in self.rows[may_read:] if not row.is_spiking]

    def _total(self) -> Operation:
        """The sum of the rows."""
        total = Operation("sum", "", [], [])
        for row in self.rows:
            for name in ("values", "ones", "additions", "macs"):
                setattr(total, name, getattr(total, name) + getattr(row, name))
        return total

    def _cells(self) -> list[tuple[str, ...]]:
        calls = Counter((row.layer, row.operation) for row in self.rows)
        cells = [row.cells(self.samples, calls[row.layer, row.operation] == 1) for row in self.rows]
        return [*cells, self._total().cells(self.samples)]

    def to_markdown(self) -> str:
        """The table in Markdown."""
        lines = [_HEAD, ("---",) * len(_HEAD), *self._cells()]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def to_csv(self, path: str | Path) -> None:
        """Write the table."""
        temporary = Path(f"{path}.tmp")
        with temporary.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([_HEAD, *self._cells()])
        temporary.replace(path)

    def __str__(self) -> str:
        if not self.rows:
            return "nothing ran: call the net inside the with block"
        listed = table(_HEAD, self._cells())
        others = ", ".join(f"{row.layer} ({row.operation})" for row in self.not_spiking)
        driven = f"not spike-driven: {others}" if others else "spike-driven but for the first input"
        of = f"one sample of {self.samples}" if self.samples > 1 else "all that ran"
        return f"{listed}\ncosts of {of}; {driven}"


def _describe(levels: float, most: int | None) -> str:
    """What has been read: counts, by their largest and, beside it, what their neuron may give."""
    if levels == math.inf:
        return "real numbers"
    of = f" of {most}" if most is not None and most > 1 and levels <= most else ""
    return f"counts up to {levels:g}{of}" if levels > 1 or of else "spikes"


@contextmanager
def binary(net: nn.Module, *, samples: int = 1) -> Iterator[BinaryReport]:
    r"""Run a net on spikes of 0 and 1 alone, and count what that costs.

    Inside, every convolution, linear layer and matrix product that reads counts c from 0 to D, or
    these times a number f such as 1/D, computes

    .. math:: W (f c) + b = f \sum_{k=1}^{D} W \, 1[c \ge k] + b

    so outputs are the net's to rounding, and nothing in it changes. It may be any net of torch.
    Counts are known by their values, in each call: whole numbers from 0 to 15, or these times one
    number. Larger and negative ones are real numbers. A product of two activations, as in
    attention, is taken apart by both. Parameters and buffers are weights until an activation is
    written into them; what is made of weights alone is not counted. There are no gradients;
    compiled nets run uncompiled, and accelerated ones with plain norms and neurons.

    Args:
        net: any module.
        samples: how many samples the calls inside have, all together: the report's table has the
            costs of one.

    Yields:
        A :class:`BinaryReport`, which grows with each call of the net.
    """
    check_net(net)
    check_sizes(samples=samples)
    slices = _Slices(net, samples)
    torch.clear_autocast_cache()
    with (
        ExitStack() as hooks,
        torch.no_grad(),
        torch.compiler.set_stance("force_eager"),
        sdpa_kernel(SDPBackend.MATH),
        BaseTorchFunctionMode(),  # keeps torch's encoder layers from their fused forms
        slices,
    ):
        for path, module in net.named_modules():
            if not isinstance(module, torch.jit.ScriptModule):  # which takes no hooks
                enter = partial(slices.enter, path or "net")
                hooks.enter_context(module.register_forward_pre_hook(enter))
                hooks.enter_context(module.register_forward_hook(slices.leave, always_call=True))
        yield slices.report


class _Slices(TorchDispatchMode):
    """A dispatch mode, which sees all products, that computes those of counts slice by slice."""

    def __init__(self, net: nn.Module, samples: int) -> None:
        super().__init__()
        self.report = BinaryReport(samples)
        self.rows: dict[tuple[str, str, int], Operation] = {}
        self.running: list[tuple[str, Counter[str]]] = []  # modules, and what they have called
        weights = (*net.parameters(), *net.buffers())
        self.kinds: dict[Any, int] = {storage_of(weight): _WEIGHT for weight in weights}
        self.most: dict[Any, int] = {}  # of a neuron's output, by its storage
        norms = dict(norms_of(net))
        self.unlisted = {
            path or "net"
            for path, module in net.named_modules()
            if path in norms or isinstance(module, compat.NEURONS)
        }

    def enter(self, path: str, *_: Any) -> None:
        self.running.append((path, Counter()))

    def leave(self, module: Any, _: Any, output: Any) -> None:
        self.running.pop()
        if isinstance(module, compat.NEURONS) and isinstance(output, Tensor):
            self.most[storage_of(output)] = levels_of(module.surrogate_function)
        if not self.running:
            for found in (self.kinds, self.most):
                for key in [key for key in found if key is None or key.expired()]:
                    del found[key]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.running:  # outside the net
            return func(*args, **kwargs)
        kinds = {min(self.kind_of(t), _ACTIVATION) for t in _tensors((args, kwargs))}
        if kinds == {_WEIGHT}:  # could be computed once
            output = func(*args, **kwargs)
        elif func in _PRODUCTS:
            output = self.multiply(func, args, kwargs)
        else:
            with self:  # what is made of other operations, and whole in inference mode
                output = func.decompose(*args, **kwargs)
            if output is not NotImplemented:
                return output
            self.look_at(func, args)
            output = func(*args, **kwargs)
        self.note(func, args, kwargs, output, max(kinds, default=_CONSTANT))
        return output

    def note(self, func: Any, args: Any, kwargs: Any, output: Any, kind: int) -> None:
        """Keep the kind of what an operation of inputs of this kind has made, or written into."""
        if torch.Tag.nondeterministic_seeded in func.tags:
            kind = _ACTIVATION
        elif func is _aten.lift_fresh.default:  # a tensor of Python's numbers
            kind = _CONSTANT
        elif kind == _ACTIVATION and self.is_listed() and self.weights_in(_factors(func, args)):
            kind = _WEIGHTED
        arguments = func._schema.arguments
        given = dict(zip((one.name for one in arguments), args, strict=False)) | kwargs
        written = [one.name for one in arguments if one.alias_info and one.alias_info.is_write]
        written = _tensors([given.get(name) for name in written])
        for tensor in written:
            self.kinds.pop(storage_of(tensor), None)
            self.most.pop(storage_of(tensor), None)
        most = self.most_of(_tensors(args)) if _COPIES.match(_name(func)) else [None]
        if None not in most:
            self.most[storage_of(_tensors(output)[0])] = max(filter(None, most))
        for tensor in _tensors((output, written)):
            if key := storage_of(tensor):
                self.kinds.setdefault(key, kind)  # that of a view is there

    def kind_of(self, tensor: Tensor) -> int:
        """What a tensor is made of, by its storage: a net may write into its parts."""
        return self.kinds.get(storage_of(tensor), _ACTIVATION)

    def most_of(self, tensors: list[Tensor]) -> list[int | None]:
        """The most that the neurons give that made these."""
        return [self.most.get(storage_of(tensor)) for tensor in tensors]

    def is_listed(self) -> bool:
        """Whether nothing runs whose products of single values are its own: norms and neurons."""
        return not any(path in self.unlisted for path, _ in self.running)

    def weights_in(self, factors: list[Tensor]) -> bool:
        """Whether among factors are real weights, not one for all."""
        fixed = [t for t in factors if self.kind_of(t) < _ACTIVATION and t.numel() > 1]
        return not all(split_counts(weight).are_few for weight in fixed)

    def look_at(self, func: Any, args: Any) -> None:
        """Report an operation that is no product if it is no sum, or not known."""
        name = _name(func)
        if _NO_SUM.search(name) and self.rows:
            levels = split_counts(args[0]).levels
            if levels > 1 or "softmax" in name:  # the largest of spikes is a spike
                self.row(name, [levels], self.most_of([args[0]]))
        elif _UNKNOWN.search(name) or (self.is_listed() and self.multiplies(func, args)):
            self.row(f"{name}, not counted", [math.inf], [None])

    def multiplies(self, func: Any, args: Any) -> bool:
        """Whether single values are multiplied that are real, or as a part of a product."""
        if _SUMS.match(_name(func)):
            return self.kind_of(_tensors(args)[0]) == _WEIGHTED
        factors = _factors(func, args)
        read = [t for t in factors if self.kind_of(t) >= _ACTIVATION]
        if read and self.weights_in(factors):  # each value by many of them, as an outer product
            size = torch.broadcast_shapes(*(t.shape for t in factors)).numel()
            return size > max(t.numel() for t in read)
        real = [t for t in read if t.is_floating_point() and not split_counts(t).are_few]
        least = 2 if _name(func).startswith(("mul", "div", "add")) else 1
        return bool(self.rows) and len(real) >= least

    def multiply(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        """Compute a product, and what is added to it, by slices of the counts that it reads."""
        *added, a, b = args
        if func is _CONVOLUTION:
            a, b, bias, *how = args
            added = [] if bias is None else [bias.view(-1, *[1] * (b.dim() - 2))]

        def times(x: Tensor, y: Tensor) -> Tensor:
            return func(x, y, None, *how) if func is _CONVOLUTION else torch.matmul(x, y)

        name, kinds = _name(func), (self.kind_of(a), self.kind_of(b))
        if kinds == (_WEIGHT, _WEIGHT):
            return func(*args, **kwargs)
        if sparse := {t.layout for t in (a, b)} - {torch.strided}:
            self.row(f"{name} of {sparse.pop()}, not counted", [math.inf], [None])
            return func(*args, **kwargs)
        # A constant times weights may be the net's input.
        read = [kind >= _ACTIVATION or max(kinds) <= _WEIGHT != kind for kind in kinds]
        x, y = (split_counts(t) if r else Counts(t) for t, r in zip((a, b), read, strict=True))
        levels = [c.levels for c, r in zip((x, y), read, strict=True) if r]
        activations = [t for t, r in zip((a, b), read, strict=True) if r]
        row = self.row(name, levels, self.most_of(activations))
        counts = [c for c in (x, y) if c.are_few]
        if not counts:
            from torch.utils.flop_counter import flop_registry  # which import sj_taid needs not

            output = func(*args, **kwargs)
            row.macs += flop_registry[func.overloadpacket](*args, out_val=output) // 2
            return output
        row.ones += sum(int(c.values.sum(dtype=torch.float64)) for c in counts)
        row.values += sum(c.values.numel() * int(c.levels) for c in counts)
        row.additions += int(times(x.weights(), y.weights()).sum(dtype=torch.float64))
        if all(c.levels == c.factor == 1 for c in counts):
            return func(*args, **kwargs)
        wide = torch.promote_types(a.dtype, torch.float32)
        total = sum(times(s, t).to(wide) for s in x.slices() for t in y.slices())
        total = total * (x.factor * y.factor * kwargs.get("alpha", 1))
        if added and (beta := kwargs.get("beta", 1)):
            total = total + added[0] * beta
        return total.to(a.dtype)

    def row(self, operation: str, levels: list[float], most: list[int | None]) -> Operation:
        """The report's row of this call of the running module, and what it reads."""
        layer, called = self.running[-1]
        called[operation] += 1
        key = layer, operation, called[operation]
        if key not in self.rows:
            self.rows[key] = Operation(layer, operation, levels, most, called[operation])
            self.report.rows.append(self.rows[key])
        row = self.rows[key]
        row.levels = [*map(max, row.levels, levels)]
        return row


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def _name(func: Any) -> str:
    return func.__name__.partition(".")[0]


def _factors(func: Any, args: Any) -> list[Tensor]:
    """What an operation multiplies value by value, or divides by."""
    name = _name(func)
    return _tensors(args)[name.startswith("addc") :] if _SINGLE.match(name) else []
