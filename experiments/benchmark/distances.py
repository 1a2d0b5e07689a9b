"""Where the distance of the shipped ESVAEs' samples comes from.

    python experiments/benchmark/distances.py --root data --published FOLDER [--features]

writes ``results/distances.csv``: FAD as published, precision and recall of samples of MNIST and
Fashion-MNIST, of training images in their place, and of the decoder fed with training images'
rates. Their flow is fitted here, in minutes. With ``--features`` also by EfficientNet-Lite0, which
takes half an hour on two cores.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import write_csv
from hydra.utils import instantiate
from torch.optim import AdamW

import sj_taid
from sj_taid.model.flow import FlowPrior
from sj_taid.training.allocator import reuse_freed_memory
from sj_taid.training.config import compose
from sj_taid.training.evaluation import PUBLISHED, Evaluator
from sj_taid.training.generation import Generation

RESULT = Path(__file__).resolve().parents[2] / "results" / "distances.csv"
#: the ending of their metrics
IMAGES = {
    "training images": "_floor",
    "training images' rates, decoded": "_perfect",
    "samples of the mixture": "",
    "samples of the flow": "_flow",
    "samples of the learned prior": "_learned",
}
FAD, FEATURES = "fad_published", "features"
METRICS = (
    *(f"{FAD}{name}" for name in ("", "_median", "_range", "_precision", "_recall")),
    *(f"{FEATURES}{name}" for name in ("", "_precision", "_recall", "_score")),
)
#: of our own FAD, which is not written
AUTOENCODER = {"hidden_channels": [4], "latent_channels": 4, "epochs": 1, "batch_size": 250}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default="data", help="holds mnist, fashion_mnist")
    parser.add_argument("--published", type=Path, required=True, help="the papers' autoencoders")
    parser.add_argument("--features", action="store_true", help="by EfficientNet-Lite0 too")
    options = parser.parse_args()
    reuse_freed_memory()
    rows = []
    for dataset in PUBLISHED:
        cfg = compose("train", [f"dataset={dataset}"]).dataset
        data = instantiate(cfg, root=options.root / dataset)
        data.setup()
        model: Any = sj_taid.create_model(f"esvae_{dataset}_taid", pretrained=True)
        model.flow = FlowPrior(model.latent_channels, model.T)
        with torch.no_grad():
            rates = [model.rate(images) for images, _ in data.train_samples()]
        model.flow.fit(torch.cat(rates))
        evaluator = Evaluator(
            5000 if options.features else 250,  # FAD as published has its own number
            AUTOENCODER | {"seed": 0},
            published_autoencoders=options.published,
            features=options.features,
        )
        metrics = Generation(model, partial(AdamW)).evaluate(data, evaluator)
        for images, ending in IMAGES.items():
            measured = {name: metrics.get(f"{name}{ending}") for name in METRICS}
            rows.append({"dataset": dataset, "images": images} | measured)
    write_csv(rows, RESULT)


if __name__ == "__main__":
    main()
