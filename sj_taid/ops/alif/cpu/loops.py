"""Fused ALIF loops for the CPU, compiled by numba.

The neurons are cut into parts, and a part into blocks of neighbours in memory. For one block,
forward walks through time with the block's voltages in the cache; backward recomputes them from the
input and then walks back. Every loop runs over a row, the values of a block at one step, as a
function of its own, so that LLVM vectorises it.

Where a channel's values fit the cache, backward of a norm takes all neurons of some channels as a
part. Their input and the gradient of the norm's output stay there until the latter is turned into
the input's gradient: memory is read and written once. Elsewhere it runs twice, for the sums that
the norm needs and for all else. The thread that computes the last part makes what all parts' sums
are for.

A row of one step backward is the one loop that is compiled for each surrogate and its options: a
function of its own, of which the kernel gets the address.

Spikes and voltages equal the reference's bit for bit: the same operations in the same order, which
LLVM neither fuses nor reorders. It may do so only in the surrogates' derivatives and in the sums
over neurons. A parameter's gradient is summed in float32 over time and in float64 over neurons, in
parts whose bounds depend on the shape alone: the number of threads changes no bit.
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
from numba.extending import intrinsic, overload, register_jitable

from ... import surrogate
from ..plan import COUNT, Charge

#: floats per cache line
LINE = 16

LEAK, DECAY_INPUT, NO_LEAK, NO_STATE = map(int, Charge)


class Arguments(ctypes.Structure):
    """What a kernel is called with: counters, addresses (0 for no tensor), sizes and options."""

    _fields_ = (
        *(
            (name, ctypes.c_int64)
            for name in (
                *("threads", "taken", "done"),  # counters, by their places
                *("scratch", "x", "v0", "q", "threshold", "mean", "rstd", "weight", "bias"),
                *("spike", "v", "v_seq", "bits", "grad_spike", "grad_v", "grad_v_seq"),
                *("grad_x", "grad_v0", "grad_w", "grad_threshold", "grad_weight", "grad_bias"),
                *("parts", "ranges", "part_size", "block", "room", "group", "whole"),
                *("sums_size", "scratch_size", "steps", "neurons", "inner", "channels"),
                *("per_channel", "norm", "norm_sums", "ab", "sums_only"),
                *("charge", "soft", "counts", "unpacks", "row"),
            )
        ),
        *((name, ctypes.c_float) for name in ("v_init", "v_rest", "q_value", "threshold_value")),
        *((name, ctypes.c_float) for name in ("a", "b", "levels")),
        ("count", ctypes.c_double),  # of a channel's values
    )


#: counters of :class:`Arguments`: threads that began, parts that were begun and that are done
_THREADS, _TAKEN, _DONE = range(3)
# Rows of scratch memory, then T rows of voltages (two at least), then room for a whole part.
_Q, _THRESHOLD, _MEAN, _GAIN, _BIAS, _A, _B = range(7)
_GRAD_V, _GRADS = 7, 8  # the latter of each of the sums below
# Those that a loop is given come last: it checks that they lie outside of all of the above.
_SPIKE, _BITS, _GRAD_Y, _SPARE, _VOLTAGES = range(12, 17)
#: values of a row at most, and floats from one to the next: a constant, so that a loop need not
#: check whether rows overlap, and an odd number of cache lines, or all would compete for the same
ROW, _PITCH = 1024, 1024 + LINE

#: backward's sums over neurons, and how many there are: the last two of the gradient of the norm's
#: output, and of its product with the centred input
GRAD_Q, GRAD_THRESHOLD, GRAD_Y, GRAD_Y_X, SUMS = range(5)


# error_model: a division by zero must not branch, or its loop does not vectorise.
_part = register_jitable(error_model="numpy")
# Cached, since numba would take a second registration for another function.
smooth = cache(register_jitable(error_model="numpy", fastmath={"contract"}))
_sum = register_jitable(error_model="numpy", fastmath={"reassoc", "contract"})


def scratch_size(steps: int, room: int) -> int:
    """Floats of a thread: rows, and ``room`` for gradients of each step."""
    return (_VOLTAGES + max(steps, 2)) * _PITCH + steps * room


KERNEL_SIGNATURE = types.void(types.CPointer(from_dtype(np.dtype(Arguments))))
_POINTERS, _FLOATS = [types.CPointer(types.float32)] * 4, [types.float32] * 4
ROW_SIGNATURE = types.void(types.intp, *_POINTERS, *_FLOATS, types.intp)


@cache
def compile_function(function: Callable[..., None], signature: Any = KERNEL_SIGNATURE) -> Any:
    """A C function, which needs no interpreter to run: a kernel or a row."""
    try:
        return cfunc(signature, cache=True, error_model="numpy")(function)
    except RuntimeError as error:
        if "no locator available" not in str(error):
            raise
        warnings.warn(
            "numba finds no folder that it may write to: the loops compile again in every process. "
            "Set NUMBA_CACHE_DIR to one",
            RuntimeWarning,
            stacklevel=2,
        )
        return cfunc(signature, error_model="numpy")(function)


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
    """Call the function of :func:`row_for` at an address."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        kinds = [context.get_value_type(kind) for kind in ROW_SIGNATURE.args]
        function = ir.FunctionType(ir.VoidType(), kinds).as_pointer()
        given = cgutils.unpack_tuple(builder, values[1], len(kinds))
        builder.call(builder.inttoptr(values[0], function), given)
        return context.get_dummy_value()

    return types.void(types.intp, types.Tuple(ROW_SIGNATURE.args)), generate


@_part
def _charge(x, v, q, v_rest, charge, counts):
    if charge == NO_STATE:
        return x
    if charge == DECAY_INPUT:
        return v + (x - (v - v_rest)) * q
    if charge == NO_LEAK:
        return v + x  # for an infinite v too
    if counts:
        return v * (np.float32(1) - q) + x
    return v - (v - v_rest) * q + x


@_part
def _count(over, levels):
    """``over`` in thresholds, rounded half to even; choices that leave NaN as it is."""
    over = np.float32(0) if over < np.float32(0) else over
    return np.rint(levels if over > levels else over)


@_part
def _charge_by_q(x, v, v_rest, charge):
    return x - (v - v_rest) if charge == DECAY_INPUT else v_rest - v


@_part
def _reset(h, spike, threshold, v_rest, soft):
    if soft:
        return h - spike * threshold
    return (np.float32(1) - spike) * h + spike * v_rest


@smooth
def _exp(x):
    """Vectorisable ``e**x`` in float32, to 2 ulp; 0 below -87.7 and infinity above 88.3."""
    x = max(min(x, np.float32(89)), np.float32(-88))
    n = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
    # ln 2 in two parts, the first short enough for n times it to be exact
    r = x - n * np.float32(0.693359375) - n * np.float32(-2.12194440e-4)
    p = np.float32(1 / 5040)
    for c in (1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0):
        p = p * r + np.float32(c)
    return p * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)


@overload(surrogate.exp)
def _overload_exp(x):
    return lambda x: _exp(x)


@overload(surrogate.f32)
def _overload_f32(x):
    return lambda x: np.float32(x)


@_part
def _fetch(row, ahead, n):
    """Begin to fetch the ``n`` values that lie ``ahead`` of a row."""
    for i in range(ahead, ahead + n, LINE):
        _prefetch(row, i)


@_part
def _at_step(tensor, a, t, here):
    """The row of the block that begins at neuron ``here``, at step ``t``."""
    return _at(tensor, t * a.neurons + here)


@_part
def _copy(values, out, n):
    for i in range(n):
        out[i] = values[i]


@_part
def _start(out, values, value, here, n):
    """The block's ``n`` values, or ``value`` where there are none."""
    if values:
        _copy(_at(values, here), out, n)
    else:
        _fill(out, value, n)


@_part
def _fill(out, value, n):
    for i in range(n):
        out[i] = value


@_part
def _add(out, values, n):
    for i in range(n):
        out[i] += values[i]


@_part
def _spread(out, values, here, n, inner, channels):
    """The channel's value for each of the ``n`` neurons from ``here`` on."""
    done = 0
    while done < n:
        channel = (here + done) // inner % channels
        if inner == 1:
            run = min(n - done, channels - channel)
            for i in range(run):
                out[done + i] = values[channel + i]
        else:
            run = min(n - done, inner - (here + done) % inner)
            for i in range(run):
                out[done + i] = values[channel]
        done += run


@_sum
def _gather(sums, values, here, n, inner, channels):
    """Add the values of the ``n`` neurons from ``here`` on to the sum of their channel."""
    done = 0
    while done < n:
        channel = (here + done) // inner % channels
        if inner == 1:
            run = min(n - done, channels - channel)
            for i in range(run):
                sums[channel + i] += np.float64(values[done + i])
        else:
            run = min(n - done, inner - (here + done) % inner)
            total = 0.0
            for i in range(run):
                total += np.float64(values[done + i])
            sums[channel] += total
        done += run


@_part
def _row(scratch, k):
    return _at(scratch, k * _PITCH)


@_part
def _input(scratch, x, i, norm):
    """What the neuron reads: the input, or its norm."""
    mean, gain, bias = _row(scratch, _MEAN), _row(scratch, _GAIN), _row(scratch, _BIAS)
    return (x[i] - mean[i]) * gain[i] + bias[i] if norm else x[i]


def _step_row(counts):
    """One step forward of neighbouring neurons: spikes, or counts."""

    def row(scratch, a, x, v, spike, v_next, norm, charge, soft, n):
        q, threshold = _row(scratch, _Q), _row(scratch, _THRESHOLD)
        v_rest, levels = a.v_rest, a.levels
        for i in range(n):
            h = _charge(_input(scratch, x, i, norm), v[i], q[i], v_rest, charge, counts)
            if counts:
                fired = _count(h / threshold[i], levels)
            else:
                fired = np.float32(h - threshold[i] >= np.float32(0))
            spike[i], v_next[i] = fired, _reset(h, fired, threshold[i], v_rest, soft)

    row.__qualname__ = "count_row" if counts else "spike_row"
    return _part(row)


_spike_row, _count_row = _step_row(False), _step_row(True)


@_part
def _step(scratch, a, t, here, now, spike, after, n):
    """One step forward of a block, from the row of voltages ``now`` to ``after``."""
    x, norm, charge, soft = _at_step(a.x, a, t, here), a.norm != 0, a.charge, a.soft != 0
    if a.counts:
        _count_row(scratch, a, x, now, spike, after, norm, charge, soft, n)
    else:
        _spike_row(scratch, a, x, now, spike, after, norm, charge, soft, n)


@_part
def _pack_row(spike, bits, value, n):
    for i in range(n):
        bits[i] += spike[i] * value


@_part
def _store_bytes(values, out, n):
    for i in range(n):
        out[i] = np.uint8(np.int32(values[i]))


@_part
def _unpack_row(bits, spike, k, n):
    for i in range(n):
        spike[i] = np.float32(np.int32(np.int32(bits[i]) >> k) & np.int32(1))


@_part
def _channels(a, part):
    """The first channel of a part, and how many there are."""
    channel = part // a.ranges * a.group
    return channel, min(a.group, a.channels - channel)


@_part
def _extent(a, part):
    """The first neuron of a part, how many neighbours are a run, and how many runs there are.

    Runs are those of the part's channels in each sample; of all channels there is one.
    """
    if a.group < a.channels:
        channel, width = _channels(a, part)
        return channel * a.inner, width * a.inner, a.neurons // (a.channels * a.inner)
    first = part * a.part_size
    return first, min(a.part_size, a.neurons - first), 1


@_part
def _grad_row(scratch, a, t, here, inside):
    """The gradient of what the neuron reads: one row, or with ``whole`` one for each step."""
    if a.whole:
        return _at(scratch, (_VOLTAGES + max(a.steps, 2)) * _PITCH + t * a.room + inside)
    if a.norm or not a.grad_x:
        return _row(scratch, _GRAD_Y)
    return _at_step(a.grad_x, a, t, here)


@_part
def _spread_row(scratch, a, k, values, value, per_channel, here, n):
    """The row ``k``: of ``values`` those of each neuron's channel or the first, or ``value``."""
    if values and per_channel:
        _spread(_row(scratch, k), _at(values, 0), here, n, a.inner, a.channels)
    else:
        _fill(_row(scratch, k), _at(values, 0)[0] if values else value, n)


@_part
def _multiply(out, values, n):
    for i in range(n):
        out[i] *= values[i]


@_part
def _spread_norm(scratch, a, here, n):
    """The rows of a norm: its mean, its gain, which is ``weight rstd``, and its bias."""
    zero, one = np.float32(0), np.float32(1)
    _spread_row(scratch, a, _MEAN, a.mean, zero, True, here, n)
    _spread_row(scratch, a, _GAIN, a.rstd, zero, True, here, n)
    _spread_row(scratch, a, _BIAS, a.weight, one, True, here, n)
    _multiply(_row(scratch, _GAIN), _row(scratch, _BIAS), n)
    _spread_row(scratch, a, _BIAS, a.bias, zero, True, here, n)


@_part
def _spread_terms(scratch, a, here, n):
    _spread_row(scratch, a, _A, _terms(a), np.float32(0), True, here, n)
    _spread_row(scratch, a, _B, _terms(a) + 4 * a.channels, np.float32(0), True, here, n)


@_part
def _spread_parameters(scratch, a, here, n):
    """The rows of q, the threshold and a norm."""
    _spread_row(scratch, a, _Q, a.q, a.q_value, a.per_channel, here, n)
    _spread_row(scratch, a, _THRESHOLD, a.threshold, a.threshold_value, a.per_channel, here, n)
    if a.norm:
        _spread_norm(scratch, a, here, n)


@_part
def _sums(a, part, kind):
    """Sums over neurons of this ``kind``, one per channel, made in a part."""
    return _double_at(a.scratch, (part % a.ranges * SUMS + kind) * a.channels)


@_part
def _clear_sums(a, part):
    channel, width = _channels(a, part)
    for kind in range(SUMS):
        sums = _sums(a, part, kind)
        for c in range(channel, channel + width):
            sums[c] = 0.0


@_part
def _total(a, kind, channel):
    """The sum of this ``kind`` over all parts of a channel."""
    total = 0.0
    for part in range(a.ranges):
        total += _sums(a, part, kind)[channel]
    return total


@_part
def _add_to_sums(scratch, a, part, kind, here, n):
    """Add the row of this ``kind`` to its sums."""
    _gather(_sums(a, part, kind), _row(scratch, _GRADS + kind), here, n, a.inner, a.channels)


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


@_part
def _nothing(a):
    pass


@_part
def _forward_part(a, scratch, part):
    """Spikes and voltages."""
    start, run, _ = _extent(a, part)
    for here in range(start, start + run, a.block):
        n = min(a.block, start + run - here)
        _spread_parameters(scratch, a, here, n)
        now = _row(scratch, _VOLTAGES)
        _start(now, a.v0, a.v_init, here, n)
        for t in range(a.steps):
            spike = _at_step(a.spike, a, t, here)
            _fetch(_at_step(a.x, a, t, here), a.neurons, n)
            # Never the row it reads from, which would look like a loop-carried dependence.
            after = _row(scratch, _VOLTAGES + (t + 1) % 2)
            _step(scratch, a, t, here, now, spike, after, n)
            if a.bits:
                _store_bits(scratch, a, spike, t, here, n)
            _fetch(spike, a.neurons, n)
            if a.v_seq:
                v_seq = _at_step(a.v_seq, a, t, here)
                _fetch(v_seq, a.neurons, n)
                _copy(after, v_seq, n)
            now = after
        _copy(now, _at(a.v, here), n)


@_part
def _store_bits(scratch, a, spike, t, here, n):
    """Write counts of step ``t``, or add its spikes to a row of bits, and write what is full."""
    if a.levels > np.float32(1):  # a block begins at an even neuron of memory
        _pack_count_row(spike, _byte_at(a.bits, (t * a.neurons + here) // 2), n)
        return
    bits = _row(scratch, _BITS)
    if t % 8 == 0:
        _fill(bits, np.float32(0), n)
    _pack_row(spike, bits, np.float32(1 << t % 8), n)
    if t % 8 == 7 or t == a.steps - 1:
        _store_bytes(bits, _byte_at(a.bits, t // 8 * a.neurons + here), n)


@_part
def _bits_part(a, scratch, part):
    """Bits of spikes, or half bytes of counts, of one step: a part begins at an even neuron."""
    start, run, _ = _extent(a, part)
    for here in range(start, start + run, a.block):
        n = min(a.block, start + run - here)
        for t in range(a.steps):
            values = _at_step(a.spike, a, t, here)
            _fetch(values, a.neurons, n)
            if not a.unpacks:
                _store_bits(scratch, a, values, t, here, n)
            elif a.levels > np.float32(1):
                _unpack_count_row(_byte_at(a.bits, here // 2), values, n)
            else:
                bits = _byte_at(a.bits, t // 8 * a.neurons + here)
                _unpack_row(bits, values, np.int32(t % 8), n)


@_part
def _pack_count_row(counts, halves, n):
    for i in range(n // 2):
        low, high = np.int32(counts[2 * i]), np.int32(counts[2 * i + 1])
        halves[i] = np.uint8(low & np.int32(15) | high << np.int32(4))
    if n % 2:
        halves[n // 2] = np.uint8(np.int32(counts[n - 1]) & np.int32(15))


@_part
def _unpack_count_row(halves, counts, n):
    for i in range(n // 2):
        both = np.int32(halves[i])
        counts[2 * i] = np.float32(both & np.int32(15))
        counts[2 * i + 1] = np.float32(both >> np.int32(4))
    if n % 2:
        counts[n - 1] = np.float32(np.int32(halves[n // 2]) & np.int32(15))


forward = _kernel("forward", _forward_part, _nothing)
move_bits = _kernel("move_bits", _bits_part, _nothing)


def _derivative(name: str) -> Any:
    """A surrogate's derivative, for numba."""
    python = surrogate.by_name(name).python
    # numba's linker distinguishes functions by their names, and keeps one of two that are equal.
    python.__name__ = python.__qualname__ = name
    return smooth(python)


@cache
def row_for(name, charge, soft, detach_reset, learn_w, learn_threshold, norm):
    """One step backward of neighbouring neurons, for a surrogate and options."""
    counts, derivative = name == COUNT, _derivative(name)

    def row(scratch, x, v, grad_spike, grad_y, v_rest, levels, a, b, n):
        q, threshold, mean = _row(scratch, _Q), _row(scratch, _THRESHOLD), _row(scratch, _MEAN)
        grad_v = _row(scratch, _GRAD_V)
        grad_q, grad_threshold = (
            _row(scratch, _GRADS + GRAD_Q),
            _row(scratch, _GRADS + GRAD_THRESHOLD),
        )
        grad_y_sum, grad_y_x = _row(scratch, _GRADS + GRAD_Y), _row(scratch, _GRADS + GRAD_Y_X)
        for i in range(n):
            y = _input(scratch, x, i, norm)
            h = _charge(y, v[i], q[i], v_rest, charge, counts)
            if counts:
                over = h / threshold[i]
                spike = _count(over, levels)
            else:
                over = h - threshold[i]
                spike = np.float32(over >= np.float32(0))
            through = grad_spike[i]
            if not detach_reset:
                through += grad_v[i] * (-threshold[i] if soft else v_rest - h)
            through *= np.float32(derivative(over, a, b))
            if counts:
                through /= threshold[i]
            # Products, not choices, as torch's: what is not finite stays so.
            grad_h = through + (grad_v[i] if soft else (np.float32(1) - spike) * grad_v[i])
            if learn_threshold:
                by_threshold = through * over if counts else through
                grad_threshold[i] -= by_threshold + (spike * grad_v[i] if soft else np.float32(0))
            if learn_w:
                grad_q[i] += grad_h * _charge_by_q(y, v[i], v_rest, charge)
            grad = grad_h * q[i] if charge == DECAY_INPUT else grad_h
            if norm:
                grad_y_sum[i] += grad
                grad_y_x[i] += grad * (x[i] - mean[i])
            grad_y[i] = grad
            if charge == NO_STATE:
                grad_v[i] = np.float32(0)
            else:
                grad_v[i] = grad_h if charge == NO_LEAK else grad_h - grad_h * q[i]

    options = (charge, soft, detach_reset, learn_w, learn_threshold, norm)
    row.__qualname__ = "_".join(map(str, ("row", name, *map(int, options))))
    return row


@_part
def _backward_part(a, scratch, part):
    """Gradients of input, initial voltage and parameters."""
    _clear_sums(a, part)
    _backward_blocks(a, scratch, part, False)
    if a.whole:
        _norm_gradients(a, *_channels(a, part))
        _backward_blocks(a, scratch, part, True)


@_part
def _backward_blocks(a, scratch, part, again):
    """The gradients of a part's blocks; ``again``, by the part's sums, that of the input."""
    start, run, runs = _extent(a, part)
    for k in range(runs):
        for done in range(0, run, a.block):
            here, n = start + k * a.channels * a.inner + done, min(a.block, run - done)
            if k == 0 or run > a.block:  # else the rows of parameters are those of the last run
                if again:
                    _spread_norm(scratch, a, here, n)
                    _spread_terms(scratch, a, here, n)
                else:
                    _spread_parameters(scratch, a, here, n)
            if again:
                for t in range(a.steps):
                    _store_grad_x(scratch, a, t, here, k * run + done, n, a.neurons)
            else:
                _backward_block(a, scratch, part, here, k * run + done, n)


@_part
def _backward_block(a, scratch, part, here, inside, n):
    """A block's gradients; of x, with ``whole``, that of the norm's output."""
    grad_now, grad_spike = _row(scratch, _GRAD_V), _row(scratch, _SPIKE)
    if a.ab and not a.whole:
        _spread_terms(scratch, a, here, n)
    _recompute(scratch, a, here, n)
    _start(grad_now, a.grad_v, np.float32(0), here, n)
    for k in range(_GRADS, _SPIKE + 1):
        _fill(_row(scratch, k), np.float32(0), n)
    for t in range(a.steps - 1, -1, -1):
        if a.grad_v_seq:
            grad_v = _at_step(a.grad_v_seq, a, t, here)
            _fetch(grad_v, -a.neurons, n)
            _add(grad_now, grad_v, n)
        if a.grad_spike:
            grad_spike = _at_step(a.grad_spike, a, t, here)
            _fetch(grad_spike, -a.neurons, n)
        x, v = _at_step(a.x, a, t, here), _row(scratch, _VOLTAGES + t)
        grad_y = _grad_row(scratch, a, t, here, inside)
        constants = a.v_rest, a.levels, a.a, a.b
        _call_row(a.row, (scratch, x, v, grad_spike, grad_y, *constants, n))
        if a.grad_x and not a.whole and not a.sums_only:
            _store_grad_x(scratch, a, t, here, inside, n, -a.neurons)
    if a.grad_v0:
        _copy(grad_now, _at(a.grad_v0, here), n)
    if a.norm_sums:
        _add_to_sums(scratch, a, part, GRAD_Y, here, n)
        _add_to_sums(scratch, a, part, GRAD_Y_X, here, n)
    if a.grad_w:
        _add_to_sums(scratch, a, part, GRAD_Q, here, n)
    if a.grad_threshold:
        _add_to_sums(scratch, a, part, GRAD_THRESHOLD, here, n)


@_part
def _recompute(scratch, a, here, n):
    """Compute the voltages before each step."""
    spike = _row(scratch, _SPARE)
    _start(_row(scratch, _VOLTAGES), a.v0, a.v_init, here, n)
    for t in range(a.steps):
        _fetch(_at_step(a.x, a, t, here), a.neurons, n)
        if t < a.steps - 1:
            v, after = _row(scratch, _VOLTAGES + t), _row(scratch, _VOLTAGES + t + 1)
            _step(scratch, a, t, here, v, spike, after, n)


@_part
def _terms(a):
    """The address of A and B, after the sums."""
    return a.scratch + 8 * SUMS * a.ranges * a.channels


@_part
def _norm_gradients(a, channel, width):
    """A and B of :mod:`..norm`, and the gradients of weight and bias, from the sums."""
    rstd, weight = _at(a.rstd, 0), _at(a.weight, 0)
    a_terms, b_terms = _at(_terms(a), 0), _at(_terms(a), a.channels)
    grad_weight, grad_bias = _at(a.grad_weight, 0), _at(a.grad_bias, 0)
    for c in range(channel, channel + width):
        to_weight, to_bias = rstd[c] * _total(a, GRAD_Y_X, c), _total(a, GRAD_Y, c)
        gain = np.float64(rstd[c] * weight[c] if a.weight else rstd[c])
        a_terms[c] = gain * to_bias / a.count
        b_terms[c] = gain * rstd[c] * to_weight / a.count
        if a.grad_weight:
            grad_weight[c], grad_bias[c] = to_weight, to_bias


@_part
def _finish_backward(a):
    """The gradients of parameters, from the sums."""
    if a.norm_sums and not a.whole:
        _norm_gradients(a, 0, a.channels)
    if a.grad_w:
        _parameter_gradient(a, a.grad_w, GRAD_Q)
    if a.grad_threshold:
        _parameter_gradient(a, a.grad_threshold, GRAD_THRESHOLD)


@_part
def _parameter_gradient(a, out, kind):
    gradient, q, total = _at(out, 0), _at(a.q, 0), 0.0
    for c in range(a.channels):
        here = _total(a, kind, c)
        if kind == GRAD_Q:
            rate = np.float64(q[c * a.per_channel])
            here *= rate * (1 - rate)  # dq/dw
        total += here
        if a.per_channel:
            gradient[c] = here
    if not a.per_channel:
        gradient[0] = total


@_part
def _store_grad_x(scratch, a, t, here, inside, n, ahead):
    """Write the input's gradient, from that of what the neuron reads, where that is another."""
    out = _at_step(a.grad_x, a, t, here)
    if a.norm:
        x, grad = _at_step(a.x, a, t, here), _grad_row(scratch, a, t, here, inside)
        _input_gradient_row(scratch, x, grad, out, a.ab != 0, n)
    _fetch(out, ahead, n)


@_part
def _input_gradient_row(scratch, x, grad, out, ab, n):
    mean, gain = _row(scratch, _MEAN), _row(scratch, _GAIN)
    a, b = _row(scratch, _A), _row(scratch, _B)
    for i in range(n):
        scaled = gain[i] * grad[i]
        out[i] = scaled - a[i] - b[i] * (x[i] - mean[i]) if ab else scaled


backward = _kernel("backward", _backward_part, _finish_backward)
