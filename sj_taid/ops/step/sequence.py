"""The step of a module that loops over time by itself, found in the trace of a whole sequence.

The forward is traced for a few steps. A line belongs to the step of the last input that it depends
on, and what a step uses of the one before are its states. All steps must be the same lines. Then
the forward runs once more, and there the states become leaves of autograd as soon as the step
begins, so that torch's own backward of this one step is recorded, surrogates' too.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from ..._internal import compat, graph
from .code import check_code
from .program import MOST_STATES, NotRead, Reading
from .read import FULL, odd_shapes, read_alike, read_trace, tensors_of
from .record import Neuron, Notes, recording
from .trace import (
    Call,
    Opaque,
    Recorder,
    Trace,
    calls_from_spikingjelly,
    dtype_of,
    example,
    find_reach,
    random_states,
    tracing,
    undisturbed,
)
from .verify import differs, run_plan

#: steps of a trace, if the module does not say how many; and of the check
STEPS, LENGTHS = 5, (1, 3, 6)
#: the most numbers of the first step that are tried for the states before it
_MOST_STARTS = 6
#: operations that only move values
_MOVES = frozenset(
    (
        *("view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "select", "slice", "unbind"),
        *("stack", "cat", "permute", "transpose", "t", "split", "split_with_sizes", "expand"),
        *("alias", "detach", "clone", "copy_", "_reshape_alias"),
    )
)
_BLOCK = 1 << 32  #: values of one tensor have this many numbers
_WHOLE = "reads several steps at once"


class Layout(NamedTuple):
    """How a sequence lies in a module's input: the ``run`` of its :class:`.record.Neuron`."""

    axis: int  #: of time
    steps: int = 0  #: the only number of steps that it takes, or 0
    is_folded: bool = False  #: whether the first axis is [T * N]
    length: int = 0  #: of a call's sequences, which the check runs too

    def enter(self, x: Tensor) -> Tensor:
        """The sequence with time first."""
        return x.unflatten(0, (self.steps, -1)) if self.is_folded else x.movedim(self.axis, 0)

    def leave(self, y: Tensor) -> Tensor:
        """The same back."""
        return y.flatten(0, 1) if self.is_folded else y.movedim(0, self.axis)

    def fits(self, x: Tensor) -> bool:
        """Whether an input can be such a sequence."""
        if x.dim() < 2 + (not self.is_folded) or not x.is_contiguous() or not x.numel():
            return False
        size = x.shape[self.axis]
        return not self.steps or (size % self.steps == 0 if self.is_folded else size == self.steps)

    def neuron(self, node: Any, only: Collection[str] | None = None) -> Loop:
        return Loop(node, self, only)


class Loop(Neuron):
    """A module whose forward loops over time, as its step can be read."""

    def __init__(self, node: Any, layout: Any, only: Collection[str] | None = None) -> None:
        super().__init__(node, layout, only)
        self.layout: Layout = layout
        self.states: list[str] = []
        self.memories: dict[str, Any] = {}

    def read(self, shape: Sequence[int], notes: Notes) -> Reading:
        self.notes, notes.is_loop = notes, True
        notes.outside |= check_code(getattr(self.node, "_taid_kind", type(self.node)))
        tensors = list(self.tensors.values())
        per_channel = any(t.numel() != 1 for t in tensors)
        steps = self.layout.steps or STEPS
        if steps < 3:
            raise NotRead(f"takes sequences of {steps} steps alone, too few to tell them apart")

        def read_once(shape: Any, dtype: torch.dtype) -> tuple[Reading, bool]:
            trace, found = _trace(self, steps, tensors, shape, dtype)
            reading = read_trace(trace, len(found.starts), shape)
            return reading._replace(starts=found.starts, keeps=found.keeps), trace.asks_dtype

        reading = read_alike(read_once, odd_shapes(shape, per_channel, (steps,)))
        self.states = [f"s{k}" for k in range(reading.states)]
        return reading

    def _forward(self, x: Tensor, tensors: Sequence[Tensor]) -> Any:
        """The module's own forward, of a copy with other tensors."""
        notes = self.notes
        notes.copies.clear()
        named = dict(zip(self.tensors, tensors, strict=True))
        copied = recording(self.node, notes, named)
        if "_memories" in vars(copied):  # of a neuron, which begins as after a reset
            self.memories = {n: compat.reset_value(self.node, n) for n in copied._memories}
            vars(copied)["_memories"] = self.memories
        return getattr(self.node, "_taid_kind", type(self.node)).forward(copied, x)

    def verify(
        self, reading: Reading, shape: tuple[int, ...], engine: Any, device: Any
    ) -> str | None:
        """Why a reading is not used: sequences of other lengths differ from the module's own."""
        sizes = 2, *shape[1:2], *[3] * (len(shape) - 2)
        with undisturbed(), torch.enable_grad():
            lengths = dict.fromkeys((*LENGTHS, self.layout.length or LENGTHS[0]))
            for steps, scale in itertools.product(lengths, (0.5, 1.0, 2.0)):
                seen = self.layout.steps or steps, *sizes
                if self._differs(reading, seen, scale, engine, device):
                    return "what was found in its loop over time gives other values than it"
        return None

    def _differs(
        self, reading: Reading, sizes: Any, scale: float, engine: Any, device: Any
    ) -> bool:
        generator = torch.Generator().manual_seed(sizes[0])
        normal: Any = partial(torch.randn, generator=generator, device="cpu")
        x_seq, upstream = normal(sizes).mul_(scale).to(device), normal(sizes).to(device)
        tensors = [t.detach().to(device, torch.float32, copy=True) for t in self.tensors.values()]
        found = []
        for is_plain in (True, False):
            leaves = [t.clone().requires_grad_() for t in (x_seq, *tensors)]
            if is_plain:
                x = self.layout.leave(leaves[0]).contiguous()
                y = self._forward(x, leaves[1:])
                if not isinstance(y, Tensor) or y.shape != x.shape:
                    return True
                y = self.layout.enter(y)
            else:
                states = [None] * reading.states
                y = run_plan(engine, reading, reading.starts, leaves[0], states, leaves[1:])[0]
            grads: Any = [None] * len(leaves)
            if y.requires_grad:
                grads = torch.autograd.grad(y, leaves, upstream, allow_unused=True)
            found.append([y, *grads])
        ends = list(zip(*found, strict=True))
        ends = ends if torch.equal(*ends[0]) else ends[:2]  # a spike more, another gradient
        return any(differs(a, b, k == 0, reading.exact) for k, (a, b) in enumerate(ends))


class _Size(int):
    """A size of the input that is not the number of steps: nothing is decided by it."""

    def _decide(self, other: Any) -> bool:
        if isinstance(other, _Size):
            return int.__eq__(self, other)
        raise NotRead("decides something by a size of its input")

    __eq__ = __lt__ = __le__ = __gt__ = __ge__ = _decide
    __hash__ = int.__hash__

    def __ne__(self, other: object) -> bool:
        return not self._decide(other)

    def __bool__(self) -> bool:
        raise NotRead("decides something by a size of its input")


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "floordiv", "mod"):

    def _compute(self: Any, other: Any, _of: Any = getattr(int, f"__{_name}__")) -> Any:
        found = _of(self, other)
        return _Size(found) if type(found) is int else found

    setattr(_Size, f"__{_name}__", _compute)


class _Tracker(Recorder):
    """Notes every operation of a sequence, and of which step each value is.

    ``places`` hold, in the shape of a tensor that was moved about, the numbers of its values: of
    block ``b`` from ``b * _BLOCK``, of constants -1.
    """

    def __init__(self, x: Tensor, layout: Layout, steps: int, shape: Any) -> None:
        super().__init__()
        self.layout, self.count, self.is_forward = layout, steps, True
        shape = torch.Size(shape)
        numbers = torch.arange(shape.numel(), device="cpu").view(shape)
        self.places = {
            id(x): layout.leave(torch.stack([numbers + t * _BLOCK for t in range(steps)]))
        }
        self.blocks: list[Any] = [None] * steps  # an input's tensor is the first that is made of it
        self.block_shapes: list[Any] = [shape] * steps
        self.steps: dict[int, int] = {}
        self.made: dict[int, int] = {}  # a tensor -> the call that it is of
        self.others: dict[int, Tensor] = {}  # what is a step's tensor, moved in and out of a whole

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if self.is_forward:
            try:
                self._follow(self.calls[-1])
            except NotRead as error:
                self.error = self.error or error
                raise
        return result

    def find(self, place: Tensor | None) -> Tensor | None:
        """The tensor of a step whose values these numbers are, all of them and in order."""
        if place is None or not place.numel() or (first := int(place.flatten()[0])) < 0:
            return None
        block, shape = first // _BLOCK, self.block_shapes[first // _BLOCK]
        numbers = torch.arange(shape.numel(), device="cpu").view(shape) + block * _BLOCK
        return self.blocks[block] if torch.equal(place, numbers) else None

    def owner(self, tensor: Tensor) -> Tensor:
        """The tensor that this one is equal to, moved about; itself without."""
        found = self.find(self.places.get(id(tensor)))
        return tensor if found is None else found

    def _follow(self, call: Call) -> None:
        given = tensors_of(call)
        results = call.results
        if call.name in FULL:
            for result in results:
                self.places[id(result)] = torch.full(result.shape, -1, device="cpu")
            return
        if torch.Tag.nondeterministic_seeded in call.function.tags:
            raise NotRead(f"has random numbers ({call.name})")
        is_moved = call.name in _MOVES and any(id(t) in self.places for t in given)
        if call.name.endswith("_") and call.name[0] != "_" and not (is_moved and self._fills(call)):
            raise NotRead(f"changes a tensor in place ({call.name}): write h = h * 2 for h.mul_(2)")
        known = [self._step_of(t, is_moved) for t in given]
        step = max((t for t in known if t is not None), default=None)
        if is_moved:
            self._move(call, results)
        is_whole = is_moved and any(
            t is None and id(a) in self.places for t, a in zip(known, given, strict=True)
        )
        for result in results:
            if is_whole or (is_moved and call.name not in ("detach", "clone")):
                self._name(result, is_whole)
            elif step is not None:
                shape, block = result.shape, len(self.blocks)
                numbers = torch.arange(result.numel(), device="cpu").view(shape)
                self.places[id(result)] = numbers + block * _BLOCK
                self.blocks.append(result)
                self.block_shapes.append(shape)
                self.steps[id(result)] = step
            elif any(id(t) in self.places for t in given):  # constants of the input's size
                self.places[id(result)] = torch.full(result.shape, -1, device="cpu")
            self.made.setdefault(id(result), len(self.calls) - 1)

    def _fills(self, call: Call) -> bool:
        """Whether a copy in place fills a part of what was made empty, as ``out[t] = s``."""
        place = self.places.get(id(call.args[0]))
        return call.name == "copy_" and place is not None and bool((place == -1).all())

    def _move(self, call: Call, results: list[Tensor]) -> None:
        def place(tensor: Tensor) -> Tensor:
            known = self.places.get(id(tensor))
            return torch.full(tensor.shape, -1, device="cpu") if known is None else known

        args, kwargs = tree_map_only(Tensor, place, (call.args, call.kwargs))
        if call.name == "copy_" and call.args[0].dtype != call.args[1].dtype:
            raise NotRead("writes values of another dtype into its output")
        moved = call.function(*args, **kwargs)
        moved = moved if isinstance(moved, list | tuple) else [moved]
        for result, numbers in zip(results, moved, strict=True):
            self.places[id(result)] = numbers

    def _name(self, result: Tensor, is_whole: bool) -> None:
        """What is moved out of a whole sequence is its step's tensor."""
        place = self.places[id(result)]
        blocks = place.div(_BLOCK, rounding_mode="floor").unique().tolist()
        if len(blocks) != 1 or (block := blocks[0]) < 0:
            return
        if self.blocks[block] is None:
            self.blocks[block] = result
            if self.find(place) is not None:
                self.steps[id(result)], self.made[id(result)] = block, -1
            else:
                self.blocks[block] = None  # not yet, as [N, 1, C] of [N, C]
        elif (owner := self.owner(result)) is not result and is_whole:
            self.others[id(result)] = owner
        else:
            self.steps[id(result)] = self.steps[id(self.blocks[block])]

    def _step_of(self, tensor: Tensor, is_moved: bool) -> int | None:
        """The step of an argument; ``None`` of constants, parameters and whole sequences."""
        step = self.steps.get(id(self.owner(tensor)), self.steps.get(id(tensor)))
        place = self.places.get(id(tensor))
        if step is None and place is not None and not is_moved and bool((place >= 0).any()):
            raise NotRead(f"{_WHOLE} ({self.calls[-1].name}), or has its steps along another axis")
        return step


class _Calls(TorchFunctionMode):
    """Sees the calls of torch's functions: sizes, steps moved out of a sequence, where to cut."""

    def __init__(self, tracker: _Tracker, sizes: Collection[int], cut: Any) -> None:
        super().__init__()
        self.tracker, self.known, self.cut = tracker, sizes, cut

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.tracker.is_forward:
            return func(*args, **(kwargs or {}))
        if self.cut is not None:
            self.cut(self.tracker)
        result = func(*args, **(kwargs or {}))
        if self.cut is not None:
            self.cut(self.tracker)
        name = (func.__self__ if func.__name__ == "__get__" else func).__name__
        asked = "grad_fn", "grad", "storage", "untyped_storage", "requires_grad"
        if name in asked and not calls_from_spikingjelly():  # whose surrogates ask
            raise NotRead(f"asks for {name!r}, which may be another at the next call")
        if isinstance(result, torch.dtype | str) and not calls_from_spikingjelly():
            self.tracker.asks_dtype = True
        if name in ("shape", "size"):
            sizes = result if isinstance(result, tuple) else (result,)
            found = tuple(n if n in self.known else _Size(n) for n in sizes)
            return found if isinstance(result, tuple) else found[0]
        if name in ("numel", "nelement", "__len__") and result not in self.known:
            return _Size(result)
        return tree_map_only(Tensor, self._stand_in, result)

    def _stand_in(self, tensor: Tensor) -> Tensor:
        """The one tensor of a step, which requires a gradient, for what is moved out of a whole."""
        tensor = self.tracker.others.get(id(tensor), tensor)
        if self.tracker.made.get(id(tensor)) == -1 and not tensor.requires_grad:
            tensor.requires_grad_()
        return tensor


def _run(
    forward: Any,
    layout: Layout,
    steps: int,
    tensors: Any,
    shape: Any,
    dtype: torch.dtype,
    cut: Any = None,
) -> tuple[_Tracker, list[Tensor]]:
    """Run a forward on an input without values; gives its trace, and the outputs of its steps."""
    x = Opaque.of(layout.leave(torch.rand(steps, *shape, device="cpu")).contiguous().to(dtype))
    tracker = _Tracker(x, layout, steps, shape)
    channels = shape[1:2] if any(t.numel() != 1 for t in tensors) else ()
    try:
        with tracker, _Calls(tracker, (1, steps, *channels), cut), torch.enable_grad():
            y = forward(x, tensors)
            tracker.is_forward = False
            if not isinstance(y, Tensor) or y.shape != x.shape or y.dtype != x.dtype:
                raise NotRead("gives no sequence of its input's shape and dtype")
        return tracker, _outputs(tracker, y)
    except NotRead:
        raise
    except Exception as error:
        if tracker.error is not None:
            raise tracker.error from error
        text = str(error).strip().partition("\n")[0]
        raise NotRead(f"could not be traced: {type(error).__name__}: {text}"[:200]) from error


def _outputs(tracker: _Tracker, y: Tensor) -> list[Tensor]:
    """The output of each step."""
    if tracker.error is not None:
        raise tracker.error
    place = tracker.places.get(id(y))
    outputs = []
    for t, part in enumerate(() if place is None else tracker.layout.enter(place)):
        owner = tracker.find(part)
        if owner is None or (step := tracker.steps[id(owner)]) < t:
            raise NotRead(f"gives at step {t} no output that is this step's own")
        if step > t:
            raise NotRead(f"gives at step {t} what depends on step {step}")
        outputs.append(owner)
    if len(outputs) != tracker.count:
        raise NotRead("gives no sequence of its steps' outputs")
    return outputs


def _trace(
    loop: Loop, steps: int, tensors: Any, shape: Any, dtype: torch.dtype
) -> tuple[Trace, _Steps]:
    """The trace of a step, and what was found of it."""
    with tracing():
        drawn = random_states()
        given = [example(t.shape, dtype_of(t, dtype)) for t in tensors]
        run = partial(_run, loop._forward, loop.layout, steps, given, shape, dtype)
        torch.default_generator.manual_seed(0)
        tracker, outputs = run()
        found = _find_steps(tracker, outputs)
        found.keep(loop)
        torch.default_generator.manual_seed(0)
        trace = found.differentiate(run(found.cut)[0], given)
        if random_states() != drawn:
            raise NotRead("draws random numbers")
        return trace, found


def _find_steps(tracker: _Tracker, outputs: list[Tensor]) -> _Steps:
    """The step, cut from the one before where the first step fits: late, early or very late."""
    steps_of, reason = dict(tracker.steps), NotRead()
    for most in (1, 0, 99):
        tracker.steps = dict(steps_of)
        try:
            return _Steps(tracker, outputs, most)
        except NotRead as error:
            reason = error if most == 1 else reason
    raise reason


class _Steps:
    """The step that is read, its states and the states before step 0."""

    def __init__(self, tracker: _Tracker, outputs: list[Tensor], most: int) -> None:
        """``most``: of how many values a line is left to the next step that its own needs not."""
        self.tracker, self.outputs, self.at = tracker, outputs, len(outputs) // 2
        last = len(outputs) - 1
        self._retime(most)
        self.states: list[Tensor] = []  #: those that the step is given
        self.given: list[dict[int, Tensor]] = [{} for _ in outputs]  #: and in their places, others
        self._seen: set[Any] = set()
        for t in (self.at, *range(1, last + 1)):
            self._match(t, outputs[t], outputs[self.at])
        k = 0
        while k < len(self.states):
            key = id(self.states[k])
            if key not in self.given[self.at + 1]:
                raise NotRead("has a state that later steps do not use as it does")
            own = self.given[self.at + 1][key]
            self._match(self.at, own, own)
            for t in range(1, last):
                if key in self.given[t + 1]:
                    self._match(t, self.given[t + 1][key], own)
            k += 1
        if len(self.states) > MOST_STATES:
            raise NotRead(f"has more than {MOST_STATES} states")
        if not self.states:
            raise NotRead("has no state")
        self.next = [self.given[self.at + 1][id(s)] for s in self.states]
        found = (*self.states, outputs[self.at], *self.next)
        self.indices = [self._index(tracker, t) for t in found]
        uses = [{id(tracker.owner(t)) for t in tensors_of(c)} for c in tracker.calls]
        now = [any(tracker.steps.get(id(r)) == self.at for r in c.results) for c in tracker.calls]
        #: when each state is made, first used by its step, and where it is found
        self.cuts = sorted(
            (
                tracker.made[id(s)],
                min(n for n, used in enumerate(uses) if now[n] and id(s) in used),
                index,
            )
            for s, index in zip(self.states, self.indices, strict=False)
        )
        self.names = [call.name for call in tracker.calls]
        self.starts = self._find_starts()
        self.keeps: tuple[tuple[str, int], ...] = ()

    def _retime(self, most: int) -> None:
        """Give lines of at most so many values, as a decay, to the step that alone uses them."""
        tracker, users = self.tracker, {id(y): {t} for t, y in enumerate(self.outputs)}
        for call in reversed(tracker.calls):
            given = {id(t): t for t in map(tracker.owner, tensors_of(call))}
            given = {key: t for key, t in given.items() if key in tracker.places}
            for result in call.results:
                step, used = tracker.steps.get(id(result)), users.get(id(result), ())
                if step is None or tracker.made.get(id(result), -1) < 0:
                    continue
                if 0 < len(given) <= most and used and min(used) > step:
                    step = tracker.steps[id(result)] = min(used)
                for key in given:
                    users.setdefault(key, set()).add(step)

    def _index(self, tracker: _Tracker, tensor: Tensor) -> tuple[int, int]:
        """Where a tensor is in a trace, to find it in another."""
        if (made := tracker.made[id(tensor)]) < 0:
            return made, tracker.steps[id(tensor)]
        return made, [r is tensor for r in tracker.calls[made].results].index(True)

    def _match(self, t: int, a: Any, b: Any) -> None:
        """Check that ``a`` of step ``t`` is the same lines as ``b`` of the step that is read."""
        if not isinstance(b, Tensor) or not isinstance(a, Tensor):
            if type(a) is not type(b) or (a != b and not (a != a and b != b)):
                raise NotRead(f"is another at step {t}: has {a!r:.30} for {b!r:.30}")
            return
        a, b = self.tracker.owner(a), self.tracker.owner(b)
        if (t, id(a), id(b)) in self._seen:
            return
        self._seen.add((t, id(a), id(b)))
        mine, other = (self.tracker.steps.get(id(tensor)) for tensor in (a, b))
        if other is not None and other < self.at:
            if mine != t - 1 or other != self.at - 1:
                raise NotRead(f"looks back further than one step, or is another at step {t}")
            if t == self.at and id(b) not in self.given[t]:
                self.states.append(b)
            if self.given[t].setdefault(id(b), a) is not a:
                raise NotRead(f"is another at step {t}: its states are others")
        elif (mine, other) != ((None, None) if other is None else (t, self.at)):
            raise NotRead(f"is another at step {t}")
        elif a is not b or other is not None:
            self._match_calls(t, a, b)

    def _match_calls(self, t: int, a: Tensor, b: Tensor) -> None:
        """Check that two tensors are the same operation of the same, or the same constants."""
        tracker = self.tracker
        calls = [tracker.made.get(id(tensor)) for tensor in (a, b)]
        if calls == [-1, -1]:
            return
        if None in calls or -1 in calls:
            if (
                a.shape != b.shape
                or None in (n := [self._constant(a), self._constant(b)])
                or n[0] != n[1]
            ):
                raise NotRead(f"is another at step {t}: reads other tensors")
            return
        first, second = (tracker.calls[n] for n in calls if n is not None)
        parts = [[r is x for r in c.results] for c, x in ((first, a), (second, b))]
        one, two = ([*_flat(c.args), *_flat(sorted(c.kwargs.items()))] for c in (first, second))
        if first.function is not second.function or parts[0] != parts[1] or len(one) != len(two):
            raise NotRead(f"is another at step {t}: has {first.name} for {second.name}")
        for left, right in zip(one, two, strict=True):
            self._match(t, left, right)

    def _constant(self, tensor: Tensor) -> Any:
        """The number of a tensor that is made of nothing."""
        place = self.tracker.places.get(id(tensor))
        is_made = not isinstance(tensor, Opaque) or (place is not None and bool((place < 0).all()))
        return _number_of(tensor) if is_made else None

    def _find_starts(self) -> tuple[float, ...]:
        """The states before step 0, of which the step makes what step 0 gave."""
        tracker, first = self.tracker, self.given[1]
        steps = [tracker.steps.get(id(r)) for c in tracker.calls for r in c.results[:1]]
        tried: dict[float, None] = {0.0: None}
        for step, call in zip(steps, (c for c in tracker.calls if c.results), strict=True):
            numbers = [n for n in _flat(call.args) if isinstance(n, int | float)]
            if step is None:
                numbers = [_number_of(r) for r in call.results]
            if step in (None, 0):
                tried |= dict.fromkeys(float(n) for n in numbers if n is not None)
        wanted: list[Any] = [_values(self.outputs[0])]
        x = _values(tracker.blocks[0])
        wanted += [_values(first[id(s)]) if id(s) in first else None for s in self.states]
        ends: list[Any] = [self.outputs[self.at], *self.next]
        for starts in itertools.product([*tried][:_MOST_STARTS], repeat=len(self.states)):
            known = {id(tracker.blocks[self.at]): x}
            for state, number in zip(self.states, starts, strict=True):
                known[id(state)] = torch.full_like(_values(state), number)
            found: list[Any] = [self._compute(end, known) for end in ends]
            if all(w is None or torch.equal(f, w) for f, w in zip(found, wanted, strict=True)):
                return starts
        raise NotRead("starts from states that are no numbers, or its first step is another")

    def _compute(self, tensor: Tensor, known: dict[int, Tensor]) -> Tensor:
        """A value of the step, of given values of the input and the states."""
        tensor = self.tracker.owner(tensor)
        if id(tensor) in known:
            return known[id(tensor)]
        if self.tracker.steps.get(id(tensor)) is None:
            return _values(tensor)
        call = self.tracker.calls[self.tracker.made[id(tensor)]]
        args, kwargs = tree_map_only(
            Tensor, lambda t: self._compute(t, known), (call.args, call.kwargs)
        )
        results = call._replace(result=call.function(*args, **kwargs)).results
        for made, value in zip(call.results, results, strict=True):
            known[id(made)] = value
        return known[id(tensor)]

    def keep(self, loop: Loop) -> None:
        """Find what the neuron keeps after a sequence among the last states."""
        last = len(self.outputs) - 1
        for name, value in loop.memories.items():
            if not isinstance(value, Tensor):
                if value != compat.reset_value(loop.node, name):
                    raise NotRead(f"changes its state {name!r}, which is no tensor")
                continue
            for k, state in enumerate(self.next):
                with suppress(NotRead):
                    self._match(last, value, state)
                    self.keeps += ((name, k),)
                    break
            else:
                raise NotRead(f"keeps in {name!r} what no step goes on from")

    # -- in a second run

    def cut(self, tracker: _Tracker) -> None:
        """Make leaves of the states, once the step before has made all of them."""
        if self.cuts and len(tracker.calls) > self.cuts[0][0] and torch.is_grad_enabled():
            _, first_use, index = self.cuts.pop(0)
            if len(tracker.calls) > first_use:
                raise NotRead("begins a step with a function of its own, of a state")
            state = self._find(tracker, index)
            if state.requires_grad and not state.is_leaf:
                state.detach_()
            if state.dtype.is_floating_point:
                state.requires_grad_()
            self.cut(tracker)

    def _find(self, tracker: _Tracker, index: tuple[int, int]) -> Any:
        """A tensor of the first run in the second."""
        made, part = index
        return tracker.blocks[part] if made < 0 else tracker.calls[made].results[part]

    def differentiate(self, tracker: _Tracker, tensors: list[Tensor]) -> Trace:
        """The step of a second run, and its gradient."""
        size, forward = len(self.states), len(tracker.calls)
        if [call.name for call in tracker.calls] != self.names:
            raise NotRead("is another at each call")
        found: list[Any] = [self._find(tracker, index) for index in self.indices]
        x, states, ends = tracker.blocks[self.at], found[:size], found[size:]
        if self.cuts or any(end.shape != x.shape or end.dtype != x.dtype for end in ends):
            raise NotRead("has a state of another shape or dtype than its input")
        inputs = [x, *states, *tensors]
        upstream = [example(x.shape, x.dtype).detach() for _ in ends]
        pairs = [(end, g) for end, g in zip(ends, upstream, strict=True) if end.requires_grad]
        learned = [t for t in inputs if t.requires_grad]
        grads: Any = [None] * len(inputs)
        if pairs:
            roots, gs = zip(*pairs, strict=True)
            with tracker:
                made = iter(graph.gradients(roots, learned, gs))
            grads = [next(made) if t.requires_grad else None for t in inputs]
        backward, reach = tracker.calls[forward:], find_reach(ends, upstream, inputs)
        # Parameters may have made the states before step 0, too.
        learns = tuple(map(any, zip(*(way[1 + size :] for way in reach), strict=True)))
        reach = tuple(way[: 1 + size] + learns for way in reach)
        needed = {id(t): t for call in backward for t in tensors_of(call)}
        calls = self._needed(tracker, [*ends, *needed.values()], {id(t) for t in inputs}, forward)
        names = ["x", *(f"s{k}" for k in range(size)), *(f"w{k}" for k in range(len(tensors)))]
        names += ["g", *(f"g{k}" for k in range(size))]
        given = dict(zip(names, (*inputs, *upstream), strict=True))
        return Trace(given, [*calls, *backward], [*ends, *grads], reach, tracker.asks_dtype)

    def _needed(self, tracker: _Tracker, roots: Any, given: set[int], forward: int) -> list[Call]:
        """The calls that make the roots of what is given, in their order."""
        maker = {id(r): n for n, c in enumerate(tracker.calls[:forward]) for r in c.results}
        found: set[int] = set()
        stack = [*roots]
        while stack:
            tensor = stack.pop()
            n = None if id(tensor) in given else maker.get(id(tensor))
            if n is not None and n not in found:
                found.add(n)
                is_full = tracker.calls[n].name in FULL
                stack += [] if is_full else tensors_of(tracker.calls[n])
        return [tracker.calls[n] for n in sorted(found)]


def _values(tensor: Any) -> Tensor:
    return tensor.values if isinstance(tensor, Opaque) else tensor


def _flat(args: Any) -> list[Any]:
    """Arguments, those within lists too."""
    found: list[Any] = []
    for arg in args:
        found += _flat(arg) if isinstance(arg, list | tuple) else [arg]
    return found


def _number_of(tensor: Tensor) -> Any:
    """The number that a tensor is full of."""
    values = _values(tensor).flatten()
    return values[0].item() if len(values) and bool((values == values[0]).all()) else None
