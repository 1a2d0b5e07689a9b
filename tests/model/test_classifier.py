"""The classifier: shapes, state, gradients, the neurons and inputs it takes, errors."""

import gc
from functools import partial

import numpy as np
import pytest
import torch
from spikingjelly.activation_based import functional, neuron
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from sj_taid import ALIFNode
from sj_taid.model import Classifier
from sj_taid.model.classifier import paper_neuron
from tests.model.conftest import assert_every_parameter_learns, images

SMALL = {"image_size": 8, "T": 4, "stages": [[6, 6], [8]], "hidden": 20, "neurons_per_class": 3}

plif = partial(neuron.ParametricLIFNode, **paper_neuron.keywords)


def frames(T=3, n=6):
    return torch.rand(T, n, 1, 8, 8).round()


@pytest.mark.parametrize(
    ("make", "make_input"), [(paper_neuron, partial(images, 6)), (plif, frames)]
)
def test_every_parameter_learns(make, make_input):
    model = Classifier(**SMALL, neuron=make)
    rates = model(make_input())
    assert rates.shape == (6, 10) and rates.min() >= 0 and rates.max() <= 1
    assert_every_parameter_learns(model, nn.functional.mse_loss(rates, torch.eye(10)[:6]))


def test_per_channel_without_norm():
    net = Classifier(**SMALL, norm=False, per_channel=True)
    sizes = [n.v_threshold.numel() for n in net.modules() if isinstance(n, ALIFNode)]
    assert sizes == [6, 6, 8, 20, 30] and net(images(6)).shape == (6, 10)
    convolutions = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert all(m.bias is not None for m in convolutions)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in net.modules())


def test_stages_of_the_papers_nets():
    mnist = Classifier()
    assert [m.out_channels for m in mnist.modules() if isinstance(m, nn.Conv2d)] == [128, 128]
    linear = [m.weight.shape for m in mnist.modules() if isinstance(m, nn.Linear)]
    assert linear == [(2048, 128 * 7 * 7), (100, 2048)]
    with torch.device("meta"):
        cifar10 = Classifier(3, 32, stages=[[256] * 3, [256] * 3], dropout=(0.5, 0.0), T=1)
    kinds = [type(m) for m in cifar10.modules() if isinstance(m, nn.Conv2d | nn.MaxPool2d)]
    assert kinds == ([nn.Conv2d] * 3 + [nn.MaxPool2d]) * 2
    events = Classifier(2, 34, stages=[[3], [3], [3]], hidden=5, classes=np.int64(11))
    assert events(torch.zeros(2, 2, 2, 34, 34)).shape == (2, 11)  # pooled at an odd side


def test_forward_computes_the_static_convolution_once():
    model = Classifier(**SMALL | {"dropout": (0.0, 0.0)}).double()
    image = images(6).double()
    repeated = model(image.expand(SMALL["T"], *image.shape))
    seen = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
            module.register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    assert torch.equal(model(image), repeated)
    # Convolution and norm: the stem on 6 images, the others on 6 at each of 4 steps.
    assert seen == [6, 6, 24, 24, 24, 24]


def test_dropout_mask_is_shared_by_the_steps_of_a_pass():
    model = Classifier(**SMALL)
    dropped = []
    model.head[0].register_forward_hook(lambda module, args, out: dropped.append(out == 0))
    model.features.register_forward_hook(lambda module, args, out: torch.ones_like(out))
    for _ in range(2):
        model(images(6))
    assert 0.4 < dropped[0].double().mean() < 0.6
    assert all(torch.equal(mask, mask[:1].expand_as(mask)) for mask in dropped)
    assert not torch.equal(*dropped)


def test_compiled_graph_whatever_other_nets_live():
    torch.compiler.reset()
    other, model = Classifier(**SMALL), Classifier(**SMALL).eval()
    functional.reset_net(other)  # SpikingJelly 2.x remembers it as long as it lives
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    first = compiled(image := images(6))
    del other
    gc.collect()
    assert torch.equal(compiled(image), first) and torch.equal(model(image), first)
    assert counter.frame_count == 1


@pytest.mark.parametrize("output_neuron", [True, False])
def test_forward_each_step(output_neuron):
    model = Classifier(**SMALL | {"dropout": (0.0, 0.0)}, output_neuron=output_neuron)
    x = images(6)
    outputs = model(x, each_step=True)
    assert outputs.shape == (4, 6, 10)
    torch.testing.assert_close(outputs.mean(0), model(x))
    neurons = [m for m in model.head if isinstance(m, ALIFNode)]
    assert len(neurons) == 1 + output_neuron
    assert (outputs.min() < 0) != output_neuron  # currents have signs
    assert model.state_dict().keys() <= Classifier(**SMALL).state_dict().keys()


def test_forward_is_the_mean_over_time_and_a_class():
    model = Classifier(**SMALL)
    spikes = torch.zeros(4, 1, 30)
    spikes[0, 0, 3:6] = 1  # all three neurons of class 1, once in four steps
    spikes[:, 0, 6] = 1  # one neuron of class 2, always
    model.head.register_forward_hook(lambda *_: spikes)
    assert model(images(1)).tolist() == [[0, 0.25, pytest.approx(1 / 3), 0, 0, 0, 0, 0, 0, 0]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"T": 0}, "T must"),
        ({"dropout": (0.5, 1.0)}, r"dropout must be two probabilities in \[0, 1\)"),
        ({"dropout": (0.5,)}, "dropout must be two"),
        ({"image_size": 3}, "image_size=3 is too small for 2 stages"),
        ({"norm": "off"}, "norm must be True or False"),
        ({"classes": 1}, "classes must be an integer >= 2"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        Classifier(**SMALL | change)


def test_forward_of_bad_input():
    model = Classifier(**SMALL).eval()
    expected = r"images \[N, 1, 8, 8\] or frames \[T, N, 1, 8, 8\], but got"
    for shape in ((1, 8, 8), (2, 3, 8, 8), (4, 2, 1, 8, 9)):
        with pytest.raises(ValueError, match=expected):
            model(torch.zeros(shape))
    x = 7 * frames()  # counts of events have no bound
    assert model(x).isfinite().all()
    x[0, 0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"Classifier got values .*, but expects finite values$"):
        model(x)
