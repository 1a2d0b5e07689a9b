"""Bytes a neuron keeps between forward and backward, a neuron and step, by T and dtype.

    python experiments/benchmark/memory.py --out runs/memory

writes ``memory.csv``. Counted from the tensors that autograd saves, each storage once, without
parameters. Where CuPy does not work, the row of the fused CUDA kernels is counted from what they
are written to keep: the input, and a checkpoint every 8 steps beyond 16.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

from experiments.benchmark.contestants import contestants
from experiments.benchmark.measure import write_csv
from experiments.benchmark.neuron import DTYPES, conditions
from sj_taid.ops.alif.kernels import checkpoints


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--steps", nargs="+", type=int, default=[1, 4, 16, 32], metavar="T")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark"))
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    modules = contestants(device)
    rows = [
        {"neuron": name, "dtype": dtype, "T": T, "bytes_a_neuron_and_step": f"{kept:.3f}"}
        | conditions(device)
        for dtype, T in itertools.product(options.dtypes, options.steps)
        for name, kept in measure(modules, device, DTYPES[dtype], T)
    ]
    write_csv(rows, options.out / "memory.csv")
    for row in rows:
        print("  ".join(str(value) for value in list(row.values())[:4]))


def measure(
    modules: dict[str, nn.Module], device: torch.device, dtype: torch.dtype, T: int
) -> Iterator[tuple[str, float]]:
    """Name and bytes a neuron and step."""
    N = 4096
    for name, module in modules.items():
        try:
            yield name, kept(module, torch.randn(T, N, device=device).to(dtype)) / (T * N)
        except (RuntimeError, TypeError, ValueError) as error:
            print(f"skipped {name} at {dtype}, T={T}: {error}")
    if "ALIF cupy" not in modules:
        yield "ALIF cupy (counted)", dtype.itemsize + 4 * checkpoints(T) / T


def kept(module: nn.Module, x_seq: torch.Tensor) -> int:
    """Bytes of the storages that one call saves for backward, parameters apart."""
    parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = module(x_seq.requires_grad_())
    # Alive until here, so that no storage was freed and counted twice.
    del output
    return sum(storages.values())


if __name__ == "__main__":
    main()
