"""Time of small layers, where Python takes it: neurons, with and without a norm before them.

    python experiments/benchmark/small.py

writes ``small.csv``: a forward pass, and one with its backward, on [T, 2, 8, 4, 4]. Batch norm and
ALIF are one operator. ``ALIF cupy`` runs the code of the CUDA backend on tensors of the CPU, with
CuPy's launches replaced by nothing: its values mean nothing, its time is the host's.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib import import_module
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pandas as pd
import torch
from common import Fresh, interleave, parser, write_csv
from spikingjelly.activation_based import layer, neuron, surrogate
from torch import Tensor, nn

from sj_taid import ALIFNode
from sj_taid.functional import alif_multi_step
from sj_taid.ops import backends
from sj_taid.ops.alif import autograd
from sj_taid.ops.alif.norm import Norm

SHAPE = (2, 8, 4, 4)
RIVALS = {"SpikingJelly LIF": neuron.LIFNode, "SpikingJelly PLIF": neuron.ParametricLIFNode}


class NormAndNeuron(nn.Module):
    """Batch norm and ALIF as one operator, from rest."""

    def __init__(self, norm: nn.Module, node: ALIFNode) -> None:
        super().__init__()
        self.norm, self.node = norm, node

    def forward(self, x_seq: Tensor) -> Tensor:
        return alif_multi_step(
            x_seq,
            0.0,
            self.node.w,
            self.node.v_threshold,
            surrogate_function=self.node.surrogate_function,
            norm=Norm.of(self.norm, True),
            backend=self.node.backend,
        )[0]


class Kernel:
    """A compiled kernel of CuPy's that does nothing."""

    num_regs = 64

    def __call__(self, *arguments: Any) -> None:
        pass


@contextmanager
def cupy_without_launches() -> Iterator[None]:
    """Let ``backend="cupy"`` take tensors of the CPU, and launch nothing."""
    stub = SimpleNamespace(
        RawModule=lambda **_: SimpleNamespace(get_function=lambda name: Kernel()),
        cuda=SimpleNamespace(
            runtime=SimpleNamespace(getDeviceCount=lambda: 1),
            nvrtc=SimpleNamespace(getVersion=lambda: (13, 0)),
            Stream=SimpleNamespace(from_external=lambda stream: nullcontext()),
        ),
    )
    register = partial(autograd.register, "cupy_without_launches", "CPU")
    with (
        mock.patch.dict(sys.modules, {"cupy": stub}),
        mock.patch.object(autograd, "register", lambda name, key, engine: register(engine)),
        mock.patch.object(torch.cuda, "device", lambda device: nullcontext()),
    ):
        sys.modules.pop("sj_taid.ops.alif.cuda", None)  # which a GPU's CuPy may have loaded
        cuda = import_module("sj_taid.ops.alif.cuda")
        launched = backends.Backend(cuda.multi_step, lambda *_: None)
        with (
            mock.patch.object(cuda, "_processors", lambda device: (132, 2048)),
            mock.patch.dict(backends.BACKENDS, {"cupy": lambda: launched}),
        ):
            yield


def variants(norm: bool) -> dict[str, nn.Module]:
    """The layers, by name."""
    options: dict[str, Any] = {"step_mode": "m", "surrogate_function": surrogate.ATan()}
    modules: dict[str, nn.Module] = {}
    for name, kind in RIVALS.items():
        before = [layer.BatchNorm2d(SHAPE[1], step_mode="m")] if norm else []
        modules[name] = nn.Sequential(*before, Fresh(kind(**options)))
    for name in ("numba", "cupy"):
        alif = ALIFNode(**options, backend=name)
        fused = NormAndNeuron(layer.BatchNorm2d(SHAPE[1]), alif)
        modules[f"ALIF {name}"] = fused if norm else Fresh(alif)
    return modules


def passes(module: nn.Module, T: int) -> dict[str, Callable[[], object]]:
    """A forward, and one with its backward."""
    x_seq = torch.randn(T, *SHAPE, requires_grad=True)
    gradient = torch.ones(T, *SHAPE)
    return {
        "forward": lambda: module(x_seq),
        "forward and backward": lambda: module(x_seq).backward(gradient),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__, repeats=2000, device=False, steps=[4]).parse_args(arguments)
    tables = {}
    backends.why_not("numba")  # which registers its operators on import
    with cupy_without_launches():
        for norm, T in itertools.product((False, True), options.steps):
            calls = {name: passes(module, T) for name, module in variants(norm).items()}
            for work in ("forward", "forward and backward"):
                turns = {name: both[work] for name, both in calls.items()}
                tables[norm, T, work] = interleave(turns, options.repeats, warm_up=20)
    table = pd.concat(tables, names=["norm", "T", "work", "neuron"])
    write_csv(table.reset_index(), options.out / "small.csv")


if __name__ == "__main__":
    main()
