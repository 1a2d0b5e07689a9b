"""Forward and backward time of spiking neurons over a grid of T, N and dtype.

    python experiments/benchmark/neuron.py --device cpu --steps 4 8

writes ``neuron.csv`` and ``neuron.png``. First a check: every backend of ALIF must give torch's
spikes and gradients, and SpikingJelly's PLIF the same spikes, or nothing is timed. ``--only``
leaves the other neurons out of both.

Each row has the median and the 20 % and 80 % quantiles, and the share of the bandwidth floor: the
time in which a copy, timed in the same run, would move the bytes that the fused kernels must
move, over the time taken. ``first_call_ms`` includes the compilation. SpikingJelly 2 chooses its
CUDA implementation once per process; SJ_PLIF_CUDA_IMPLEMENTATION=cuda (its native one) or triton
forces one, and ``--append`` adds the rows of such a run to the same file.
"""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from common import DTYPES, conditions, interleave, milliseconds, neurons, parser, write_csv
from matplotlib.figure import Figure
from torch import Tensor, nn

from sj_taid.ops.alif.kernels import Options, traffic
from sj_taid.training.plot import save

COPY, TORCH = "copy", "ALIF torch"


def main(arguments: Sequence[str] | None = None) -> None:
    options_parser = parser(__doc__, repeats=30)
    add = options_parser.add_argument
    add("--dtypes", nargs="+", choices=DTYPES, default=["float32"])
    add("--steps", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32], metavar="T")
    sizes = [2**14, 2**18, 2**22] if torch.cuda.is_available() else [2**12, 2**15, 2**18]
    add("--neurons", nargs="+", type=int, default=sizes, metavar="N")
    add("--only", nargs="+", default=[""], help="neurons whose name contains this")
    add("--append", action="store_true", help="keep the rows already there")
    options = options_parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    modules = neurons(options.device)
    if missing := [part for part in options.only if not any(part in name for name in modules)]:
        raise SystemExit(f"--only {' '.join(missing)}: expected parts of {', '.join(modules)}")
    timed = {name: modules[name] for name in modules if any(p in name for p in options.only)}
    check({TORCH: modules[TORCH]} | timed, options.device)
    path = options.out / "neuron.csv"
    append = options.append and path.exists()
    rows = pd.read_csv(path).to_dict("records") if append else []
    for dtype, T, N in itertools.product(options.dtypes, options.steps, options.neurons):
        rows += time_neurons(timed, dtype, T, N, options.device, options.repeats)
    draw(write_csv(rows, path), path.with_suffix(".png"))


def check(modules: dict[str, nn.Module], device: torch.device) -> None:
    """Exit unless all neurons compute the same spikes and gradients."""
    x_seq = torch.randn(6, 1000, device=device)
    grad = torch.randn_like(x_seq)
    expected = spikes_and_gradients(modules[TORCH], x_seq, grad)
    for name, module in modules.items():
        if not name.startswith(("ALIF", "SpikingJelly PLIF", "SpikingJelly FlexSN")):
            continue
        spikes, *gradients = spikes_and_gradients(module, x_seq, grad)
        same_spikes = torch.equal(spikes, expected[0])
        # PLIF has no gradient of a threshold: compare those that both have.
        close = all(
            torch.allclose(got, wanted, rtol=1e-4, atol=1e-3)
            for got, wanted in zip(gradients, expected[1:], strict=False)
        )
        if not (same_spikes and close):
            raise SystemExit(
                f"{name} differs from {TORCH} in its "
                f"{'gradients' if same_spikes else 'spikes'}; nothing was timed"
            )


def spikes_and_gradients(module: nn.Module, x_seq: Tensor, grad: Tensor) -> list[Tensor]:
    """Spikes, then the gradients of the input and the parameters, tau's first."""
    x_seq = x_seq.clone().requires_grad_()
    spikes = module(x_seq)
    leaves = [x_seq, *module.parameters()]
    return [spikes.detach(), *torch.autograd.grad(spikes, leaves, grad)]


def time_neurons(
    modules: dict[str, nn.Module], dtype: str, T: int, N: int, device: torch.device, repeats: int
) -> list[dict[str, Any]]:
    """Time the modules at one size; a row for each."""
    x_seq = torch.randn(T, N, device=device).to(DTYPES[dtype]).requires_grad_()
    grad = torch.randn(T, N, device=device).to(DTYPES[dtype])
    target = torch.empty_like(grad)
    calls: dict[str, Callable[[], object]] = {COPY: lambda: target.copy_(grad)}
    first_ms = {}
    for name, module in modules.items():

        def call(module: nn.Module = module) -> None:
            x_seq.grad = None
            module.zero_grad(set_to_none=True)
            module(x_seq).backward(grad)

        try:
            first_ms[name] = milliseconds(call, device)
            calls[name] = call
        except (RuntimeError, TypeError, ValueError) as error:
            if name.startswith("ALIF") and not isinstance(error, torch.OutOfMemoryError):
                raise  # ours take every size and dtype
            print(f"skipped {name} at {dtype}, T={T}, N={N}: {error}")
    timings = interleave(calls, repeats, device, warm_up=3)
    bytes_per_ms = 2 * grad.nbytes / timings.pop(COPY).median_ms
    floor_ms = sum(traffic(Options(DTYPES[dtype], T, 0.0, True, False))) * T * N / bytes_per_ms
    rows = [
        {"neuron": name, "dtype": dtype, "T": T, "N": N}
        | timing._asdict()
        | {"first_call_ms": first_ms[name], "share_of_floor": floor_ms / timing.median_ms}
        | {"copy_GB_per_s": bytes_per_ms / 1e6, **conditions(device)}
        for name, timing in timings.items()
    ]
    print(pd.DataFrame(rows).iloc[:, :9].to_string(index=False, header=False))
    return rows


def draw(table: pd.DataFrame, path: Path) -> None:
    """Plot the median time over N with its quantiles, a panel for each dtype and T."""
    dtypes, steps = table["dtype"].unique(), sorted(table["T"].unique())
    figure = Figure((1.5 + 2.6 * len(steps), 1.2 + 2.4 * len(dtypes)), layout="constrained")
    axes = figure.subplots(len(dtypes), len(steps), sharex=True, sharey=True, squeeze=False)
    for (i, dtype), (j, T) in itertools.product(enumerate(dtypes), enumerate(steps)):
        panel = table[(table["dtype"] == dtype) & (table["T"] == T)].sort_values("N")
        for k, name in enumerate(table["neuron"].unique()):
            line = panel[panel["neuron"] == name]
            style = "-" if name.startswith("ALIF") else "--"
            axes[i, j].plot("N", "median_ms", style, data=line, marker="o", ms=3, label=name)
            axes[i, j].fill_between("N", "p20_ms", "p80_ms", data=line, color=f"C{k}", alpha=0.2)
        axes[i, j].set_xscale("log", base=2)
        axes[i, j].set(yscale="log", title=f"{dtype}, T = {T}")
        axes[i, j].grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("neurons")
    figure.supylabel("forward + backward, ms")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    figure.suptitle(table["device"].iloc[-1], fontsize=9)
    save(figure, path, dpi=150)


if __name__ == "__main__":
    main()
