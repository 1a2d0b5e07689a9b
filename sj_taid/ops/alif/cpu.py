"""Fused ALIF loops for the CPU, compiled by numba.

The neurons are cut into blocks. For one block, forward walks through time with the block's
voltages in the cache: it reads the input once and writes the spikes once. Backward recomputes the
block's voltages from the input in the same way and then walks back. Every loop over the neurons of
a block is a function of its own, so that LLVM vectorises each of them.

Spikes and voltages equal the reference's bit for bit: the same operations in the same order, which
LLVM neither fuses nor reorders. It may do so in the surrogates' derivatives and in the sums over
neurons alone. A parameter's gradient is summed in float32 over time and in float64 over neurons,
in parts whose bounds depend on the shape alone: the number of threads changes no bit.

What waits for memory is helped along: rows of the next step are fetched while this one is worked
on, and large results ask for huge pages, since a fresh page costs more than the arithmetic on it.

Threads are torch's own OpenMP team where that is GNU's, as on Linux: after each of torch's
operators its members spin for the next piece of work, and other threads would have to wait for
their cores. Elsewhere, and in a forked child, where the team is gone, they are this module's own
over kernels that release the GIL: numba's thread pools either abort the process when two Python
threads enter them or break in a forked child.
"""

# numba infers the types of the functions that it compiles.
# mypy: disallow-untyped-defs=False
from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload, register_jitable
from torch import Tensor

from .. import backends, surrogate
from . import autograd

#: floats of scratch memory a thread: a block's rows stay in the second-level cache
SCRATCH = 24 * 1024
#: neurons a block, at least (long sequences) and at most
BLOCK = (64, 4096)
#: element-steps that are worth a thread: two threads break even with one at twice as many
GRAIN = 1 << 19
#: floats of a row that are worked on while as many of the next row are fetched
CHUNK = 128
#: floats a cache line
LINE = 16
#: bytes from which a tensor is worth huge pages, and the size of one
HUGE = 1 << 21
#: shares of the work, at most: a parameter's gradient is summed in each, then over them
PARTS = 64

# Rows of scratch memory, and then T rows of voltages (two at least).
_Q, _THRESHOLD, _ZERO, _UNUSED, _GRAD_V, _GRAD_Q, _GRAD_THRESHOLD, _VOLTAGES = range(8)

# error_model: a division by zero must not branch, or its loop does not vectorise.
_part = register_jitable(error_model="numpy")
# Cached, since numba would take a second registration for another function.
_smooth = cache(register_jitable(error_model="numpy", fastmath={"contract"}))
_sum = register_jitable(error_model="numpy", fastmath={"reassoc"})
_kernel = njit(error_model="numpy", nogil=True, cache=True)


@intrinsic
def _at(typing_context: Any, address: Any, offset: Any) -> Any:
    """The float32 pointer ``address + 4 * offset``."""
    signature = types.CPointer(types.float32)(types.intp, types.intp)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer_type = context.get_value_type(signature.return_type)
        return builder.gep(builder.inttoptr(arguments[0], pointer_type), [arguments[1]])

    return signature, generate


@intrinsic
def _prefetch(typing_context: Any, pointer: Any, offset: Any) -> Any:
    """Begin to fetch the cache line of ``pointer[offset]``, which may lie outside the tensor."""
    signature = types.void(types.CPointer(types.float32), types.intp)

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


@_smooth
def _exp(x):
    """``e**x`` in float32 to 2 ulp; 0 below -87.7 and infinity above 88.3. It vectorises."""
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
def _forward_row(x, v, spike, v_next, q, threshold, v_rest, decay_input, soft, n, to_next):
    for first in range(0, n, CHUNK):
        last = min(first + CHUNK, n)
        _fetch(x, first + to_next, last + to_next)
        _fetch(spike, first + to_next, last + to_next)
        for i in range(first, last):
            spike[i], v_next[i] = _step(x[i], v[i], q[i], threshold[i], v_rest, decay_input, soft)


@_part
def _recompute_row(x, v, v_next, q, threshold, v_rest, decay_input, soft, n, to_next):
    for first in range(0, n, CHUNK):
        last = min(first + CHUNK, n)
        _fetch(x, first + to_next, last + to_next)
        for i in range(first, last):
            _, v_next[i] = _step(x[i], v[i], q[i], threshold[i], v_rest, decay_input, soft)


@_kernel
def _forward(
    scratch, first_part, last_part, part_size, block,
    x, v0, v_init, q, threshold, spike, v, v_seq,
    steps, neurons, inner, channels, v_rest, decay_input, soft,
):  # fmt: skip
    q_row, threshold_row = _at(scratch, _Q * block), _at(scratch, _THRESHOLD * block)
    for first in range(first_part * part_size, min(last_part * part_size, neurons), block):
        n = min(block, neurons - first)
        _spread(q_row, _at(q, 0), first, n, inner, channels)
        _spread(threshold_row, _at(threshold, 0), first, n, inner, channels)
        now = _at(scratch, _VOLTAGES * block)
        _start(now, v0, v_init, first, n)
        for t in range(steps):
            here = t * neurons + first
            # Never the row it reads from, which would look like a loop-carried dependence.
            after = _at(v_seq, here) if v_seq else _at(scratch, (_VOLTAGES + (t + 1) % 2) * block)
            _forward_row(
                _at(x, here), now, _at(spike, here), after,
                q_row, threshold_row, v_rest, decay_input, soft, n, neurons,
            )  # fmt: skip
            now = after
        _copy(_at(v, first), now, n)


@cache
def _backward(
    name: str,
    decay_input: bool,
    soft: bool,
    detach_reset: bool,
    learn_w: bool,
    learn_threshold: bool,
) -> Callable[..., None]:
    """The backward kernel for a surrogate and options; what is not asked for costs nothing.

    For numba's cache on disk, what a kernel encloses is plain functions and numbers: it is pickled
    into the key, and numba's dispatchers pickle differently in every process. And each variant has
    a name of its own: a kernel loaded from the cache and one compiled in this process may hold
    functions of one name, of which the linker keeps one.
    """
    options = (decay_input, soft, detach_reset, learn_w, learn_threshold)
    variant = "_".join(map(str, (name, *map(int, options))))
    derivative = _smooth(surrogate.DERIVATIVES[name].python)

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
                kept = grad_v[i] if soft else (np.float32(1) - spike) * grad_v[i]
                if not soft and h == np.float32(np.inf):
                    kept = np.float32(0)
                grad_h = through + kept
                if learn_threshold:
                    grad_threshold[i] -= through + (spike * grad_v[i] if soft else np.float32(0))
                if learn_w:
                    grad_q[i] += grad_h * _charge_by_q(x[i], v[i], v_rest, decay_input)
                grad_x[i] = grad_h * q[i] if decay_input else grad_h
                grad_v[i] = grad_h - grad_h * q[i]

    def backward(
        scratch, first_part, last_part, part_size, block,
        grad_spike, grad_v, grad_v_seq, x, v0, v_init, q, threshold, grad_x, grad_v0, sums,
        steps, neurons, inner, channels, v_rest, a, b,
    ):  # fmt: skip
        q_row, threshold_row = _at(scratch, _Q * block), _at(scratch, _THRESHOLD * block)
        grad_q = _at(scratch, _GRAD_Q * block)
        grad_threshold = _at(scratch, _GRAD_THRESHOLD * block)
        zero, grad_now = _at(scratch, _ZERO * block), _at(scratch, _GRAD_V * block)
        for part in range(first_part, last_part):
            for first in range(part * part_size, min((part + 1) * part_size, neurons), block):
                n = min(block, neurons - first)
                _spread(q_row, _at(q, 0), first, n, inner, channels)
                _spread(threshold_row, _at(threshold, 0), first, n, inner, channels)
                voltages = scratch + 4 * _VOLTAGES * block
                _start(_at(voltages, 0), v0, v_init, first, n)
                for t in range(steps - 1):
                    _recompute_row(
                        _at(x, t * neurons + first), _at(voltages, t * block),
                        _at(voltages, (t + 1) * block),
                        q_row, threshold_row, v_rest, decay_input, soft, n, neurons,
                    )  # fmt: skip
                _start(grad_now, grad_v, np.float32(0), first, n)
                _fill(grad_q, np.float32(0), n)
                _fill(grad_threshold, np.float32(0), n)
                _fill(zero, np.float32(0), n)
                for t in range(steps - 1, -1, -1):
                    here = t * neurons + first
                    if grad_v_seq:
                        _add(grad_now, _at(grad_v_seq, here), n)
                    row(
                        _at(x, here), _at(voltages, t * block),
                        _at(grad_spike, here) if grad_spike else zero,
                        grad_now,
                        _at(grad_x, here) if grad_x else _at(scratch, _UNUSED * block),
                        grad_q, grad_threshold, q_row, threshold_row,
                        v_rest, a, b, n, -neurons,
                    )  # fmt: skip
                if grad_v0:
                    _copy(_at(grad_v0, first), grad_now, n)
                if learn_w:
                    _gather(sums[part, 0], grad_q, first, n, inner, channels)
                if learn_threshold:
                    _gather(sums[part, 1], grad_threshold, first, n, inner, channels)

    row.__qualname__ = f"row_{variant}"
    backward.__qualname__ = f"backward_{variant}"
    return _kernel(backward)


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="sj_taid")


@cache
def _gomp() -> Any:
    """GNU's OpenMP, if torch brings it along, as its wheels for Linux do."""
    libraries = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    return ctypes.CDLL(str(libraries[0])) if libraries else None


_MEMBER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

# A forked child inherits the pool but not its threads.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)


class _Partition(NamedTuple):
    """How the neurons are shared out: a function of the shape alone."""

    parts: int
    part_size: int
    block: int
    scratch: int
    work: int

    @classmethod
    @cache
    def of(cls, steps: int, neurons: int) -> _Partition:
        rows = _VOLTAGES + max(steps, 2)
        # An odd number of cache lines, or all rows would compete for the same cache sets.
        block = min(max(SCRATCH // rows, BLOCK[0]), BLOCK[1]) // 32 * 32 + 16
        part_size = block * max(1, -(-neurons // (block * PARTS)))
        parts = -(-neurons // part_size)
        return cls(parts, part_size, block, rows * block, steps * neurons)


def _run(kernel: Callable[..., None], shape: _Partition, *arguments: Any) -> None:
    """Call the kernel for all parts, on as many threads as torch may use and the work is worth."""
    threads = max(1, min(torch.get_num_threads(), shape.parts, shape.work // GRAIN))
    scratch = torch.empty(threads * shape.scratch, dtype=torch.float32, device="cpu")

    def share(k: int) -> tuple[Any, ...]:
        first, last = shape.parts * k // threads, shape.parts * (k + 1) // threads
        own = scratch.data_ptr() + k * shape.scratch * scratch.itemsize
        return own, first, last, shape.part_size, shape.block, *arguments

    shares = iter(range(threads))
    errors = []

    def work(_: Any = None) -> None:
        try:
            for k in shares:
                kernel(*share(k))
        except BaseException as error:  # raised below: it cannot pass through C
            errors.append(error)

    _together(work, threads)
    if errors:
        raise errors[0]


def _together(work: Callable[..., None], threads: int) -> None:
    """Call ``work`` on ``threads`` threads at once."""
    if threads == 1:
        work()
    elif os.getpid() == backends.PROCESS and (gomp := _gomp()):
        gomp.GOMP_parallel(_MEMBER(work), None, threads, 0)
    else:
        others = [_pool().submit(work) for _ in range(threads - 1)]
        work()
        for other in others:
            other.result()


@cache
def _madvise() -> Any:
    """The system call of that name, where it knows of huge pages: on Linux."""
    return ctypes.CDLL(None).madvise if hasattr(mmap, "MADV_HUGEPAGE") else None


def _ask_for_huge_pages(*tensors: Tensor) -> None:
    """Let the system back large new tensors, and what takes their place later, by huge pages."""
    for tensor in tensors:
        # So large that one lies within, wherever it begins.
        if tensor.nbytes >= 2 * HUGE and (madvise := _madvise()):
            first = -(-tensor.data_ptr() // HUGE) * HUGE
            last = (tensor.data_ptr() + tensor.nbytes) // HUGE * HUGE
            madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_HUGEPAGE)


def _forward_operator(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call = autograd.Forward(*arguments)
    x = call.x_seq.float()
    spike_seq, v, v_seq, checkpoint = autograd.empty_outputs(x, *arguments[1:])
    _ask_for_huge_pages(spike_seq, v_seq)
    q = call.w.sigmoid()
    geometry = _geometry(x, q)
    _run(
        _forward,
        _Partition.of(*geometry[:2]),
        x.data_ptr(),
        _address(call.v0),
        np.float32(call.v_init),
        q.data_ptr(),
        call.v_threshold.data_ptr(),
        spike_seq.data_ptr(),
        v.data_ptr(),
        v_seq.data_ptr(),
        *geometry,
        np.float32(call.v_reset or 0.0),
        call.decay_input,
        call.v_reset is None,
    )
    return spike_seq.to(call.x_seq.dtype), v, v_seq, checkpoint


def _backward_operator(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    call = autograd.Backward(*arguments)
    x = call.x_seq.float()
    grad_spike_seq = None if call.grad_spike_seq is None else call.grad_spike_seq.float()
    grad_x, grad_v0, grad_parameters = autograd.empty_gradients(*call._replace(x_seq=x))
    _ask_for_huge_pages(grad_x)
    q = call.w.sigmoid()
    geometry = _geometry(x, q)
    shape = _Partition.of(*geometry[:2])
    sums = np.zeros((shape.parts, 2, q.numel()))
    needs = call.need_w, call.need_v_threshold
    _run(
        _backward(
            call.surrogate, call.decay_input, call.v_reset is None, call.detach_reset, *needs
        ),
        shape,
        _address(grad_spike_seq),
        _address(call.grad_v),
        _address(call.grad_v_seq),
        x.data_ptr(),
        _address(call.v0),
        np.float32(call.v_init),
        q.data_ptr(),
        call.v_threshold.data_ptr(),
        grad_x.data_ptr(),
        grad_v0.data_ptr(),
        sums,
        *geometry,
        np.float32(call.v_reset or 0.0),
        np.float32(call.a),
        np.float32(call.b),
    )
    # A few numbers, for which numpy's functions cost a fraction of torch's.
    gradients = sums.sum(0)
    rate = q.numpy().ravel().astype(np.float64)
    gradients[0] *= rate * (1 - rate)  # dq/dw
    grad_parameters.numpy()[:] = gradients[list(needs)].reshape(grad_parameters.shape)
    return grad_x.to(call.x_seq.dtype), grad_v0, grad_parameters


def _address(tensor: Tensor | None) -> int:
    """Where the data is; 0 for no tensor, as for one without elements."""
    return 0 if tensor is None else tensor.data_ptr()


def _geometry(x: Tensor, w: Tensor) -> tuple[int, int, int, int]:
    """Steps, neurons, and how the channels lie: neuron i has channel ``i // inner % channels``."""
    neurons = x.numel() // x.shape[0]
    inner = x.stride(2) if w.numel() > 1 else max(neurons, 1)
    return x.shape[0], neurons, inner, w.numel()


def unsupported(x_seq: Tensor, surrogate_function: Any) -> str | None:
    """Why these loops cannot take a call, or ``None`` if they can."""
    if x_seq.device.type != "cpu":
        return f"the input is on {x_seq.device}, and these loops run on the CPU"
    if x_seq.dtype == torch.float64:
        return "the input is float64, and these loops compute in float32"
    return surrogate.unsupported(surrogate_function)


_ENGINE = autograd.register(
    "cpu", "CPU", autograd.Engine(_forward_operator, _backward_operator, lambda steps: 0)
)
#: the backend: :func:`sj_taid.ops.alif.reference.multi_step`, fused
multi_step = partial(autograd.multi_step, _ENGINE)
