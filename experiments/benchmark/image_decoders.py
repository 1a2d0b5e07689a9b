"""Image decoders outside the VAEs: the error of a small spiking autoencoder of digits.

    python experiments/benchmark/image_decoders.py

writes to ``results/image_decoders.csv`` a row per decoder and seed: ``error``, the mean squared
error of the test images, in [-1, 1]. Seven minutes on one core.
"""

from collections.abc import Callable, Sequence

import pandas as pd
import torch
from common import RESULTS, parser, write_csv
from sklearn.datasets import load_digits
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import Tensor, nn
from torch.nn import functional as F

from sj_taid import TAID, FixedDecoder, accelerate, fresh_state
from sj_taid._context import seeded

T = 8
#: By the names of docs/taid.md, in its order.
DECODERS: dict[str, Callable[[], nn.Module]] = {
    "mean over time": lambda: FixedDecoder(T, decay=1.0, scale=1.0 / T),
    "fixed": lambda: FixedDecoder(T),
    "taid": lambda: TAID(T),
    "taid_temporal": lambda: TAID(T, squeeze="all"),
    "taid_pixel": lambda: TAID(T, kernel_size=3, squeeze="pixel"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    options_parser = parser(__doc__, device=False, out=RESULTS)
    options_parser.add_argument("--seeds", type=int, default=3)
    options_parser.add_argument("--epochs", type=int, default=30)
    options = options_parser.parse_args(arguments)
    images = torch.tensor(load_digits().images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    test = torch.arange(len(images)) % 5 == 0
    rows = [
        {"decoder": name, "seed": seed, "epochs": options.epochs}
        | {"error": train(make_net(seed, make), images[~test], images[test], options.epochs)}
        for name, make in DECODERS.items()
        for seed in range(options.seeds)
    ]
    write_csv(pd.DataFrame(rows), options.out / "image_decoders.csv")


def make_net(seed: int, decoder: Callable[[], nn.Module]) -> nn.Sequential:
    """Images of 8x8 to 32 spikes per step and back, the same weights at the start for a seed."""

    def lif() -> nn.Module:
        return neuron.LIFNode(tau=2.0, surrogate_function=surrogate.ATan(), detach_reset=True)

    with seeded(seed):
        net = nn.Sequential(
            *(layer.Conv2d(1, 16, 3, stride=2, padding=1), layer.BatchNorm2d(16), lif()),
            *(layer.Flatten(), layer.Linear(16 * 4 * 4, 32), layer.BatchNorm1d(32), lif()),
            *(layer.Linear(32, 16 * 4 * 4), layer.BatchNorm1d(16 * 4 * 4), lif()),
            layer.SeqToANNContainer(nn.Unflatten(1, (16, 4, 4))),
            *(layer.ConvTranspose2d(16, 16, 2, stride=2), layer.BatchNorm2d(16), lif()),
            layer.Conv2d(16, 1, 3, padding=1),
        )
        image_decoder = decoder()
    functional.set_step_mode(net, "m")
    accelerate(net)
    return net.append(image_decoder)


def train(net: nn.Module, images: Tensor, test_images: Tensor, epochs: int) -> float:
    """Train to reconstruct ``images``; returns the error of ``test_images``."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
    order = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for batch in torch.randperm(len(images), generator=order).split(64):
            optimizer.zero_grad()
            error(net, images[batch]).backward()
            optimizer.step()
    with torch.no_grad():
        return error(net.eval(), test_images).item()


def error(net: nn.Module, images: Tensor) -> Tensor:
    with fresh_state(net):
        return F.mse_loss(net(images.expand(T, *images.shape)).tanh(), images)


if __name__ == "__main__":
    main()
