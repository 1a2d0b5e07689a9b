"""Bytes that a neuron saves for backward, per neuron and step, by T and dtype.

    python experiments/benchmark/memory.py

writes ``memory.csv``. Counted from the tensors that autograd saves, each storage once, without
parameters. Where CuPy does not work, the row of the fused CUDA kernels is computed from what they
are written to save: the input, and a checkpoint every 8 steps beyond 16.
"""

import itertools
from collections.abc import Sequence

import torch
from common import DTYPES, conditions, neurons, parser, write_csv
from torch import nn

from sj_taid.ops.alif.kernels import checkpoints

N = 4096
COLUMN = "bytes_per_neuron_and_step"


def main(arguments: Sequence[str] | None = None) -> None:
    options_parser = parser(__doc__)
    options_parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    options_parser.add_argument("--steps", nargs="+", type=int, default=[1, 4, 16, 32], metavar="T")
    options = options_parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    modules = neurons(options.device)
    rows = []
    for dtype, T in itertools.product(options.dtypes, options.steps):
        shared = {"dtype": dtype, "T": T, **conditions(options.device)}
        for name, module in modules.items():
            x_seq = torch.randn(T, N, device=options.device).to(DTYPES[dtype])
            try:
                saved = saved_bytes(module, x_seq) / (T * N)
                rows.append({"neuron": name, COLUMN: saved, **shared})
            except (RuntimeError, TypeError, ValueError) as error:
                print(f"skipped {name} at {dtype}, T={T}: {error}")
        if "ALIF cupy" not in modules:
            computed = DTYPES[dtype].itemsize + 4 * checkpoints(T, DTYPES[dtype]) / T
            rows.append({"neuron": "ALIF cupy (computed)", COLUMN: computed, **shared})
    table = write_csv(rows, options.out / "memory.csv")
    print(table[["neuron", "dtype", "T", COLUMN]].to_string(index=False))


def saved_bytes(module: nn.Module, x_seq: torch.Tensor) -> int:
    """Bytes of the storages that one call saves for backward, without parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}
    # A parameter's cast under autocast has another storage but its shape.
    shapes = {tuple(sorted(p.shape)) for p in module.parameters() if p.dim() > 1}
    storages: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters and tuple(sorted(tensor.shape)) not in shapes:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = module(x_seq.requires_grad_())
    # Alive until here, so that no storage was freed and counted twice.
    del output
    return sum(storages.values())


if __name__ == "__main__":
    main()
