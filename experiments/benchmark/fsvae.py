"""FSVAE: time of a training step and of sampling, against SpikingJelly's PLIF and prefixes.

    python experiments/benchmark/fsvae.py

writes ``fsvae.csv``.

The rival is the same model with SpikingJelly's PLIF neurons, which recomputes every prefix when
the latent spikes are sampled, as the original does. Mixed models show what the neuron gains and
what the stepping does.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from common import conditions, interleave, parser, write_csv
from spikingjelly.activation_based import neuron
from torch import Tensor

from sj_taid.model import FSVAE
from sj_taid.model.latent import pick
from sj_taid.model.spiking_vae import original_neuron
from sj_taid.training.allocator import reuse_freed_memory

OURS, RIVAL = "ours", "SpikingJelly PLIF, prefixes"

plif = partial(neuron.ParametricLIFNode, **original_neuron.keywords)

#: name -> neuron, presampling
MODELS = {
    OURS: (original_neuron, "step"),
    "ALIF (torch backend), stepping": (partial(original_neuron, backend="torch"), "step"),
    "SpikingJelly PLIF, stepping": (plif, "step"),
    "ALIF, prefixes": (original_neuron, "prefix"),
    RIVAL: (plif, "prefix"),
}


def make(name: str, options: argparse.Namespace) -> FSVAE:
    torch.manual_seed(0)
    node, presampling = MODELS[name]
    model = FSVAE(options.channels, options.size, options.T, neuron=node, presampling=presampling)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model.to(options.device)


def train_step(model: FSVAE, image: Tensor) -> None:
    model.zero_grad()
    model.training_loss(image, 0.5)["loss"].backward()


@torch.no_grad()
def sample(model: FSVAE, n: int) -> Tensor:
    """Sample as the model does, or recompute every prefix, as the original does."""
    if model.posterior.presampling == "step":
        return model.sample(n)
    model.eval()
    device = next(model.parameters()).device
    index = torch.randint(model.k, (model.T, n, model.latent_channels), device=device)
    previous = torch.zeros(1, n, model.latent_channels, device=device)
    for t in range(model.T):
        z = pick(model.prior.run(previous)[-1], index[t])
        previous = torch.cat([previous, z.unsqueeze(0)])
    image = model.decode(previous[1:])
    model.train()
    return image


def works(options: argparse.Namespace) -> dict[str, Callable[[FSVAE], object]]:
    """The functions to time, by name."""
    shape = (options.batch, options.channels, options.size, options.size)
    image = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    image = image.to(options.device)
    return {
        "training step": lambda model: train_step(model, image),
        "sampling": lambda model: sample(model, options.batch),
    }


def compare(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time every model at every work."""
    models = {name: make(name, options) for name in MODELS}
    rows = []
    for work, function in works(options).items():
        timings = interleave(
            {name: partial(function, model) for name, model in models.items()},
            options.repeats,
            options.device,
        )
        for name, timing in timings.items():
            row = {"work": work, "model": name, "T": options.T, "batch": options.batch}
            row |= conditions(options.device) | timing._asdict()
            rows.append(row | {"ratio": timing.median_ms / timings[RIVAL].median_ms})
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    options_parser = parser(__doc__, repeats=10)
    for name, default in {"batch": 16, "T": 16, "channels": 3, "size": 32}.items():
        options_parser.add_argument(f"--{name}", type=int, default=default)
    options = options_parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    reuse_freed_memory()
    print(write_csv(compare(options), options.out / "fsvae.csv").iloc[:, :9].to_string())


if __name__ == "__main__":
    main()
