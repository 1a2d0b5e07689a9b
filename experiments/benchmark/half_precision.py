"""Distance of half precision from float32, with norm and neuron in one operator and in two.

    python experiments/benchmark/half_precision.py

writes ``half_precision.csv``: for nets of 1, 2 and 4 blocks of convolution, norm and neuron, the
share of spikes that differ from float32's, and the distance of the gradient of all parameters
relative to its length, both means over seeds, and the share of seeds in which one operator is
closer. ``half`` is a net in half precision against a float32 copy of its rounded weights and input,
``autocast`` a float32 net.
"""

import copy
import itertools
from collections.abc import Sequence

import pandas as pd
import torch
from common import DTYPES, conditions, parser, write_csv
from spikingjelly.activation_based import functional, layer, surrogate
from torch import Tensor, nn

from sj_taid import ALIFNode, fuse_norm


def make_net(blocks: int, width: int = 16) -> nn.Module:
    modules: list[nn.Module] = []
    for channels in [3, *[width] * (blocks - 1)]:
        norm = layer.BatchNorm2d(width)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -0.3, 0.5)
        neuron = ALIFNode(v_threshold=0.5, surrogate_function=surrogate.ATan())
        modules += [layer.Conv2d(channels, width, 3, padding=1, bias=False), norm, neuron]
    net = nn.Sequential(*modules)
    functional.set_step_mode(net, "m")
    return net


def spikes_and_gradient(net: nn.Module, x_seq: Tensor, lower: torch.dtype | None) -> list[Tensor]:
    """Of a training pass from rest, under autocast if ``lower`` is given."""
    with torch.autocast(x_seq.device.type, lower or torch.bfloat16, enabled=lower is not None):
        spikes = net(x_seq)
    weights = torch.randn(spikes.shape, generator=torch.Generator().manual_seed(0))
    spikes.backward(weights.to(spikes))
    return [
        spikes.detach().float(),
        torch.cat([p.grad.flatten().float() for p in net.parameters() if p.grad is not None]),
    ]


def distances(
    net: nn.Module, x_seq: Tensor, lower: torch.dtype, autocast: bool
) -> dict[str, float]:
    """The distances of two operators and of one from float32."""
    if not autocast:
        net, x_seq = net.to(lower), x_seq.to(lower)
    fused = copy.deepcopy(net)
    fuse_norm(fused)
    exact = spikes_and_gradient(copy.deepcopy(net).float(), x_seq.float(), None)
    found = {}
    for name, other in (("two", net), ("one", fused)):
        spikes, gradient = spikes_and_gradient(other, x_seq, lower if autocast else None)
        found[f"spikes_{name}"] = float((spikes != exact[0]).float().mean())
        found[f"gradient_{name}"] = float((gradient - exact[1]).norm() / exact[1].norm())
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    options_parser = parser(__doc__)
    options_parser.add_argument("--seeds", type=int, default=50)
    options_parser.add_argument("--blocks", nargs="+", type=int, default=[1, 2, 4])
    options = options_parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    rows = []
    grid = itertools.product(("bfloat16", "float16"), (True, False), options.blocks)
    for dtype, autocast, blocks in grid:
        for seed in range(options.seeds):
            torch.manual_seed(seed)
            net, x_seq = make_net(blocks).to(options.device), torch.rand(4, 4, 3, 16, 16)
            row = distances(net, x_seq.to(options.device), DTYPES[dtype], autocast)
            shared = {"dtype": dtype, "mode": "autocast" if autocast else "half", "blocks": blocks}
            rows.append({**shared, **row, "closer": row["spikes_one"] < row["spikes_two"]})
    means = pd.DataFrame(rows).groupby(["dtype", "mode", "blocks"], as_index=False).mean()
    means = means.assign(seeds=options.seeds, **conditions(options.device))
    print(write_csv(means.to_dict("records"), options.out / "half_precision.csv").to_string())


if __name__ == "__main__":
    main()
