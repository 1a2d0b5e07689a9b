"""Time of a training step, eager and under torch.compile.

    python experiments/benchmark/compile.py --backend numba

writes ``compile-<backend>.csv``.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from common import interleave, parser, write_csv
from spikingjelly.activation_based import layer, surrogate
from torch import Tensor, nn

from sj_taid import ALIFNode, fresh_state


def alif(channels: int, backend: str) -> nn.Module:
    return ALIFNode(step_mode="m", backend=backend, surrogate_function=surrogate.ATan())


def net(channels: int, backend: str) -> nn.Module:
    layers: list[nn.Module] = []
    for _ in range(2):
        convolution = layer.Conv2d(channels, channels, 3, padding=1, bias=False, step_mode="m")
        norm = layer.BatchNorm2d(channels, step_mode="m")
        layers += [convolution, norm, alif(channels, backend)]
    return nn.Sequential(*layers)


def main(arguments: Sequence[str] | None = None) -> None:
    options_parser = parser(__doc__, repeats=30)
    options_parser.add_argument("--shape", type=int, nargs=5, default=(8, 8, 32, 16, 16))
    options_parser.add_argument("--backend", default="torch")
    options = options_parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    shared = {"shape": "x".join(map(str, options.shape)), "backend": options.backend}
    x_seq = torch.rand(options.shape, device=options.device, requires_grad=True)
    rows = []
    for name, make in (("ALIF", alif), ("2 x (conv, bn, ALIF)", net)):
        module = make(options.shape[2], options.backend).to(options.device)

        def step(forward: Callable[[Tensor], Tensor], module: nn.Module = module) -> None:
            with fresh_state(module):
                forward(x_seq).sum().backward()

        compiled = torch.compile(module, fullgraph=True)
        steps = {"eager": partial(step, module), "compiled": partial(step, compiled)}
        for mode, timing in interleave(steps, options.repeats, options.device).items():
            rows.append({"net": name, "mode": mode, **timing._asdict(), **shared})
    table = write_csv(rows, options.out / f"compile-{options.backend}.csv")
    print(table.iloc[:, :3].to_string())


if __name__ == "__main__":
    main()
