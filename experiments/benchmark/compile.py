"""Eager against torch.compile, forward and backward, in the reference backend.

python experiments/benchmark/compile.py --shape 8 16 64 16 16
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import time
from collections.abc import Callable

import torch
from spikingjelly.activation_based import layer, surrogate
from torch import Tensor, nn

from sj_taid import ALIFNode, fresh_state


def neuron(channels: int) -> nn.Module:
    return ALIFNode(step_mode="m", backend="torch", surrogate_function=surrogate.ATan())


def net(channels: int) -> nn.Module:
    return nn.Sequential(
        layer.Conv2d(channels, channels, 3, padding=1, bias=False, step_mode="m"),
        layer.BatchNorm2d(channels, step_mode="m"),
        neuron(channels),
        layer.Conv2d(channels, channels, 3, padding=1, bias=False, step_mode="m"),
        layer.BatchNorm2d(channels, step_mode="m"),
        neuron(channels),
    )


def milliseconds(module: nn.Module, forward: Callable[..., Tensor], x_seq: Tensor) -> float:
    start = time.perf_counter()
    with fresh_state(module):
        forward(x_seq).sum().backward()
    if x_seq.is_cuda:
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", type=int, nargs=5, default=(8, 16, 64, 16, 16))
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}, "
        f"{arguments.device}, commit {commit}, shape {tuple(arguments.shape)}"
    )
    for name, make in (("ALIFNode", neuron), ("conv-bn-ALIF x 2", net)):
        torch.manual_seed(0)
        module = make(arguments.shape[2]).to(arguments.device)
        x_seq = torch.rand(arguments.shape, device=arguments.device, requires_grad=True)
        forwards = {"eager": module, "compiled": torch.compile(module, fullgraph=True)}
        times: dict[str, list[float]] = {mode: [] for mode in forwards}
        # In turns, so that a machine that slows down slows both; the first three warm up.
        for repeat in range(arguments.repeats + 3):
            for mode, forward in forwards.items():
                time_taken = milliseconds(module, forward, x_seq)
                if repeat >= 3:
                    times[mode].append(time_taken)
        quartiles = {mode: statistics.quantiles(taken, n=4) for mode, taken in times.items()}
        for mode, (low, median, high) in quartiles.items():
            print(f"{name:18} {mode:9} {median:8.2f} ms  (quartiles {low:.2f}..{high:.2f})")
        ratio = quartiles["eager"][1] / quartiles["compiled"][1]
        print(f"{name:18} eager / compiled = {ratio:.2f}")


if __name__ == "__main__":
    main()
