"""Forward and backward time of spiking neurons over a grid of T, N and dtype.

    python experiments/benchmark/neuron.py --device cpu --steps 4 8

writes ``neuron.csv``. First a check: every backend of ALIF and SpikingJelly's PLIF must give the
same spikes, or nothing is timed. ``--only`` leaves the other neurons out of both.

Each row has the median and the 20 % and 80 % quantiles, and the share of the bandwidth floor: the
time in which a copy, timed in the same run, would move the bytes that the fused kernels must
move, over the time taken. ``first_call_ms`` includes the compilation. SpikingJelly 2 chooses its
CUDA implementation once per process; SJ_PLIF_CUDA_IMPLEMENTATION=cuda (its native one) or triton
forces one, and ``--append`` adds the rows of such a run to the same file.

    SJ_TAID_TRACE=calls.jsonl python train.py
    python experiments/benchmark/neuron.py --trace calls.jsonl

times the fused calls of your own program instead: each that differs once, with how often it came,
on random values, next to SpikingJelly's neurons with the same options, after a batch norm where the
call has one. The share of the floor is then of the neuron alone.
"""

import itertools
import json
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from common import (
    DTYPES,
    Fresh,
    conditions,
    interleave,
    milliseconds,
    neurons,
    parser,
    read_csv,
    write_csv,
)
from spikingjelly.activation_based import layer, neuron, surrogate
from torch import Tensor, nn

from sj_taid.functional import alif_multi_step
from sj_taid.ops.alif.norm import Norm

COPY, TORCH, FLEX_SN = "copy", "ALIF torch", "SpikingJelly FlexSN"


def main(arguments: Sequence[str] | None = None) -> None:
    options_parser = parser(__doc__, repeats=30)
    add = options_parser.add_argument
    add("--dtypes", nargs="+", choices=DTYPES, default=["float32"])
    add("--steps", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32], metavar="T")
    sizes = [2**14, 2**18, 2**22] if torch.cuda.is_available() else [2**12, 2**15, 2**18]
    add("--neurons", nargs="+", type=int, default=sizes, metavar="N")
    add("--only", nargs="+", default=[""], help="neurons whose name contains this")
    add("--append", action="store_true", help="keep the rows already there")
    add("--trace", type=Path, metavar="FILE", help="time the calls in FILE, not a grid")
    options = options_parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    device, repeats = options.device, options.repeats
    modules = neurons(device)
    if missing := [part for part in options.only if not any(part in name for name in modules)]:
        raise SystemExit(f"--only {' '.join(missing)}: expected parts of {', '.join(modules)}")
    timed = {name: modules[name] for name in modules if any(p in name for p in options.only)}
    calls = read_calls(options.trace, timed, device) if options.trace else []
    check({TORCH: modules[TORCH]} | timed, device)
    path = options.out / "neuron.csv"
    append = options.append and path.exists()
    rows = read_csv(path).to_dict("records") if append else []
    for line, count, x_seq, replays in calls:
        print(f"{count} x {line}")
        timings = time_neurons(replays, x_seq, repeats)
        rows += [row | {"calls": count, "call": line} for row in timings]
    if not options.trace:
        for dtype, T, N in itertools.product(options.dtypes, options.steps, options.neurons):
            x_seq = torch.randn(T, N, device=device).to(DTYPES[dtype]).requires_grad_()
            rows += time_neurons(timed, x_seq, repeats)
    write_csv(rows, path)


def check(modules: dict[str, nn.Module], device: torch.device) -> None:
    """Exit unless all neurons that start alike fire alike."""
    x_seq = torch.randn(6, 1000, device=device)
    alike = ("ALIF", "SpikingJelly PLIF", FLEX_SN)
    expected = modules[TORCH](x_seq)
    for name, module in modules.items():
        if name.startswith(alike) and not torch.equal(module(x_seq), expected):
            raise SystemExit(f"{name} gives other spikes than {TORCH}; nothing was timed")


def time_neurons(
    modules: dict[str, nn.Module], x_seq: Tensor, repeats: int
) -> list[dict[str, Any]]:
    """Time the modules on one input, with the backward if it needs a gradient; a row for each."""
    T, N, device = len(x_seq), x_seq[0].numel(), x_seq.device
    dtype = str(x_seq.dtype).removeprefix("torch.")
    grad = torch.randn(x_seq.shape, device=device).to(x_seq.dtype)
    target = torch.empty_like(grad)
    calls: dict[str, Callable[[], object]] = {COPY: lambda: target.copy_(grad)}
    first_ms = {}
    for name, module in modules.items():

        def call(module: nn.Module = module) -> None:
            x_seq.grad = None
            module.zero_grad(set_to_none=True)
            with torch.set_grad_enabled(x_seq.requires_grad):
                spike_seq = module(x_seq)
            if x_seq.requires_grad:
                spike_seq.backward(grad)

        try:
            first_ms[name] = milliseconds(call, device)
            calls[name] = call
        except (RuntimeError, TypeError, ValueError) as error:
            if name.startswith("ALIF") and not isinstance(error, torch.OutOfMemoryError):
                raise  # ours take every size and dtype
            print(f"skipped {name} at {dtype}, T={T}, N={N}: {error}")
    timings = interleave(calls, repeats, device, warm_up=3)
    bytes_per_ms = 2 * grad.nbytes / timings.pop(COPY).median_ms
    # Forward reads x and writes spikes and the last voltage; backward reads x and the spikes'
    # gradient and writes x's.
    sequences = 5 if x_seq.requires_grad else 2
    floor_ms = (sequences * grad.nbytes + 4 * N) / bytes_per_ms
    rows = [
        {"neuron": name, "dtype": dtype, "T": T, "N": N}
        | timing._asdict()
        | {"first_call_ms": first_ms[name], "share_of_floor": floor_ms / timing.median_ms}
        | {"copy_GB_per_s": bytes_per_ms / 1e6, **conditions(device)}
        for name, timing in timings.items()
    ]
    print(pd.DataFrame(rows).iloc[:, :9].to_string(index=False, header=False))
    return rows


# ---- the calls of a trace ----

NORMS = {3: layer.BatchNorm1d, 4: layer.BatchNorm1d, 5: layer.BatchNorm2d, 6: layer.BatchNorm3d}
RIVALS = {"SpikingJelly LIF": neuron.LIFNode, "SpikingJelly PLIF": neuron.ParametricLIFNode}
#: a line of the trace, how often it came, its input, the neurons to time
Call = tuple[str, int, Tensor, dict[str, nn.Module]]


def read_calls(path: Path, names: Collection[str], device: torch.device) -> list[Call]:
    """Each different call of a trace once, for the neurons ``names``."""
    try:
        counts = Counter(path.read_text(encoding="utf-8").splitlines())
    except (OSError, ValueError) as error:
        raise SystemExit(f"--trace: {error}; expected a file that SJ_TAID_TRACE wrote") from error
    if not counts:
        raise SystemExit(f"--trace {path}: expected a line for each fused call, but it is empty")
    calls = []
    for line, count in counts.items():
        try:
            call = json.loads(line)
            replays = {name: make(call, name).to(device) for name in names if name != FLEX_SN}
            calls.append((line, count, make_input(call, device), replays))
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise SystemExit(
                f"--trace {path}: expected calls that SJ_TAID_TRACE wrote, got {line[:60]!r}: "
                f"{type(error).__name__}: {error}; trace again with the version that is here"
            ) from error
    return calls


def make_input(call: dict[str, Any], device: torch.device) -> Tensor:
    """Random values in a call's dtype and layout."""
    shape, stride = call["shape"], call["stride"]
    extent = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    values = torch.randn(extent, device=device).to(DTYPES[call["dtype"]])
    return values.as_strided(shape, stride).requires_grad_(call["grad"] != [])


def make(call: dict[str, Any], name: str) -> nn.Module:
    """The neuron ``name`` with a call's options, behind a batch norm if the call has one."""
    options = {key: call[key] for key in ("decay_input", "v_reset", "detach_reset")}
    make_surrogate = getattr(surrogate, call["surrogate"])
    options["surrogate_function"] = make_surrogate(**call["surrogate_options"])
    norms = []
    if call["norm"]:
        norm = NORMS[len(call["shape"])](call["shape"][2], step_mode="m")
        norms.append(norm.train(call["norm"] == "batch"))
    if name in RIVALS:
        return nn.Sequential(*norms, Fresh(RIVALS[name](**options, step_mode="m")))
    options |= {key: call[key] for key in ("store_v_seq", "return_bits")}
    options["backend"] = name.removeprefix("ALIF ")
    return Replay(call, options, *norms)


class Replay(nn.Module):
    """A call of the operator, with parameters and voltages of its own."""

    v: Tensor | None

    def __init__(
        self, call: dict[str, Any], options: dict[str, Any], norm: nn.Module | None = None
    ) -> None:
        super().__init__()
        channels = call["shape"][2:3] if call["per_channel"] else ()
        self.w = nn.Parameter(torch.zeros(channels), "w" in call["grad"])
        self.v_threshold = nn.Parameter(torch.ones(channels), "v_threshold" in call["grad"])
        self.register_buffer("v", torch.zeros(call["shape"][1:]) if call["v_tensor"] else None)
        self.options, self.norm = options, norm

    def forward(self, x_seq: Tensor) -> Tensor:
        v = 0.0 if self.v is None else self.v
        norm = None if self.norm is None else Norm.of(self.norm, self.norm.training)
        parameters = (self.w, self.v_threshold)
        return alif_multi_step(x_seq, v, *parameters, norm=norm, **self.options)[0]


if __name__ == "__main__":
    main()
