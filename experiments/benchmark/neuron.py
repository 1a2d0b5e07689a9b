"""Forward and backward time of spiking neurons over a grid of T, N and dtype.

    python experiments/benchmark/neuron.py --device cpu --steps 4 8

adds its rows to ``neuron.csv``, in place of equal ones. All neurons have tau = 2, threshold 1 and
an ATan surrogate. LIF learns nothing, PLIF tau; ALIF and FlexSN learn tau and the threshold. First
a check: every backend of ALIF and SpikingJelly's PLIF must give the same spikes, or nothing is
timed. ``--only`` leaves the other neurons out of both.

Each row has the median and the 20 % and 80 % quantiles, and the share of the bandwidth floor: the
time in which a copy, timed in the same run, would move the bytes that the fused kernels must
move, over the time taken. ``first_call_ms`` includes the compilation. SpikingJelly 2 chooses its
CUDA implementation once per process; SJ_PLIF_CUDA_IMPLEMENTATION=cuda (its native one) or triton
forces one.
"""

import itertools
from collections.abc import Callable, Sequence

import pandas as pd
import torch
from common import DTYPES, interleave, milliseconds, parser, write_csv
from spikingjelly.activation_based import functional, neuron, surrogate
from torch import Tensor, nn

from sj_taid import ALIFNode
from sj_taid.ops import backends

COPY, TORCH, FLEX_SN = "copy", "ALIF torch", "SpikingJelly FlexSN"
#: What tells a row from others.
KEYS = ["neuron", "dtype", "T", "N", "device", "plif_implementation"]


def main(arguments: Sequence[str] | None = None) -> None:
    options_parser = parser(__doc__, repeats=30, dtypes=["float32"], steps=[1, 2, 4, 8, 16, 32])
    add = options_parser.add_argument
    sizes = [2**14, 2**18, 2**22] if torch.cuda.is_available() else [2**12, 2**15, 2**18]
    add("--neurons", nargs="+", type=int, default=sizes, metavar="N")
    add("--only", nargs="+", default=[""], help="neurons whose name contains this")
    options = options_parser.parse_args(arguments)
    modules = neurons(options.device)
    if missing := [part for part in options.only if not any(part in name for name in modules)]:
        raise SystemExit(f"--only {' '.join(missing)}: expected parts of {', '.join(modules)}")
    timed = {name: modules[name] for name in modules if any(p in name for p in options.only)}
    check({TORCH: modules[TORCH]} | timed, options.device)
    tables = {}
    for dtype, T, N in itertools.product(options.dtypes, options.steps, options.neurons):
        x_seq = torch.randn(T, N, device=options.device).to(DTYPES[dtype]).requires_grad_()
        tables[dtype, T, N] = time_neurons(timed, x_seq, options.repeats)
    table = pd.concat(tables, names=["dtype", "T", "N", "neuron"]).reset_index()
    write_csv(table, options.out / "neuron.csv", options.device, KEYS)


def neurons(device: torch.device) -> dict[str, nn.Module]:
    """Neurons from ``[T, N]`` to ``[T, N]``, by name."""
    modules: dict[str, nn.Module] = {}
    options = {"step_mode": "m", "surrogate_function": surrogate.ATan()}
    for backend in backends.BACKENDS:
        node = ALIFNode(**options, backend=backend).to(device)
        try:
            node(torch.zeros(1, 1, device=device))
        except backends.BackendUnavailableError as error:
            print(f"skipped ALIF {backend}: {error}")
        else:
            modules[f"ALIF {backend}"] = node
    modules["SpikingJelly LIF"] = neuron.LIFNode(**options)
    modules["SpikingJelly PLIF"] = neuron.ParametricLIFNode(**options)
    parameters = (nn.Parameter(torch.zeros(())), nn.Parameter(torch.ones(())))
    modules[FLEX_SN] = neuron.FlexSN(alif_step, 1, static_inputs=parameters)
    return {name: module.to(device) for name, module in modules.items()}


# FlexSN takes a function that captures no module, so this one is global.
FIRE = surrogate.ATan()


def alif_step(x: Tensor, v: Tensor, w: Tensor, v_threshold: Tensor) -> tuple[Tensor, Tensor]:
    """A step of ALIF, for SpikingJelly's FlexSN to fuse."""
    h = v + (x - v) * torch.sigmoid(w)
    spike = FIRE(h - v_threshold)
    return spike, (1.0 - spike) * h


def check(modules: dict[str, nn.Module], device: torch.device) -> None:
    """Exit unless all neurons that start alike fire alike."""
    x_seq = torch.randn(6, 1000, device=device)
    alike = ("ALIF", "SpikingJelly PLIF", FLEX_SN)

    def fire(module: nn.Module) -> Tensor:
        functional.reset_net(module)
        return module(x_seq)

    expected = fire(modules[TORCH])
    for name, module in modules.items():
        if name.startswith(alike) and not torch.equal(fire(module), expected):
            raise SystemExit(f"{name} gives other spikes than {TORCH}; nothing was timed")


def time_neurons(modules: dict[str, nn.Module], x_seq: Tensor, repeats: int) -> pd.DataFrame:
    """Time forward and backward of the modules on one input; a row for each."""
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
            functional.reset_net(module)
            module(x_seq).backward(grad)

        try:
            first_ms[name] = milliseconds(call, device)
            calls[name] = call
        except (RuntimeError, TypeError, ValueError) as error:
            if name.startswith("ALIF") and not isinstance(error, torch.OutOfMemoryError):
                raise  # ours take every size and dtype
            print(f"skipped {name} at {dtype}, T={T}, N={N}: {error}")
    table = interleave(calls, repeats, device)
    bytes_per_ms = 2 * grad.nbytes / table["median_ms"][COPY]
    # Forward reads x and writes spikes and the last voltage; backward reads x and the spikes'
    # gradient and writes x's.
    floor_ms = (5 * grad.nbytes + 4 * N) / bytes_per_ms
    table = table.drop(COPY)
    return table.assign(
        first_call_ms=pd.Series(first_ms, dtype=float),
        share_of_floor=floor_ms / table["median_ms"],
        copy_GB_per_s=bytes_per_ms / 1e6,
    )


if __name__ == "__main__":
    main()
