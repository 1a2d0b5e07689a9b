"""Fused ALIF loops for the CPU, compiled by numba.

The neurons are cut into blocks. For one block, forward walks through time with the block's
voltages in the cache: it reads the input once and writes the spikes once. Backward recomputes the
block's voltages from the input and then walks back. Every loop over the neurons of a block is a
function of its own, so that LLVM vectorises it. With a norm, a row of its output is computed in the
cache before it is used.

Half-precision tensors are read and written in place: a row is widened to float32 in the cache, and
an output row is rounded from there. The blocks are those of float32, so results equal those of a
float32 copy, rounded.

Spikes and voltages equal the reference's bit for bit: the same operations in the same order, which
LLVM neither fuses nor reorders. It may do so only in the surrogates' derivatives and in the sums
over neurons. A parameter's gradient is summed in float32 over time and in float64 over neurons, in
parts whose bounds depend on the shape alone: the number of threads changes no bit.

Rows of the next step are prefetched while this one is computed.
"""

# numba infers the types of the functions that it compiles.
# mypy: disallow-untyped-defs=False
from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload, register_jitable

from ... import surrogate

#: floats of a row computed while as many of the next row are fetched
CHUNK = 128
#: floats per cache line
LINE = 16

#: types of a tensor's elements
FLOAT32, BFLOAT16, FLOAT16 = range(3)

# Rows of scratch memory, and then T rows of voltages (two at least), and those of a norm.
# _SPIKE is for spikes in forward and for their gradient in backward.
_Q, _THRESHOLD, _SPIKE, _GRAD_X, _GRAD_V, _GRAD_Q, _GRAD_THRESHOLD = range(7)
_X, _A, _B, _VOLTAGES = range(7, 11)
_SHIFT, _GAIN, _OFFSET, _Y, _GRAD_OFFSET, _GRAD_GAIN, _NORM_ROWS = range(7)


def scratch_rows(steps: int, normalised: bool) -> tuple[int, int]:
    """How many rows of scratch memory the kernels need, and how many of them float32 uses.

    The latter decide the block size for half precision too, since blocks decide the order of sums.
    """
    rows = _VOLTAGES + max(steps, 2) + normalised * _NORM_ROWS
    return rows, rows - (_VOLTAGES - _X)


# error_model: a division by zero must not branch, or its loop does not vectorise.
_part = register_jitable(error_model="numpy")
# Cached, since numba would take a second registration for another function.
smooth = cache(register_jitable(error_model="numpy", fastmath={"contract"}))
_sum = register_jitable(error_model="numpy", fastmath={"reassoc"})
_kernel = njit(error_model="numpy", nogil=True, cache=True)


def _element(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    """The code for the address of an element: of an address and an offset in elements."""
    pointer_type = context.get_value_type(signature.return_type)
    return builder.gep(builder.inttoptr(arguments[0], pointer_type), [arguments[1]])


@intrinsic
def _at(typing_context: Any, address: Any, offset: Any) -> Any:
    """The float32 pointer ``address + 4 * offset``."""
    return types.CPointer(types.float32)(types.intp, types.intp), _element


@intrinsic
def _half_at(typing_context: Any, address: Any, offset: Any) -> Any:
    """The uint16 pointer ``address + 2 * offset``."""
    return types.CPointer(types.uint16)(types.intp, types.intp), _element


@intrinsic
def _byte_at(typing_context: Any, address: Any, offset: Any) -> Any:
    """The uint8 pointer ``address + offset``."""
    return types.CPointer(types.uint8)(types.intp, types.intp), _element


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


@_part
def _charge(x, v, q, v_rest, decay_input):
    if decay_input:
        return v + (x - (v - v_rest)) * q
    return v - (v - v_rest) * q + x


@_part
def _charge_by_q(x, v, v_rest, decay_input):
    return x - (v - v_rest) if decay_input else v_rest - v


@_part
def _no_overflow(h, v_rest):
    return v_rest if h == np.float32(np.inf) else h


@_part
def _reset(h, spike, threshold, v_rest, soft):
    if soft:
        return h - spike * threshold
    return (np.float32(1) - spike) * _no_overflow(h, v_rest) + spike * v_rest


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


# Conversions in integers, which every CPU can vectorise. LLVM's own conversion of float16 calls a
# function that is missing where the CPU lacks F16C. Each step is cast to 32 bits, since numba's
# integers, and so the vectors' lanes, would have 64.


@_part
def _bits(value):
    return np.float32(value).view(np.uint32)


@_part
def _float(bits):
    return np.uint32(bits).view(np.float32)


@_part
def _from_bfloat16(half):
    return _float(np.uint32(half) << 16)


@_part
def _to_bfloat16(value):
    bits = _bits(value)
    rounded = np.uint32(bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.uint16(0x7FC0 if value != value else rounded)


@_part
def _from_float16(half):
    magnitude = np.uint32(half & 0x7FFF)
    bits = np.uint32((magnitude << 13) + (112 << 23))
    if magnitude >= 31 << 10:  # infinity and NaN
        bits = np.uint32(bits + (112 << 23))
    if magnitude < 1 << 10:  # a multiple of 2**-24, as the last digits of 0.5 are
        bits = _bits(_float(magnitude + (126 << 23)) - np.float32(0.5))
    return _float(bits | np.uint32(half & 0x8000) << 16)


@_part
def _to_float16(value):
    bits = _bits(value)
    magnitude = np.uint32(bits & 0x7FFFFFFF)
    rounded = np.uint32(np.uint32(magnitude + 0xFFF + (bits >> 13 & 1) - (112 << 23)) >> 13)
    if magnitude < 113 << 23:  # to a multiple of 2**-24, by the rounding of this sum
        rounded = np.uint32(_bits(_float(magnitude) + np.float32(0.5)) - (126 << 23))
    if magnitude >= 143 << 23:
        rounded = np.uint32(31 << 10)
    if value != value:
        rounded = np.uint32(0x7E00)
    return np.uint16(rounded | bits >> 16 & 0x8000)


@_part
def _read(x, dtype, here, row, n, to_next):
    """``n`` values from element ``here`` on as float32: in place, or widened into ``row``."""
    if dtype == FLOAT32:
        return _at(x, here)
    _widen_row(_half_at(x, here), row, dtype, n, to_next)
    return row


@_part
def _widen_row(x, out, dtype, n, to_next):
    for first in range(0, n, CHUNK):
        last = min(first + CHUNK, n)
        _fetch(x, first + to_next, last + to_next)
        if dtype == BFLOAT16:
            for i in range(first, last):
                out[i] = _from_bfloat16(x[i])
        else:
            for i in range(first, last):
                out[i] = _from_float16(x[i])


@_part
def _narrow_row(values, out, dtype, n, to_next):
    for first in range(0, n, CHUNK):
        last = min(first + CHUNK, n)
        _fetch(out, first + to_next, last + to_next)
        if dtype == BFLOAT16:
            for i in range(first, last):
                out[i] = _to_bfloat16(values[i])
        else:
            for i in range(first, last):
                out[i] = _to_float16(values[i])


@_part
def _fill(out, value, n):
    for i in range(n):
        out[i] = value


@_part
def _copy(out, values, n):
    for i in range(n):
        out[i] = values[i]


@_part
def _add(out, values, n):
    for i in range(n):
        out[i] += values[i]


@_part
def _multiply(out, values, n):
    for i in range(n):
        out[i] *= values[i]


@_part
def _add_norm(grad_offset, grad_gain, grad, x, shift, n):
    for i in range(n):
        grad_offset[i] += grad[i]
        grad_gain[i] += grad[i] * (x[i] - shift[i])


@_part
def _start(out, values, value, first, n):
    """``n`` of the ``values`` from ``first`` on, or ``value`` where there are none."""
    if values:
        _copy(out, _at(values, first), n)
    else:
        _fill(out, value, n)


@_part
def _spread(out, values, first, n, inner, channels):
    """The channel's value for each of the ``n`` neurons from ``first`` on."""
    done = 0
    while done < n:
        channel = (first + done) // inner % channels
        if inner == 1:
            run = min(n - done, channels - channel)
            for i in range(run):
                out[done + i] = values[channel + i]
        else:
            run = min(n - done, inner - (first + done) % inner)
            for i in range(run):
                out[done + i] = values[channel]
        done += run


@_sum
def _gather(sums, values, first, n, inner, channels):
    """Add the values of the ``n`` neurons from ``first`` on to the sum of their channel."""
    done = 0
    while done < n:
        channel = (first + done) // inner % channels
        if inner == 1:
            run = min(n - done, channels - channel)
            for i in range(run):
                sums[channel + i] += np.float64(values[done + i])
        else:
            run = min(n - done, inner - (first + done) % inner)
            total = 0.0
            for i in range(run):
                total += np.float64(values[done + i])
            sums[channel] += total
        done += run


@_part
def _step(x, v, q, threshold, v_rest, decay_input, soft):
    h = _charge(x, v, q, v_rest, decay_input)
    fired = np.float32(h - threshold >= np.float32(0))
    return fired, _reset(h, fired, threshold, v_rest, soft)


@_part
def _fetch(row, first, last):
    for i in range(first, last, LINE):
        _prefetch(row, i)


@_part
def _normalise(rows, x, y, n, to_next, block):
    shift, gain, offset = _at(rows, 0), _at(rows, _GAIN * block), _at(rows, _OFFSET * block)
    for first in range(0, n, CHUNK):
        last = min(first + CHUNK, n)
        _fetch(x, first + to_next, last + to_next)
        for i in range(first, last):
            y[i] = (x[i] - shift[i]) * gain[i] + offset[i]


@_part
def _pack_row(spike, bits, bit, n):
    for i in range(n):
        fired = np.uint8(np.uint8(spike[i] != np.float32(0)) << bit)
        bits[i] = fired if bit == 0 else bits[i] | fired


@_part
def _forward_row(x, v, spike, v_next, q, threshold, v_rest, decay_input, soft, n, to_x, to_next):
    for first in range(0, n, CHUNK):
        last = min(first + CHUNK, n)
        _fetch(x, first + to_x, last + to_x)
        _fetch(spike, first + to_next, last + to_next)
        for i in range(first, last):
            spike[i], v_next[i] = _step(x[i], v[i], q[i], threshold[i], v_rest, decay_input, soft)


@_part
def _recompute_row(x, v, v_next, q, threshold, v_rest, decay_input, soft, n, to_x):
    for first in range(0, n, CHUNK):
        last = min(first + CHUNK, n)
        _fetch(x, first + to_x, last + to_x)
        for i in range(first, last):
            _, v_next[i] = _step(x[i], v[i], q[i], threshold[i], v_rest, decay_input, soft)


@_part
def _norm_rows(scratch, steps, block):
    """Where the rows of a norm begin."""
    return scratch + 4 * (_VOLTAGES + max(steps, 2)) * block


@_part
def _spread_norm(rows, table, first, n, inner, channels, block):
    for k in range(3):  # shift, gain, offset
        _spread(_at(rows, k * block), _at(table, k * channels), first, n, inner, channels)


@_kernel
def forward(
    scratch, first_part, last_part, part_size, block,
    x, v0, q, threshold, spike, v, v_seq, norm, bits, dtype,
    steps, neurons, inner, channels, norm_inner, norm_channels, v_init, v_rest, decay_input, soft,
):  # fmt: skip
    rows = _norm_rows(scratch, steps, block)
    x_row, y_row = _at(scratch, _X * block), _at(rows, _Y * block)
    spike_row = _at(scratch, _SPIKE * block)
    q_row, threshold_row = _at(scratch, _Q * block), _at(scratch, _THRESHOLD * block)
    to_next = neurons if dtype == FLOAT32 else 0  # what follows a row of scratch is no next step's
    for first in range(first_part * part_size, min(last_part * part_size, neurons), block):
        n = min(block, neurons - first)
        _spread(q_row, _at(q, 0), first, n, inner, channels)
        _spread(threshold_row, _at(threshold, 0), first, n, inner, channels)
        now = _at(scratch, _VOLTAGES * block)
        _start(now, v0, v_init, first, n)
        to_x = to_next
        if norm:
            _spread_norm(rows, norm, first, n, norm_inner, norm_channels, block)
            to_x = 0
        for t in range(steps):
            here = t * neurons + first
            row = _read(x, dtype, here, x_row, n, neurons)
            if norm:
                _normalise(rows, row, y_row, n, to_next, block)
                row = y_row
            fired = _at(spike, here) if dtype == FLOAT32 else spike_row
            # Never the row it reads from, which would look like a loop-carried dependence.
            after = _at(v_seq, here) if v_seq else _at(scratch, (_VOLTAGES + (t + 1) % 2) * block)
            _forward_row(
                row, now, fired, after,
                q_row, threshold_row, v_rest, decay_input, soft, n, to_x, to_next,
            )  # fmt: skip
            if bits:
                _pack_row(fired, _byte_at(bits, t // 8 * neurons + first), t % 8, n)
            if dtype != FLOAT32:
                _narrow_row(fired, _half_at(spike, here), dtype, n, neurons)
            now = after
        _copy(_at(v, first), now, n)


@cache
def backward_for(
    name: str,
    decay_input: bool,
    soft: bool,
    detach_reset: bool,
    learn_w: bool,
    learn_threshold: bool,
) -> Callable[..., None]:
    """The backward kernel for a surrogate and options; what is not needed costs nothing.

    A kernel encloses only plain functions and numbers: numba pickles them into the key of its cache
    on disk, and its dispatchers pickle differently in every process. Each variant has its own name,
    since the linker keeps one of two functions of the same name.
    """
    options = (decay_input, soft, detach_reset, learn_w, learn_threshold)
    variant = "_".join(map(str, (name, *map(int, options))))
    derivative = smooth(surrogate.DERIVATIVES[name].python)

    @_part
    def row(
        x, v, grad_spike, grad_v, grad_x, grad_q, grad_threshold,
        q, threshold, v_rest, a, b, n, to_next,
    ):  # fmt: skip
        for first in range(0, n, CHUNK):
            last = min(first + CHUNK, n)
            _fetch(grad_spike, first + to_next, last + to_next)
            _fetch(grad_x, first + to_next, last + to_next)
            for i in range(first, last):
                h = _charge(x[i], v[i], q[i], v_rest, decay_input)
                over = h - threshold[i]
                spike = np.float32(over >= np.float32(0))
                through = grad_spike[i]
                if not detach_reset:
                    by_spike = -threshold[i] if soft else v_rest - _no_overflow(h, v_rest)
                    through += grad_v[i] * by_spike
                through *= np.float32(derivative(over, a, b))
                # Products, not choices, as torch's: what is not finite stays so.
                past_reset = grad_v[i] if soft else (np.float32(1) - spike) * grad_v[i]
                if not soft and h == np.float32(np.inf):
                    past_reset = np.float32(0)
                grad_h = through + past_reset
                if learn_threshold:
                    grad_threshold[i] -= through + (spike * grad_v[i] if soft else np.float32(0))
                if learn_w:
                    grad_q[i] += grad_h * _charge_by_q(x[i], v[i], v_rest, decay_input)
                grad_x[i] = grad_h * q[i] if decay_input else grad_h
                grad_v[i] = grad_h - grad_h * q[i]

    def backward(
        scratch, first_part, last_part, part_size, block,
        grad_spike, grad_v, grad_v_seq, x, v0, q, threshold, norm, ab, grad_x, grad_v0,
        sums, norm_sums, dtype, grad_x_dtype, need_norm, fixed_norm,
        steps, neurons, inner, channels, norm_inner, norm_channels, v_init, v_rest, a, b,
    ):  # fmt: skip
        rows = _norm_rows(scratch, steps, block)
        x_row, y_row = _at(scratch, _X * block), _at(rows, _Y * block)
        a_row, b_row = _at(scratch, _A * block), _at(scratch, _B * block)
        grad_offset, grad_gain = _at(rows, _GRAD_OFFSET * block), _at(rows, _GRAD_GAIN * block)
        q_row, threshold_row = _at(scratch, _Q * block), _at(scratch, _THRESHOLD * block)
        grad_q = _at(scratch, _GRAD_Q * block)
        grad_threshold = _at(scratch, _GRAD_THRESHOLD * block)
        grad_spike_row = _at(scratch, _SPIKE * block)
        grad_now = _at(scratch, _GRAD_V * block)
        to_next = neurons if dtype == FLOAT32 else 0
        for part in range(first_part, last_part):
            for first in range(part * part_size, min((part + 1) * part_size, neurons), block):
                n = min(block, neurons - first)
                _spread(q_row, _at(q, 0), first, n, inner, channels)
                _spread(threshold_row, _at(threshold, 0), first, n, inner, channels)
                voltages = scratch + 4 * _VOLTAGES * block
                _start(_at(voltages, 0), v0, v_init, first, n)
                to_x = to_next
                if norm:
                    to_x = 0
                    _spread_norm(rows, norm, first, n, norm_inner, norm_channels, block)
                    _fill(grad_offset, np.float32(0), n)
                    _fill(grad_gain, np.float32(0), n)
                if ab:
                    _spread(a_row, _at(ab, 0), first, n, norm_inner, norm_channels)
                    _spread(b_row, _at(ab, norm_channels), first, n, norm_inner, norm_channels)
                for t in range(steps - 1):
                    current = _read(x, dtype, t * neurons + first, x_row, n, neurons)
                    if norm:
                        _normalise(rows, current, y_row, n, to_next, block)
                        current = y_row
                    _recompute_row(
                        current, _at(voltages, t * block),
                        _at(voltages, (t + 1) * block),
                        q_row, threshold_row, v_rest, decay_input, soft, n, to_x,
                    )  # fmt: skip
                _start(grad_now, grad_v, np.float32(0), first, n)
                _fill(grad_q, np.float32(0), n)
                _fill(grad_threshold, np.float32(0), n)
                _fill(grad_spike_row, np.float32(0), n)
                for t in range(steps - 1, -1, -1):
                    here = t * neurons + first
                    if grad_v_seq:
                        _add(grad_now, _at(grad_v_seq, here), n)
                    x_now = current = _read(x, dtype, here, x_row, n, -neurons)
                    if norm:
                        _normalise(rows, x_now, y_row, n, -to_next, block)
                        current = y_row
                    grad_fired = grad_spike_row
                    if grad_spike:
                        grad_fired = _read(grad_spike, dtype, here, grad_spike_row, n, -neurons)
                    grad_current = _at(scratch, _GRAD_X * block)
                    if grad_x and grad_x_dtype == FLOAT32:
                        grad_current = _at(grad_x, here)
                    row(
                        current, _at(voltages, t * block), grad_fired, grad_now, grad_current,
                        grad_q, grad_threshold, q_row, threshold_row,
                        v_rest, a, b, n, -to_next,
                    )  # fmt: skip
                    if need_norm:
                        _add_norm(grad_offset, grad_gain, grad_current, x_now, _at(rows, 0), n)
                    if ab:
                        _input_gradient_row(
                            x_now, grad_current, _at(rows, 0), _at(rows, _GAIN * block),
                            a_row, b_row, n, 0,
                        )  # fmt: skip
                    if fixed_norm:
                        _multiply(grad_current, _at(rows, _GAIN * block), n)
                    if grad_x and grad_x_dtype != FLOAT32:
                        _narrow_row(grad_current, _half_at(grad_x, here), grad_x_dtype, n, -neurons)
                if grad_v0:
                    _copy(_at(grad_v0, first), grad_now, n)
                if need_norm:
                    _gather(norm_sums[part, 0], grad_offset, first, n, norm_inner, norm_channels)
                    _gather(norm_sums[part, 1], grad_gain, first, n, norm_inner, norm_channels)
                if learn_w:
                    _gather(sums[part, 0], grad_q, first, n, inner, channels)
                if learn_threshold:
                    _gather(sums[part, 1], grad_threshold, first, n, inner, channels)

    row.__qualname__ = f"row_{variant}"
    backward.__qualname__ = f"backward_{variant}"
    return _kernel(backward)


@_kernel
def statistics(
    scratch, first_part, last_part, part_size, block,
    x, first_values, sums, dtype, steps, neurons, inner, channels,
):  # fmt: skip
    """Sums over a channel's neurons: means over time, their squares, and squared deviations.

    All of ``x`` minus the channel's first value, which loses no digits.
    """
    x_row = _at(scratch, _X * block)
    to_next = neurons if dtype == FLOAT32 else 0
    shift, mean = _at(scratch, _SHIFT * block), _at(scratch, _GAIN * block)
    square = _at(scratch, _OFFSET * block)
    for part in range(first_part, last_part):
        for first in range(part * part_size, min((part + 1) * part_size, neurons), block):
            n = min(block, neurons - first)
            _spread(shift, _at(first_values, 0), first, n, inner, channels)
            _fill(mean, np.float32(0), n)
            for t in range(steps):
                row = _read(x, dtype, t * neurons + first, x_row, n, neurons)
                _add_differences(mean, row, shift, n, to_next)
            for i in range(n):
                mean[i] /= np.float32(steps)
            _gather(sums[part, 0], mean, first, n, inner, channels)
            for i in range(n):
                square[i] = mean[i] * mean[i]
            _gather(sums[part, 1], square, first, n, inner, channels)
            _fill(square, np.float32(0), n)
            for t in range(steps):
                row = _read(x, dtype, t * neurons + first, x_row, n, 0)
                _add_deviations(square, row, shift, mean, n)
            _gather(sums[part, 2], square, first, n, inner, channels)


@_part
def _add_differences(out, x, shift, n, to_next):
    for first in range(0, n, CHUNK):
        last = min(first + CHUNK, n)
        _fetch(x, first + to_next, last + to_next)
        for i in range(first, last):
            out[i] += x[i] - shift[i]


@_part
def _add_deviations(out, x, shift, mean, n):
    for i in range(n):
        deviation = (x[i] - shift[i]) - mean[i]
        out[i] += deviation * deviation


@_kernel
def input_gradient(
    scratch, first_part, last_part, part_size, block,
    x, grad_x, table, steps, neurons, inner, channels,
):  # fmt: skip
    """Replace G_y by ``gain G_y - A - B (x - shift)``; the table has shift, gain, A and B."""
    for first in range(first_part * part_size, min(last_part * part_size, neurons), block):
        n = min(block, neurons - first)
        for k in range(4):
            _spread(_at(scratch, k * block), _at(table, k * channels), first, n, inner, channels)
        for t in range(steps):
            here = t * neurons + first
            _input_gradient_row(
                _at(x, here), _at(grad_x, here), _at(scratch, 0), _at(scratch, block),
                _at(scratch, 2 * block), _at(scratch, 3 * block), n, neurons,
            )  # fmt: skip


@_part
def _input_gradient_row(x, grad_x, shift, gain, a, b, n, to_next):
    for first in range(0, n, CHUNK):
        last = min(first + CHUNK, n)
        _fetch(x, first + to_next, last + to_next)
        _fetch(grad_x, first + to_next, last + to_next)
        for i in range(first, last):
            grad_x[i] = gain[i] * grad_x[i] - a[i] - b[i] * (x[i] - shift[i])
