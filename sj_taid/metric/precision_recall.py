"""Precision and recall of generated images: fidelity and variety, each by itself."""

from typing import Any

import torch
import torchmetrics
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from .._internal.checks import check_sizes
from .._internal.extras import needs
from .frechet import Features, check_image_count

with needs("torch-fidelity"):
    from torch_fidelity.metric_prc import prc_features_to_metric

NEIGHBOURS = 5
ROWS_AT_ONCE = 1000  # of a matrix of distances


class Precision(torchmetrics.Metric):
    r"""How many of the generated images are like real ones.

    .. math::
        \mathrm{precision} = \frac{1}{n} \big|\{g : |f(g) - f(r)| \le d_k(r)
        \text{ for some real } r\}\big|

    with features :math:`f`, :math:`n` generated images :math:`g`, and the distance :math:`d_k(r)`
    of r to the k-th nearest of the other real images. From 0 to 1, higher is better.

    It varies with the number of images, so there are as many of each kind: of the larger set, some
    are drawn at random, always the same.

    Args:
        features: the network that turns images into features, each image by itself.
        k: the neighbour whose distance counts.
        kwargs: arguments of ``torchmetrics.Metric``.

    Raises:
        ValueError: images that are not finite or beyond [-1, 1]; at ``compute``, no more than k
            images of a kind.

    torch-fidelity computes it, in float64. Source: Kynkäänniemi et al. 2019, arXiv 1904.06991.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    feature_network = "features"
    real_features: list[Tensor]
    fake_features: list[Tensor]

    def __init__(self, features: Features, k: int = NEIGHBOURS, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_sizes(k=k)
        self.features = features
        self.k = k
        self.needed = k + 1
        self.protocol = (
            f"{type(self).__name__.lower()} by {k} nearest neighbours in {features.num_features} "
            f"features of {features.description}"
        )
        self.add_state("real_features", [], dist_reduce_fx="cat")
        self.add_state("fake_features", [], dist_reduce_fx="cat")

    def update(self, imgs: Tensor, real: bool) -> None:
        """Add images ``[N, C, H, W]`` in [-1, 1]."""
        (self.real_features if real else self.fake_features).append(self.features(imgs))

    def compute(self) -> Tensor:
        """The precision, or the recall, of all images so far."""
        # In float64 it is exact where groups lie far apart, by a product of matrices too.
        real, generated = (
            dim_zero_cat(parts).double() if len(parts) else torch.zeros(0)
            for parts in (self.real_features, self.fake_features)
        )
        what = f"precision or recall by {self.k} nearest neighbours"
        check_image_count(what, self.needed, real=len(real), generated=len(generated))
        n, generator = min(len(real), len(generated)), torch.Generator().manual_seed(0)
        real, generated = (
            features[torch.randperm(len(features), generator=generator)[:n]]
            for features in (real, generated)
        )
        found = prc_features_to_metric(
            generated,
            real,
            prc_neighborhood=self.k,
            prc_batch_size=ROWS_AT_ONCE,
            save_cpu_ram=True,
            verbose=False,
        )
        return torch.tensor(found[type(self).__name__.lower()])


class Recall(Precision):
    r"""How many of the real images are like generated ones: variety.

    It is :class:`Precision` with real and generated images swapped.
    """
