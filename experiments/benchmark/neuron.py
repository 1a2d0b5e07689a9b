"""Time forward + backward of spiking neurons over a grid of T, N and dtype.

    python experiments/benchmark/neuron.py --device cpu --steps 4 8 --out runs/neuron

writes ``neuron.csv`` and ``neuron.png``. First a gate: every backend of ours must give torch's
spikes and gradients, and SpikingJelly's PLIF the same spikes, or nothing is measured.

Each row has the median and the 20 % and 80 % quantiles, and the share of the bandwidth floor: the
time in which a copy, measured in the same run, would move the bytes that the fused kernels must
move, over the time taken. ``first_call_ms`` holds the compilation. SpikingJelly 2 chooses its CUDA
implementation once a process; SJ_PLIF_CUDA_IMPLEMENTATION=native or triton forces one, and
--append adds the rows of such a run to the same file.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from experiments.benchmark.contestants import contestants
from experiments.benchmark.measure import quantiles, write_csv
from sj_taid.ops.alif.kernels import Options, traffic
from sj_taid.training.plot import plt, save
from sj_taid.training.provenance import cpu_name

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
WARM_UP = 3  # rounds
COPY = "copy"


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    device = torch.device(options.device)
    modules = contestants(device)
    gate(modules, device)
    measured = {
        name: module for name, module in modules.items() if any(p in name for p in options.only)
    }
    rows = []
    for dtype, T, N in itertools.product(options.dtypes, options.steps, options.neurons):
        rows += measure(measured, device, DTYPES[dtype], T, N, options.repeats)
    path = options.out / "neuron.csv"
    rows = (read(path) if options.append else []) + rows
    write_csv(rows, path)
    draw(rows, options.out / "neuron.png")
    print(f"wrote {path} and {path.with_suffix('.png')}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32"])
    parser.add_argument("--steps", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32], metavar="T")
    sizes = [2**14, 2**18, 2**22] if cuda else [2**12, 2**15, 2**18]
    parser.add_argument("--neurons", nargs="+", type=int, default=sizes, metavar="N")
    parser.add_argument("--repeats", type=int, default=30, help="calls timed for each row")
    parser.add_argument("--only", nargs="+", default=[""], help="contestants whose name has this")
    parser.add_argument("--append", action="store_true", help="keep the rows already there")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark"))
    return parser.parse_args(arguments)


# ---- the gate ----


def gate(modules: dict[str, nn.Module], device: torch.device) -> None:
    """Stop unless all compute the same thing."""
    x_seq = torch.randn(6, 1000, device=device)
    grad = torch.randn_like(x_seq)
    expected = outcome(modules["ALIF torch"], x_seq, grad)
    for name, module in modules.items():
        if not name.startswith(("ALIF", "SpikingJelly PLIF", "SpikingJelly FlexSN")):
            continue
        spikes, *gradients = outcome(module, x_seq, grad)
        same_spikes = torch.equal(spikes, expected[0])
        # PLIF has no gradient of a threshold: compare those both have.
        close = all(
            torch.allclose(got, wanted, rtol=1e-4, atol=1e-3)
            for got, wanted in zip(gradients, expected[1:], strict=False)
        )
        if not (same_spikes and close):
            raise SystemExit(
                f"conformance gate: {name} differs from ALIF torch in its "
                f"{'gradients' if same_spikes else 'spikes'}; nothing was measured"
            )


def outcome(module: nn.Module, x_seq: Tensor, grad: Tensor) -> list[Tensor]:
    """Spikes and the gradients of the input and the parameters, tau's first."""
    x_seq = x_seq.clone().requires_grad_()
    spikes = module(x_seq)
    leaves = [x_seq, *module.parameters()]
    return [spikes.detach(), *torch.autograd.grad(spikes, leaves, grad)]


# ---- the measurement ----


def measure(
    modules: dict[str, nn.Module],
    device: torch.device,
    dtype: torch.dtype,
    T: int,
    N: int,
    repeats: int,
) -> list[dict[str, object]]:
    """A row for each module."""
    x_seq = torch.randn(T, N, device=device).to(dtype).requires_grad_()
    grad = torch.randn(T, N, device=device).to(dtype)
    target = torch.empty_like(grad)
    calls = {COPY: lambda: target.copy_(grad)}
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
            print(f"skipped {name} at {dtype}, T={T}, N={N}: {error}")
    # In turn, round by round, so that a slow moment hits all alike.
    rounds = [
        {name: milliseconds(call, device) for name, call in calls.items()}
        for _ in range(WARM_UP + repeats)
    ][WARM_UP:]
    timings = {name: quantiles(taken[name] for taken in rounds) for name in calls}
    bytes_a_ms = 2 * grad.nbytes / timings.pop(COPY).median
    floor_ms = sum(traffic(Options(dtype, T, 0.0, True, False))) * T * N / bytes_a_ms
    rows: list[dict[str, object]] = []
    for name, timing in timings.items():
        rows.append(
            {
                "neuron": name,
                "dtype": str(dtype).removeprefix("torch."),
                "T": T,
                "N": N,
                "median_ms": f"{timing.median:.5g}",
                "p20_ms": f"{timing.low:.5g}",
                "p80_ms": f"{timing.high:.5g}",
                "first_call_ms": f"{first_ms[name]:.5g}",
                "share_of_floor": f"{floor_ms / timing.median:.3f}",
                "copy_GB_s": f"{bytes_a_ms / 1e6:.1f}",
                **conditions(device),
            }
        )
        print("  ".join(f"{value}" for value in list(rows[-1].values())[:9]))
    return rows


def milliseconds(call: Callable[[], object], device: torch.device) -> float:
    """How long one call takes, on a GPU until its work is done."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    call()
    ended.record()
    torch.cuda.synchronize(device)
    return began.elapsed_time(ended)


def conditions(device: torch.device) -> dict[str, object]:
    """What a row depends on beyond what every row carries."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "plif_implementation": os.environ.get("SJ_PLIF_CUDA_IMPLEMENTATION", "auto"),
    }


# ---- the files ----


def read(path: Path) -> list[dict[str, object]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def draw(rows: list[dict[str, object]], path: Path) -> None:
    """Median time over N with its quantiles, a panel for each dtype and T."""
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    steps = sorted({int(str(row["T"])) for row in rows})
    figure, axes = plt.subplots(
        len(dtypes),
        len(steps),
        figsize=(1.5 + 2.6 * len(steps), 1.2 + 2.4 * len(dtypes)),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for (i, dtype), (j, T) in itertools.product(enumerate(dtypes), enumerate(steps)):
        panel = [row for row in rows if row["dtype"] == dtype and int(str(row["T"])) == T]
        for k, name in enumerate(dict.fromkeys(f"{row['neuron']}" for row in rows)):
            line = sorted(
                (
                    [float(str(row[key])) for key in ("N", "median_ms", "p20_ms", "p80_ms")]
                    for row in panel
                    if row["neuron"] == name
                ),
            )
            if not line:
                continue
            neurons, median, low, high = zip(*line, strict=True)
            style = "-" if name.startswith("ALIF") else "--"
            axes[i, j].plot(neurons, median, style, marker="o", ms=3, color=f"C{k}", label=name)
            axes[i, j].fill_between(neurons, low, high, color=f"C{k}", alpha=0.2, lw=0)
        axes[i, j].set_xscale("log", base=2)
        axes[i, j].set(yscale="log", title=f"{dtype}, T = {T}")
        axes[i, j].grid(alpha=0.3)
    for ax in axes[-1]:
        ax.set_xlabel("neurons")
    figure.supylabel("forward + backward, ms")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(3, len(labels)), fontsize=8
    )
    figure.suptitle(f"{rows[-1]['device']}", fontsize=9)
    save(figure, path, dpi=150)


if __name__ == "__main__":
    main()
