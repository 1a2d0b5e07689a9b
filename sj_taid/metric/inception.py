"""InceptionV3, the network behind FID and the Inception score, and that score."""

import hashlib
from pathlib import Path
from typing import Any

import torch
import torchmetrics
from torch import Tensor, nn
from torchmetrics.image import inception
from torchmetrics.image.fid import NoTrainInceptionV3
from torchmetrics.utilities.data import dim_zero_cat

from .._internal.checks import expand_home
from .._internal.extras import needs
from .frechet import Features, check_image_count


class Inception(Features):
    """torchmetrics' InceptionV3 on images in [-1, 1]: the 2048 features of FID.

    ``classifier`` maps them to the 1008 logits of the Inception score. Grey images are repeated to
    three channels.

    Args:
        weights: a file of torch-fidelity's weights, or ``"download"``.

    Raises:
        FileNotFoundError: no such file.
        ModuleNotFoundError: torch-fidelity, which builds the network, is not installed.
        ValueError: images of another shape.
    """

    num_features = 2048

    def __init__(self, weights: str | Path) -> None:
        super().__init__()
        with needs("torch-fidelity"):
            from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3 as url
        if weights == "download":  # to where torch-fidelity keeps them
            torch.hub.load_state_dict_from_url(url, check_hash=True, weights_only=True)
            weights = Path(torch.hub.get_dir(), "checkpoints", Path(url).name)
        path = expand_home(weights)
        if not path.is_file():
            raise FileNotFoundError(
                f"no Inception weights at {path}; get {url} and give its path, or give 'download' "
                "where there is internet"
            )
        # torch-fidelity unpickles whatever it is given: let only tensors come that far.
        torch.load(path, map_location="cpu", weights_only=True)
        with torch.random.fork_rng(devices=[]):  # layers draw weights before they are loaded
            self.network = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(path))
        last = self.network.fc
        self.classifier = nn.Linear(last.in_features, last.out_features, False, device="meta")
        self.classifier.weight = last.weight
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self.description = f"InceptionV3 (weights {digest[:8]})"
        self.freeze()

    def extract(self, images: Tensor) -> Tensor:
        return self.network(to_uint8(images))


def to_uint8(images: Tensor) -> Tensor:
    """Images ``[N, C, H, W]`` in [-1, 1] as ``[N, 3, H, W]`` in uint8.

    >>> to_uint8(torch.tensor([-1.0, 0.0, 0.5, 1.0]).view(1, 1, 2, 2))[0, 2]
    tensor([[  0, 128],
            [191, 255]], dtype=torch.uint8)
    """
    if images.dim() != 4 or images.shape[1] not in (1, 3):
        raise ValueError(
            f"expected images [N, C, H, W] with C = 1 or 3, but got {list(images.shape)}"
        )
    scaled = (images.float().clamp(-1, 1) + 1) * 127.5
    return scaled.round().to(torch.uint8).expand(-1, 3, -1, -1)


class InceptionScore(inception.InceptionScore):
    r"""Inception score: is each generated image of one class, and are there all classes?

    .. math::
        \mathrm{IS} = \exp\, \mathbb{E}_x\, \mathrm{KL}(p(y|x)\,|\,p(y))

    the mean over 10 parts of the images; from 1 to the number of classes, higher is better. It is
    torchmetrics' own, which deals the images to the parts at random.

    Args:
        features: the network, whose ``classifier`` maps features to logits.
        kwargs: arguments of torchmetrics' ``InceptionScore``.

    Raises:
        ValueError: images that are not finite or beyond [-1, 1]; at ``compute``, fewer images than
            classes.

    Source: Salimans et al. 2016, arXiv 1606.03498, section 4.
    """

    def __init__(self, features: Any, **kwargs: Any) -> None:
        super().__init__(feature=features, **kwargs)
        self.classifier = features.classifier
        self.needed = self.classifier.out_features
        self.protocol = (
            f"Inception score by {self.needed} classes of {features.description}, mean of "
            f"{self.splits} splits, torchmetrics {torchmetrics.__version__}"
        )

    def update(self, imgs: Tensor, real: bool = False) -> None:
        """Add images ``[N, C, H, W]`` in [-1, 1]; real ones do not count."""
        if real:
            return
        with torch.autocast(imgs.device.type, enabled=False):
            self.features.append(self.classifier(self.inception(imgs)))

    def compute(self) -> Tensor:  # type: ignore[override]  # without the standard deviation
        """The score of all images so far."""
        count = len(dim_zero_cat(self.features)) if len(self.features) else 0
        check_image_count("the Inception score", self.needed, generated=count)
        return super().compute()[0]
