"""A training step eager and under torch.compile, CPU.

python experiments/benchmark/compile.py --out results/
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from spikingjelly.activation_based import layer, surrogate
from torch import Tensor, nn

from experiments.benchmark.measure import interleaved, write_csv
from sj_taid import ALIFNode, fresh_state


def node(channels: int, backend: str) -> nn.Module:
    return ALIFNode(step_mode="m", backend=backend, surrogate_function=surrogate.ATan())


def net(channels: int, backend: str) -> nn.Module:
    blocks = [
        module
        for _ in range(2)
        for module in (
            layer.Conv2d(channels, channels, 3, padding=1, bias=False, step_mode="m"),
            layer.BatchNorm2d(channels, step_mode="m"),
            node(channels, backend),
        )
    ]
    return nn.Sequential(*blocks)


def step(
    module: nn.Module, forward: Callable[[Tensor], Tensor], x_seq: Tensor
) -> Callable[[], None]:
    def run() -> None:
        with fresh_state(module):
            forward(x_seq).sum().backward()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", type=int, nargs=5, default=(8, 8, 32, 16, 16))
    parser.add_argument("--backend", default="torch")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("results"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    rows = []
    for name, make in (("ALIF", node), ("2 x (conv, bn, ALIF)", net)):
        module = make(options.shape[2], options.backend)
        x_seq = torch.rand(options.shape, requires_grad=True)
        compiled = torch.compile(module, fullgraph=True)
        timings = interleaved(
            {"eager": step(module, module, x_seq), "compiled": step(module, compiled, x_seq)},
            options.repeats,
        )
        for mode, timing in timings.items():
            print(
                f"{name:22} {mode:9} {timing.median:8.2f} ms ({timing.low:.2f}..{timing.high:.2f})"
            )
            rows.append({"net": name, "mode": mode, "median_ms": timing.median})
            rows[-1] |= {"q20_ms": timing.low, "q80_ms": timing.high}
    shared = {"shape": "x".join(map(str, options.shape)), "backend": options.backend}
    write_csv([row | shared for row in rows], options.out / "compile.csv")


if __name__ == "__main__":
    main()
