"""Fused loops of neurons for the CPU, compiled by numba.

The neurons are cut into parts, and a part into blocks; :mod:`.threads` draws them. For one block,
forward walks through time with the block's voltages in the cache; backward recomputes them from the
input and then walks back. Every loop runs over a row, as a function of its own, so that LLVM
vectorises it.

Where a channel's values fit the cache, backward of a norm takes all neurons of some channels as a
part. Their input and the gradient of the norm's output stay there until the latter is turned into
the input's gradient: memory is read and written once. Elsewhere it runs twice, for the sums that
the norm needs and for all else. The thread that computes the last part makes what all parts' sums
are for.

No neuron is known here. What a neuron computes is two rows of one step, forward and backward, which
:mod:`.rows` compiles of a class's own step; the kernels get their addresses.

LLVM neither fuses nor reorders the operations of a row, only the sums over neurons. These are
added in float32 over time and in float64 over neurons, in parts whose bounds depend on the shape
alone: the number of threads changes no bit.
"""

# numba infers the types of the functions that it compiles.
# mypy: disallow-untyped-defs=False
from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, cfunc, from_dtype, types
from numba.core import cgutils
from numba.extending import intrinsic, register_jitable

from ...bits import NAN
from ..program import MOST_OPERANDS, MOST_STATES, MOST_TOTALS

#: floats per cache line
LINE = 16

#: the places of tensors' addresses in :class:`Arguments`; the last ones hold several
X, SPIKE, BITS, V_SEQ, GRAD_SPIKE, GRAD_V_SEQ, GRAD_X, MEAN = range(8)
RSTD, WEIGHT, BIAS, GRAD_WEIGHT, GRAD_BIAS, CONSTANTS, OPERANDS = range(8, 15)
TOTALS = OPERANDS + MOST_OPERANDS
V0, V, GRAD_V, GRAD_V0, ADDRESSES = (TOTALS + MOST_TOTALS + k * MOST_STATES for k in range(5))


#: rows backward: until all states that are used have a gradient, from the last step back
LAST_ROWS = MOST_STATES + 1


class Arguments(ctypes.Structure):
    """What a kernel is called with: counters, addresses (0 for no tensor), sizes and options."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("threads", "taken", "done", "scratch")),
        ("at", ctypes.c_int64 * ADDRESSES),
        *(
            (name, ctypes.c_int64)
            for name in (
                *("parts", "ranges", "part_size", "block", "room", "group", "whole"),
                *("sums_size", "scratch_size", "steps", "neurons", "inner", "channels"),
                *("norm", "norm_sums", "ab", "sums_only", "unpacks"),
                *("forward_row", "states", "operands", "totals"),
                # rows of scratch memory, as text.Layout has them
                *("mean_row", "grad_row", "sums_row", "spike_row", "bits_row", "grad_y_row"),
                *("spare_row", "state_row"),
            )
        ),
        ("backward_rows", ctypes.c_int64 * LAST_ROWS),  #: of the last step, and so on
        ("operand_channels", ctypes.c_int64 * MOST_OPERANDS),  #: whether each is one per channel
        ("total_channels", ctypes.c_int64 * MOST_TOTALS),
        ("v_init", ctypes.c_float * MOST_STATES),
        *((name, ctypes.c_float) for name in ("least", "levels")),
        ("count", ctypes.c_double),  # of a channel's values
    )


#: counters of :class:`Arguments`: threads that began, parts that were begun and that are done
_THREADS, _TAKEN, _DONE = range(3)
# Of a norm, from its first row on.
_MEAN, _GAIN, _BIAS, _A, _B = range(5)
#: values of a row at most, and floats from one to the next: a constant, so that a loop need not
#: check whether rows overlap, and an odd number of cache lines, or all would compete for the same
ROW, PITCH = 1024, 1024 + LINE


# error_model: a division by zero must not branch, or its loop does not vectorise.
_inline = register_jitable(error_model="numpy")
_sum = register_jitable(error_model="numpy", fastmath={"reassoc", "contract"})


def scratch_size(layout: Any, steps: int, room: int) -> int:
    """Floats of a thread: rows, and ``room`` for gradients of each step."""
    return layout.rows(steps) * PITCH + steps * room


KERNEL_SIGNATURE = types.void(types.CPointer(from_dtype(np.dtype(Arguments))))
#: scratch memory, the input, states, then forward the output and the next states, backward the
#: gradients of the output and of the input; constants, and how many neurons
ROW_SIGNATURE = types.void(*[types.CPointer(types.float32)] * 6, types.intp)


@cache
def compile_function(kernel: Callable[..., None]) -> Any:
    """A kernel as a C function, which needs no interpreter to run."""
    try:
        return cfunc(KERNEL_SIGNATURE, cache=True, error_model="numpy")(kernel)
    except RuntimeError as error:
        if "no locator available" not in str(error):
            raise
        warnings.warn(
            "numba finds no folder that it may write to: the loops compile again in every process. "
            "Set NUMBA_CACHE_DIR to one",
            RuntimeWarning,
            stacklevel=2,
        )
        return cfunc(KERNEL_SIGNATURE, error_model="numpy")(kernel)


def _pointer_to(kind: Any) -> Any:
    """The function that points to an element, given an address and an offset in elements."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer_type = context.get_value_type(signature.return_type)
        return builder.gep(builder.inttoptr(arguments[0], pointer_type), [arguments[1]])

    @intrinsic
    def at(typing_context: Any, address: Any, offset: Any) -> Any:
        return types.CPointer(kind)(types.intp, types.intp), generate

    return at


_at, _double_at = _pointer_to(types.float32), _pointer_to(types.float64)
_byte_at = _pointer_to(types.uint8)


@intrinsic
def _take(typing_context: Any, arguments: Any, place: Any) -> Any:
    """Add one to the counter at a ``place``, atomically, and return its value before."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        number = context.get_value_type(types.intp)
        counters = builder.bitcast(arguments[0], number.as_pointer())
        counter = builder.gep(counters, [arguments[1]])
        # Whoever counts the last part sees what all others wrote.
        return builder.atomic_rmw("add", counter, ir.Constant(number, 1), "acq_rel")

    return types.intp(arguments, types.intp), generate


@intrinsic
def _prefetch(typing_context: Any, pointer: Any, offset: Any) -> Any:
    """Begin to fetch the cache line of ``pointer[offset]``, which may lie outside the tensor."""
    signature = types.void(pointer, types.intp)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        line = builder.gep(arguments[0], [arguments[1]])
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [line.type, number, number, number])
        prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        to_read, into_every_level, data = number(0), number(3), number(1)
        builder.call(prefetch, [line, to_read, into_every_level, data])
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def _call_row(typing_context: Any, address: Any, arguments: Any) -> Any:
    """Call a row at an address."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        kinds = [context.get_value_type(kind) for kind in ROW_SIGNATURE.args]
        function = ir.FunctionType(ir.VoidType(), kinds).as_pointer()
        pointers = cgutils.unpack_tuple(builder, values[1], len(kinds))
        builder.call(builder.inttoptr(values[0], function), pointers)
        return context.get_dummy_value()

    return types.void(types.intp, types.Tuple(ROW_SIGNATURE.args)), generate


@_inline
def _fetch(row, ahead, n):
    """Begin to fetch the ``n`` values that lie ``ahead`` of a row."""
    for i in range(ahead, ahead + n, LINE):
        _prefetch(row, i)


@_inline
def _at_step(tensor, a, t, here):
    """The row of the block that begins at neuron ``here``, at step ``t``."""
    return _at(tensor, t * a.neurons + here)


@_inline
def _copy(values, out, n):
    for i in range(n):
        out[i] = values[i]


@_inline
def _start(out, values, value, here, n):
    """The block's ``n`` values, or ``value`` where there are none."""
    if values:
        _copy(_at(values, here), out, n)
    else:
        _fill(out, value, n)


@_inline
def _fill(out, value, n):
    for i in range(n):
        out[i] = value


@_inline
def _add(out, values, n):
    for i in range(n):
        out[i] += values[i]


@_inline
def _spread(out, values, here, n, inner, channels):
    """The channel's value for each of the ``n`` neurons from ``here`` on."""
    done = 0
    while done < n:
        channel = (here + done) // inner % channels
        if inner == 1:
            size = min(n - done, channels - channel)
            for i in range(size):
                out[done + i] = values[channel + i]
        else:
            size = min(n - done, inner - (here + done) % inner)
            for i in range(size):
                out[done + i] = values[channel]
        done += size


@_sum
def _gather(sums, values, here, n, inner, channels):
    """Add the values of the ``n`` neurons from ``here`` on to the sum of their channel."""
    done = 0
    while done < n:
        channel = (here + done) // inner % channels
        if inner == 1:
            size = min(n - done, channels - channel)
            for i in range(size):
                sums[channel + i] += np.float64(values[done + i])
        else:
            size = min(n - done, inner - (here + done) % inner)
            total = 0.0
            for i in range(size):
                total += np.float64(values[done + i])
            sums[channel] += total
        done += size


@_inline
def _row(scratch, k):
    return _at(scratch, k * PITCH)


@_inline
def _step(scratch, a, t, here, now, spike, after, n):
    """One step forward of a block, from the rows of states ``now`` to ``after``."""
    x, constants = _at_step(a.at[X], a, t, here), _at(a.at[CONSTANTS], 0)
    _call_row(a.forward_row, (_row(scratch, 0), x, now, spike, after, constants, n))


@_inline
def _states(scratch, a, t):
    """The first of the rows of states number ``t``."""
    return _row(scratch, a.state_row + t * a.states)


@_inline
def _start_states(scratch, a, here, n):
    for k in range(a.states):
        out = _row(scratch, a.state_row + k)
        _start(out, a.at[V0 + k], a.v_init[k], here, n)


@_inline
def _pack_row(spike, bits, value, n):
    for i in range(n):
        bits[i] += spike[i] * value


@_inline
def _store_bytes(values, out, n):
    for i in range(n):
        out[i] = np.uint8(np.int32(values[i]))


@_inline
def _unpack_row(bits, spike, k, n):
    for i in range(n):
        spike[i] = np.float32(np.int32(np.int32(bits[i]) >> k) & np.int32(1))


@_inline
def _channels(a, part):
    """The first channel of a part, and how many there are."""
    channel = part // a.ranges * a.group
    return channel, min(a.group, a.channels - channel)


@_inline
def _extent(a, part):
    """The first neuron of a part, how many neurons are a run, and how many runs there are."""
    if a.group < a.channels:
        channel, width = _channels(a, part)
        return channel * a.inner, width * a.inner, a.neurons // (a.channels * a.inner)
    first = part * a.part_size
    return first, min(a.part_size, a.neurons - first), 1


@_inline
def _grad_row(scratch, a, t, here, inside):
    """The gradient of what the neuron reads: one row, or with ``whole`` one for each step."""
    if a.whole:
        return _at(
            scratch, (a.state_row + max(a.steps, 2) * a.states) * PITCH + t * a.room + inside
        )
    if a.norm or not a.at[GRAD_X]:
        return _row(scratch, a.grad_y_row)
    return _at_step(a.at[GRAD_X], a, t, here)


@_inline
def _spread_row(scratch, a, k, values, value, per_channel, here, n):
    """Fill row ``k``: with the value of each neuron's channel, with the only one, or ``value``."""
    if values and per_channel:
        _spread(_row(scratch, k), _at(values, 0), here, n, a.inner, a.channels)
    else:
        _fill(_row(scratch, k), _at(values, 0)[0] if values else value, n)


@_inline
def _multiply(out, values, n):
    for i in range(n):
        out[i] *= values[i]


@_inline
def _spread_norm(scratch, a, here, n):
    """The rows of a norm: its mean, its gain, which is ``weight rstd``, and its bias."""
    zero, one, first = np.float32(0), np.float32(1), a.mean_row
    _spread_row(scratch, a, first + _MEAN, a.at[MEAN], zero, True, here, n)
    _spread_row(scratch, a, first + _GAIN, a.at[RSTD], zero, True, here, n)
    _spread_row(scratch, a, first + _BIAS, a.at[WEIGHT], one, True, here, n)
    _multiply(_row(scratch, first + _GAIN), _row(scratch, first + _BIAS), n)
    _spread_row(scratch, a, first + _BIAS, a.at[BIAS], zero, True, here, n)


@_inline
def _spread_terms(scratch, a, here, n):
    zero, first = np.float32(0), a.mean_row
    _spread_row(scratch, a, first + _A, _terms(a), zero, True, here, n)
    _spread_row(scratch, a, first + _B, _terms(a) + 4 * a.channels, zero, True, here, n)


@_inline
def _spread_operands(scratch, a, here, n):
    """The rows of operands and a norm."""
    for k in range(a.operands):
        per_channel = a.operand_channels[k] != 0
        _spread_row(scratch, a, k, a.at[OPERANDS + k], np.float32(0), per_channel, here, n)
    if a.norm:
        _spread_norm(scratch, a, here, n)


@_inline
def _sums(a, part, kind):
    """Sums over neurons of this ``kind``, one per channel, made in a part."""
    return _double_at(a.scratch, (part % a.ranges * (a.totals + 2) + kind) * a.channels)


@_inline
def _clear_sums(a, part):
    channel, width = _channels(a, part)
    for kind in range(a.totals + 2):
        sums = _sums(a, part, kind)
        for c in range(channel, channel + width):
            sums[c] = 0.0


@_inline
def _total(a, kind, channel):
    """The sum of this ``kind`` over all parts of a channel."""
    total = 0.0
    for part in range(a.ranges):
        total += _sums(a, part, kind)[channel]
    return total


@_inline
def _add_to_sums(scratch, a, part, kind, here, n):
    """Add the row of this ``kind`` to its sums."""
    _gather(_sums(a, part, kind), _row(scratch, a.sums_row + kind), here, n, a.inner, a.channels)


def _kernel(name, compute_part, finish):
    """The kernel that computes parts until none is left, under a name of its own.

    The linker keeps one of two functions of the same name. A kernel encloses only plain functions
    and numbers: numba pickles them into the key of its cache on disk, and its dispatchers pickle
    differently in every process.
    """

    def kernel(pointer):
        a = carray(pointer, 1)[0]
        scratch = a.scratch + 8 * a.sums_size + 4 * a.scratch_size * _take(pointer, _THREADS)
        part = _take(pointer, _TAKEN)
        while part < a.parts:
            if a.ranges:  # there are neurons
                compute_part(a, scratch, part)
            if _take(pointer, _DONE) == a.parts - 1:
                finish(a)
            part = _take(pointer, _TAKEN)

    kernel.__qualname__ = name
    return kernel


@_inline
def _nothing(a):
    pass


@_inline
def _forward_part(a, scratch, part):
    """Spikes and states."""
    start, run, _ = _extent(a, part)
    for here in range(start, start + run, a.block):
        n = min(a.block, start + run - here)
        _spread_operands(scratch, a, here, n)
        _start_states(scratch, a, here, n)
        for t in range(a.steps):
            spike = _at_step(a.at[SPIKE], a, t, here)
            _fetch(_at_step(a.at[X], a, t, here), a.neurons, n)
            # Never the rows it reads from, which would look like a loop-carried dependence.
            after = _states(scratch, a, (t + 1) % 2)
            _step(scratch, a, t, here, _states(scratch, a, t % 2), spike, after, n)
            if a.at[BITS]:
                _store_bits(scratch, a, spike, t, here, n)
            _fetch(spike, a.neurons, n)
            if a.at[V_SEQ]:
                v_seq = _at_step(a.at[V_SEQ], a, t, here)
                _fetch(v_seq, a.neurons, n)
                _copy(after, v_seq, n)
        for k in range(a.states):
            last = _row(scratch, a.state_row + a.steps % 2 * a.states + k)
            _copy(last, _at(a.at[V + k], here), n)


@_inline
def _store_bits(scratch, a, spike, t, here, n):
    """Write counts of step ``t``, or add its spikes to a row of bits, and write what is full."""
    if a.levels > np.float32(1):  # a block begins at an even neuron of memory
        halves = _byte_at(a.at[BITS], (t * a.neurons + here) // 2)
        _pack_count_row(spike, a.least, halves, n)
        return
    bits = _row(scratch, a.bits_row)
    if t % 8 == 0:
        _fill(bits, np.float32(0), n)
    _pack_row(spike, bits, np.float32(1 << t % 8), n)
    if t % 8 == 7 or t == a.steps - 1:
        _store_bytes(bits, _byte_at(a.at[BITS], t // 8 * a.neurons + here), n)


@_inline
def _bits_part(a, scratch, part):
    """Bits of spikes, or half bytes of counts, of one step: a part begins at an even neuron."""
    start, run, _ = _extent(a, part)
    for here in range(start, start + run, a.block):
        n = min(a.block, start + run - here)
        for t in range(a.steps):
            values = _at_step(a.at[SPIKE], a, t, here)
            _fetch(values, a.neurons, n)
            if not a.unpacks:
                _store_bits(scratch, a, values, t, here, n)
            elif a.levels > np.float32(1):
                _unpack_count_row(_byte_at(a.at[BITS], here // 2), values, n)
            else:
                bits = _byte_at(a.at[BITS], t // 8 * a.neurons + here)
                _unpack_row(bits, values, np.int32(t % 8), n)


@_inline
def _pack_count_row(counts, least, halves, n):
    for i in range(n // 2):
        low, high = _half(counts[2 * i] - least), _half(counts[2 * i + 1] - least)
        halves[i] = np.uint8(low | high << np.int32(4))
    if n % 2:
        halves[n // 2] = np.uint8(_half(counts[n - 1] - least))


@_inline
def _half(count):
    """The four bits of a count."""
    return np.int32(NAN) if count != count else np.int32(count) & np.int32(15)


@_inline
def _count(half):
    return np.float32(np.nan) if half == np.int32(NAN) else np.float32(half)


@_inline
def _unpack_count_row(halves, counts, n):
    for i in range(n // 2):
        both = np.int32(halves[i])
        counts[2 * i], counts[2 * i + 1] = _count(both & np.int32(15)), _count(both >> np.int32(4))
    if n % 2:
        counts[n - 1] = _count(np.int32(halves[n // 2]) & np.int32(15))


forward = _kernel("forward", _forward_part, _nothing)
move_bits = _kernel("move_bits", _bits_part, _nothing)


@_inline
def _backward_part(a, scratch, part):
    """Gradients of input, initial voltage and parameters."""
    _clear_sums(a, part)
    _backward_blocks(a, scratch, part, False)
    if a.whole:
        _norm_gradients(a, *_channels(a, part))
        _backward_blocks(a, scratch, part, True)


@_inline
def _backward_blocks(a, scratch, part, again):
    """The gradients of a part's blocks; ``again``: the input's, once the part's sums are known."""
    start, run, runs = _extent(a, part)
    for k in range(runs):
        for done in range(0, run, a.block):
            here, n = start + k * a.channels * a.inner + done, min(a.block, run - done)
            if k == 0 or run > a.block:  # else the rows of parameters are those of the last run
                if again:
                    _spread_norm(scratch, a, here, n)
                    _spread_terms(scratch, a, here, n)
                else:
                    _spread_operands(scratch, a, here, n)
            if again:
                for t in range(a.steps):
                    _store_grad_x(scratch, a, t, here, k * run + done, n, a.neurons)
            else:
                _backward_block(a, scratch, part, here, k * run + done, n)


@_inline
def _backward_block(a, scratch, part, here, inside, n):
    """A block's gradients; with ``whole`` that of the norm's output, in place of its input's."""
    grad_now, grad_spike = _row(scratch, a.grad_row), _row(scratch, a.spike_row)
    if a.ab and not a.whole:
        _spread_terms(scratch, a, here, n)
    _recompute(scratch, a, here, n)
    for k in range(a.states):
        _start(_row(scratch, a.grad_row + k), a.at[GRAD_V + k], np.float32(0), here, n)
    for k in range(a.sums_row, a.spike_row + 1):
        _fill(_row(scratch, k), np.float32(0), n)
    for t in range(a.steps - 1, -1, -1):
        if a.at[GRAD_V_SEQ]:
            grad_v = _at_step(a.at[GRAD_V_SEQ], a, t, here)
            _fetch(grad_v, -a.neurons, n)
            _add(grad_now, grad_v, n)
        if a.at[GRAD_SPIKE]:
            grad_spike = _at_step(a.at[GRAD_SPIKE], a, t, here)
            _fetch(grad_spike, -a.neurons, n)
        x, states = _at_step(a.at[X], a, t, here), _states(scratch, a, t)
        grad_y, constants = _grad_row(scratch, a, t, here, inside), _at(a.at[CONSTANTS], 0)
        row = a.backward_rows[min(a.steps - 1 - t, LAST_ROWS - 1)]
        _call_row(row, (_row(scratch, 0), x, states, grad_spike, grad_y, constants, n))
        if a.at[GRAD_X] and not a.whole and not a.sums_only:
            _store_grad_x(scratch, a, t, here, inside, n, -a.neurons)
    for k in range(a.states):
        if a.at[GRAD_V0 + k]:
            _copy(_row(scratch, a.grad_row + k), _at(a.at[GRAD_V0 + k], here), n)
    if a.norm_sums:
        _add_to_sums(scratch, a, part, a.totals, here, n)
        _add_to_sums(scratch, a, part, a.totals + 1, here, n)
    for k in range(a.totals):
        if a.at[TOTALS + k]:
            _add_to_sums(scratch, a, part, k, here, n)


@_inline
def _recompute(scratch, a, here, n):
    """Compute the states before each step."""
    spike = _row(scratch, a.spare_row)
    _start_states(scratch, a, here, n)
    for t in range(a.steps):
        _fetch(_at_step(a.at[X], a, t, here), a.neurons, n)
        if t < a.steps - 1 and a.states:
            now, after = _states(scratch, a, t), _states(scratch, a, t + 1)
            _step(scratch, a, t, here, now, spike, after, n)


@_inline
def _terms(a):
    """The address of A and B, after the sums."""
    return a.scratch + 8 * (a.totals + 2) * a.ranges * a.channels


@_inline
def _norm_gradients(a, channel, width):
    """A and B, which the input's gradient needs, and those of weight and bias, from the sums."""
    rstd, weight = _at(a.at[RSTD], 0), _at(a.at[WEIGHT], 0)
    a_terms, b_terms = _at(_terms(a), 0), _at(_terms(a), a.channels)
    grad_weight, grad_bias = _at(a.at[GRAD_WEIGHT], 0), _at(a.at[GRAD_BIAS], 0)
    for c in range(channel, channel + width):
        to_weight, to_bias = rstd[c] * _total(a, a.totals + 1, c), _total(a, a.totals, c)
        gain = np.float64(rstd[c] * weight[c] if a.at[WEIGHT] else rstd[c])
        a_terms[c] = gain * to_bias / a.count
        b_terms[c] = gain * rstd[c] * to_weight / a.count
        if a.at[GRAD_WEIGHT]:
            grad_weight[c], grad_bias[c] = to_weight, to_bias


@_inline
def _finish_backward(a):
    """Write the totals, of which gradients of parameters are made, from the sums of parts."""
    if a.norm_sums and not a.whole:
        _norm_gradients(a, 0, a.channels)
    for k in range(a.totals):
        if a.at[TOTALS + k]:
            _store_total(a, k)


@_inline
def _store_total(a, k):
    """A sum over neurons, of each channel or of all."""
    out, total = _at(a.at[TOTALS + k], 0), 0.0
    for c in range(a.channels):
        here = _total(a, k, c)
        total += here
        if a.total_channels[k]:
            out[c] = here
    if not a.total_channels[k]:
        out[0] = total


@_inline
def _store_grad_x(scratch, a, t, here, inside, n, ahead):
    """Write the gradient of a norm's input; without a norm the backward row wrote it."""
    out = _at_step(a.at[GRAD_X], a, t, here)
    if a.norm:
        x, grad = _at_step(a.at[X], a, t, here), _grad_row(scratch, a, t, here, inside)
        _input_gradient_row(scratch, a.mean_row, x, grad, out, a.ab != 0, n)
    _fetch(out, ahead, n)


@_inline
def _input_gradient_row(scratch, first, x, grad, out, ab, n):
    mean, gain = _row(scratch, first + _MEAN), _row(scratch, first + _GAIN)
    a, b = _row(scratch, first + _A), _row(scratch, first + _B)
    for i in range(n):
        scaled = gain[i] * grad[i]
        out[i] = scaled - a[i] - b[i] * (x[i] - mean[i]) if ab else scaled


backward = _kernel("backward", _backward_part, _finish_backward)
