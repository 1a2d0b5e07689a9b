"""FSVAE: time of a training step and of sampling, against SpikingJelly's PLIF and prefixes.

    python experiments/benchmark/fsvae.py

writes ``fsvae.csv``.

The rival is the same model with SpikingJelly's PLIF neurons, which recomputes every prefix when
the latent spikes are sampled, as the original does. Mixed models show what the neuron gains and
what the stepping does. Then come memory layouts and precisions of ours.
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
    if options.channels_last:  # torch declares no such overload
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model.to(options.device)


def train_step(model: FSVAE, image: Tensor, precision: torch.dtype = torch.float32) -> None:
    model.zero_grad()
    with torch.autocast(image.device.type, precision, enabled=precision != torch.float32):
        loss = model.training_loss(image, 0.5)["loss"]
    loss.backward()


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


def images(options: argparse.Namespace) -> Tensor:
    shape = (options.batch, options.channels, options.size, options.size)
    image = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return image.to(options.device)


def works(options: argparse.Namespace) -> dict[str, Callable[[FSVAE], object]]:
    """The functions to time, by name."""
    image = images(options)
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
            ratio = timing.median_ms / timings[RIVAL].median_ms
            rows.append(describe(work, name, options) | timing._asdict() | {"ratio": ratio})
    return rows


def formats(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time our training step by memory layout and precision."""
    steps = {}
    for layout, channels_last in (("channels first", False), ("channels last", True)):
        changed = argparse.Namespace(**{**vars(options), "channels_last": channels_last})
        for precision in (torch.float32, torch.bfloat16):
            name = f"{layout}, {str(precision).removeprefix('torch.')}"
            steps[name] = partial(train_step, make(OURS, changed), images(options), precision)
    timings = interleave(steps, options.repeats, options.device)
    first, *_ = timings.values()
    return [
        describe(f"training step, {name}", OURS, options)
        | timing._asdict()
        | {"ratio": timing.median_ms / first.median_ms}
        for name, timing in timings.items()
    ]


def describe(work: str, model: str, options: argparse.Namespace) -> dict[str, Any]:
    case = {"work": work, "model": model, "T": options.T, "batch": options.batch}
    return case | conditions(options.device)


PARTS = {part.__name__: part for part in (compare, formats)}


def main(arguments: Sequence[str] | None = None) -> None:
    options_parser = parser(__doc__, repeats=10)
    for name, default in {"batch": 16, "T": 16, "channels": 3, "size": 32}.items():
        options_parser.add_argument(f"--{name}", type=int, default=default)
    channels_last = argparse.BooleanOptionalAction
    options_parser.add_argument("--channels-last", action=channels_last, default=True)
    options_parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS])
    options = options_parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    reuse_freed_memory()
    rows = [row for part in options.parts for row in PARTS[part](options)]
    print(write_csv(rows, options.out / "fsvae.csv").iloc[:, :9].to_string())


if __name__ == "__main__":
    main()
