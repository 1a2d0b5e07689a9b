"""Shared by the benchmarks: neurons, command-line options, timing, CSVs with provenance.

All neurons are leaky integrate-and-fire with tau = 2, threshold 1 and an ATan surrogate. LIF learns
nothing, PLIF tau; ALIF and FlexSN learn tau and the threshold.
"""

import argparse
import gc
import itertools
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from spikingjelly.activation_based import functional, neuron, surrogate
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from sj_taid import ALIFNode
from sj_taid._graph import record_saved
from sj_taid.doctor import cpu_name
from sj_taid.ops import backends
from sj_taid.training.files import atomic_write
from sj_taid.training.provenance import provenance
from sj_taid.training.run import Run, build_data

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
CPU = torch.device("cpu")


def parser(
    description: str | None, repeats: int = 0, device: bool = True
) -> argparse.ArgumentParser:
    """A parser with the options of every benchmark; ``--repeats`` only where it has a default."""
    new = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if device:
        default = "cuda" if torch.cuda.is_available() else "cpu"
        new.add_argument("--device", type=torch.device, default=default)
    if repeats:
        new.add_argument("--repeats", type=int, default=repeats, help="timed calls per row")
    new.add_argument("--threads", type=int, default=torch.get_num_threads())
    new.add_argument("--out", type=Path, default=Path("benchmark-results"), help="a folder")
    return new


class Timing(NamedTuple):
    """Milliseconds: the median and the 20 % and 80 % quantiles."""

    median_ms: float
    p20_ms: float
    p80_ms: float


def interleave(
    functions: Mapping[str, Callable[[], object]],
    repeats: int,
    device: torch.device = CPU,
    warm_up: int = 1,
) -> dict[str, Timing]:
    """Time functions in turn, round by round, so that a slow moment affects them all alike."""
    rounds = [
        {name: milliseconds(function, device) for name, function in functions.items()}
        for _ in range(warm_up + repeats)
    ]
    quantiles = pd.DataFrame(rounds[warm_up:]).quantile([0.5, 0.2, 0.8])
    return {name: Timing(*quantiles[name]) for name in functions}


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


def allocations(call: Callable[[], object]) -> list[int]:
    """Bytes that torch's CPU allocator gives during a call and, negative, gets back, in order."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events: Any = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return [size for _, size in changes]


def held_bytes(net: nn.Module, x_seq: Tensor) -> int:
    """Bytes that torch's allocator holds after a forward from rest, beyond what it held before."""
    held: list[Any] = []

    def forward() -> None:
        functional.reset_net(net)
        held[:] = [net(x_seq)]
        gc.collect()

    forward()  # the first one compiles
    held.clear()
    functional.reset_net(net)
    gc.collect()
    if not x_seq.is_cuda:
        return sum(allocations(forward))
    before = torch.cuda.memory_allocated(x_seq.device)
    forward()
    return torch.cuda.memory_allocated(x_seq.device) - before


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """The most that torch's allocator holds during a step, beyond what it held before."""
    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    return max(itertools.accumulate(allocations(step)))


def saved_bytes(module: nn.Module, x_seq: Tensor) -> int:
    """Bytes of the storages that one call saves for backward, without parameters."""
    # A parameter's cast under autocast has another storage but its shape.
    shapes = {tuple(sorted(p.shape)) for p in module.parameters() if p.dim() > 1}
    _, saved = record_saved(module, lambda: module(x_seq.requires_grad_()))
    counted = [tensor for tensor in saved if tuple(sorted(tensor.shape)) not in shapes]
    return sum(tensor.untyped_storage().nbytes() for tensor in counted)


def load_images(run: Run, n: int) -> Tensor:
    """The first ``n`` test images of a run's data."""
    data = build_data(run.config)
    batches = islice(data.test_dataloader(), -(-n // data.batch_size))
    return torch.cat([image for image, _ in batches])[:n]


def training_step(cfg: DictConfig, batch: int) -> Callable[[], None]:
    """A function that trains a config's generator for a step on random images."""
    torch.manual_seed(0)
    model = instantiate(cfg.model).to(memory_format=torch.channels_last)
    optimizer = instantiate(cfg.optimizer)(model.parameters())
    size = cfg.dataset.image_size
    images = torch.rand(batch, cfg.dataset.channels, size, size) * 2 - 1
    bfloat16 = cfg.trainer.precision == "bf16-mixed"

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = model.training_loss(images)["loss"]
        loss.backward()
        optimizer.step()

    return step


def describe_training(run: Run, *choices: str) -> dict[str, Any]:
    """A run's choices, command, commit and seed, without its paths."""
    words = run.metrics["command"].split()
    command = " ".join(word for word in words if not re.search(r"root=|run\.dir=", word))
    chosen = {name: run.metrics["choices"][name] for name in choices}
    trained = {"trained_by": command, "trained_at": run.metrics["commit"], "seed": run.config.seed}
    return chosen | trained


def write_csv(rows: Iterable[dict[str, Any]], path: Path) -> pd.DataFrame:
    """Write rows, each with this process's command, commit, versions and machine.

    A row that already has them, from an earlier run, keeps its own.
    """
    facts = provenance()
    facts |= {f"{name}_version": number for name, number in facts.pop("versions").items()}
    shared = {"command": command(), **facts}
    table = pd.DataFrame([row | shared | row for row in rows])
    with atomic_write(path) as temporary:
        table.to_csv(temporary, index=False, float_format="%.6g")
    print(f"wrote {path}")
    return table


def read_csv(path: Path) -> pd.DataFrame:
    """A benchmark's CSV, with commits as text: 1843e8655129 would be read as a number."""
    return pd.read_csv(path, dtype={"commit": str})


def command() -> str:
    """The command line of this process, from the root of the checkout, without where it writes."""
    outputs = argparse.ArgumentParser(add_help=False)
    outputs.add_argument("--out")
    outputs.add_argument("--picture")
    _, others = outputs.parse_known_args(sys.argv[1:])
    script = Path(sys.argv[0]).resolve()
    root = Path(__file__).resolve().parents[2]
    name = script.relative_to(root) if script.is_relative_to(root) else script.name
    return shlex.join(["python", str(name), *others])


def conditions(device: torch.device) -> dict[str, object]:
    """What a neuron's time depends on beyond the provenance of every row."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "plif_implementation": os.environ.get("SJ_PLIF_CUDA_IMPLEMENTATION", "auto"),
    }


def neurons(device: torch.device) -> dict[str, nn.Module]:
    """Modules from ``[T, N]`` to ``[T, N]``, by name, that start from rest at every call."""
    modules: dict[str, nn.Module] = {}
    options = {"step_mode": "m", "surrogate_function": surrogate.ATan()}
    for backend in backends.BACKENDS:
        node = ALIFNode(**options, backend=backend).to(device)
        try:
            node(torch.zeros(1, 1, device=device))
        except backends.BackendUnavailableError as error:
            print(f"skipped ALIF {backend}: {error}")
        else:
            modules[f"ALIF {backend}"] = Fresh(node)
    modules["SpikingJelly LIF"] = Fresh(neuron.LIFNode(**options))
    modules["SpikingJelly PLIF"] = Fresh(neuron.ParametricLIFNode(**options))
    parameters = (nn.Parameter(torch.zeros(())), nn.Parameter(torch.ones(())))
    flex_sn = neuron.FlexSN(alif_step, 1, static_inputs=parameters)
    modules["SpikingJelly FlexSN"] = Fresh(flex_sn)
    return {name: module.to(device) for name, module in modules.items()}


class Fresh(nn.Module):
    """A SpikingJelly neuron that is reset before every call."""

    def __init__(self, node: nn.Module) -> None:
        super().__init__()
        self.node = node

    def forward(self, x_seq: Tensor) -> Tensor:
        functional.reset_net(self.node)
        return self.node(x_seq)


# FlexSN takes a function that captures no module, so this one is global.
FIRE = surrogate.ATan()


def alif_step(x: Tensor, v: Tensor, w: Tensor, v_threshold: Tensor) -> tuple[Tensor, Tensor]:
    """A step of ALIF, for SpikingJelly's FlexSN to fuse."""
    h = v + (x - v) * torch.sigmoid(w)
    spike = FIRE(h - v_threshold)
    return spike, (1.0 - spike) * h
