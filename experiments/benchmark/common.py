"""Shared by the benchmarks: command-line options, timing, bytes, CSVs with provenance."""

import argparse
import gc
import itertools
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from spikingjelly.activation_based import functional
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves

from sj_taid.doctor import cpu_name
from sj_taid.training.files import atomic_write
from sj_taid.training.process import provenance

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
CPU = torch.device("cpu")
#: Training steps before the first that is measured. In the first ones an accelerated norm learns
#: what reads its output, and compiles.
WARM_UP = 5


def parser(
    description: str | None,
    repeats: int = 0,
    device: bool = True,
    dtypes: Sequence[str] = (),
    steps: Sequence[int] = (),
    nets: Iterable[str] = (),
) -> argparse.ArgumentParser:
    """A parser with the options that benchmarks share; each only where it has a default."""
    new = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = new.add_argument
    add("--out", type=Path, default=Path("benchmark-results"), help="a folder")
    if device:
        add("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    if repeats:
        add("--repeats", type=int, default=repeats, help="timed calls per row")
    if dtypes:
        add("--dtypes", nargs="+", choices=DTYPES, default=dtypes)
    if steps:
        add("--steps", nargs="+", type=int, default=steps, metavar="T")
    if nets:
        add("--nets", nargs="+", choices=[*nets], default=[*nets])
    return new


def autocast(device: torch.device, dtype: str) -> torch.autocast:
    """Autocast to a lower ``dtype``, and none to float32."""
    return torch.autocast(device.type, DTYPES[dtype], enabled=dtype != "float32")


def interleave(
    functions: Mapping[str, Callable[[], object]],
    repeats: int,
    device: torch.device = CPU,
    warm_up: int = WARM_UP,
) -> pd.DataFrame:
    """Milliseconds of each function: the median and the 20 % and 80 % quantiles.

    They are timed in turn, round by round, so that a slow moment affects them all alike.
    """
    rounds = [
        {name: milliseconds(function, device) for name, function in functions.items()}
        for _ in range(warm_up + repeats)
    ]
    quantiles = pd.DataFrame(rounds[warm_up:]).quantile([0.5, 0.2, 0.8]).T
    return quantiles.set_axis(["median_ms", "p20_ms", "p80_ms"], axis="columns")


def milliseconds(function: Callable[[], object], device: torch.device) -> float:
    """Duration of one call, including the GPU's work."""
    if device.type != "cuda":
        start = time.perf_counter()
        function()
        return 1e3 * (time.perf_counter() - start)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    function()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end)


def train_step(net: nn.Module, x: Tensor, dtype: str) -> dict[str, Tensor]:
    """Forward from rest, a loss of all outputs, backward; the outputs and gradients by name."""
    torch.manual_seed(1)  # for dropout
    functional.reset_net(net)
    with autocast(x.device, dtype):
        outputs = [t for t in tree_leaves(net(x)) if isinstance(t, Tensor) and t.requires_grad]
    losses = [(t.float() * torch.rand_like(t, dtype=torch.float32)).sum() for t in outputs]
    torch.stack(losses).sum().backward()
    named = {f"output {i}": t.detach() for i, t in enumerate(outputs)}
    named |= {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    functional.reset_net(net)
    net.zero_grad()
    return {name.removeprefix("_orig_mod."): tensor for name, tensor in named.items()}


def allocations(call: Callable[[], object]) -> list[int]:
    """Bytes that torch's CPU allocator gives during a call and, negative, gets back, in order."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events: Any = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return [size for _, size in changes]


def held_bytes(net: nn.Module, x_seq: Tensor, dtype: str = "float32") -> int:
    """Bytes that torch's allocator holds after a forward from rest, beyond what it held before."""
    for _ in range(WARM_UP):
        train_step(net, x_seq, dtype)
    held: list[Any] = []

    def forward() -> None:
        with autocast(x_seq.device, dtype):
            held[:] = [net(x_seq)]
        gc.collect()

    gc.collect()
    if not x_seq.is_cuda:
        return sum(allocations(forward))
    before = torch.cuda.memory_allocated(x_seq.device)
    forward()
    return torch.cuda.memory_allocated(x_seq.device) - before


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """The most that torch's allocator holds during a step, beyond what it held before."""
    for _ in range(WARM_UP):
        step()
    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    return max(itertools.accumulate(allocations(step)))


def measure_steps(
    nets: Mapping[str, nn.Module], x: Tensor, batch_axis: int, dtype: str, repeats: int
) -> pd.DataFrame:
    """Peak and time of nets' training steps, in turns, and what each sample adds to the peak.

    What a sample adds is taken from half the batch; ratios are to the first net.
    """
    batch = x.shape[batch_axis]
    if batch < 2:
        raise SystemExit(f"shape {[*x.shape]}: expected a batch of 2 or more, for its half")
    half_x = x.narrow(batch_axis, 0, batch // 2).clone()
    steps = {name: partial(train_step, net, x, dtype) for name, net in nets.items()}
    table = interleave(steps, repeats, x.device)
    table["time_ratio"] = table["median_ms"] / table["median_ms"].iloc[0]
    for name, net in nets.items():
        half_step = partial(train_step, net, half_x, dtype)
        peak, half_peak = (peak_bytes(step, x.device) / 1e6 for step in (steps[name], half_step))
        table.loc[name, "peak_mb"] = peak
        table.loc[name, "mb_per_sample"] = (peak - half_peak) / (batch - batch // 2)
    table["mb_ratio"] = table["mb_per_sample"] / table["mb_per_sample"].iloc[0]
    return table


def write_csv(
    table: pd.DataFrame, path: Path, device: torch.device = CPU, keys: Sequence[str] = ()
) -> None:
    """Write and print a table, with this process's command, commit, versions and machine.

    With ``keys`` the rows that are there already stay, but for those with the same keys.
    """
    print(table.to_string(index=False))
    facts = provenance()
    facts |= {f"{name}_version": number for name, number in facts.pop("versions").items()}
    table = table.assign(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        plif_implementation=os.environ.get("SJ_PLIF_CUDA_IMPLEMENTATION", "auto"),
        command=command(),
        **facts,
    )
    if keys and path.exists():
        table = pd.concat([read_csv(path), table]).drop_duplicates(keys, keep="last")
    with atomic_write(path) as temporary:
        table.to_csv(temporary, index=False, float_format="%.6g")
    print(f"wrote {path}")


def read_csv(path: Path) -> pd.DataFrame:
    """A benchmark's CSV, with commits as text: 1843e8655129 would be read as a number."""
    return pd.read_csv(path, dtype={"commit": str})


def command() -> str:
    """The command line of this process, without where it writes, and where what it reads lies."""
    outputs = argparse.ArgumentParser(add_help=False)
    outputs.add_argument("--out")
    _, others = outputs.parse_known_args(sys.argv[1:])
    script = Path(sys.argv[0]).resolve()
    root = Path(__file__).resolve().parents[2]
    name = script.relative_to(root) if script.is_relative_to(root) else script.name
    given = [Path(word).name if Path(word).is_absolute() else word for word in others]
    return shlex.join(["python", str(name), *given])
