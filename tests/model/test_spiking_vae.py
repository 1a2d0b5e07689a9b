"""What ESVAE and FSVAE share: shapes, state, gradients, neurons and image decoders, errors."""

from functools import partial

import numpy as np
import pytest
import torch
from spikingjelly.activation_based import functional, neuron
from torch import nn
from torch.nn import functional as F

from sj_taid import TAID, ALIFNode, FixedDecoder
from sj_taid.model import ESVAE, FSVAE
from sj_taid.model.spiking_vae import SubpixelConv2d, original_neuron
from tests.model.conftest import assert_every_parameter_learns, images

SIZES = {"image_size": 8, "T": 6, "hidden_channels": 6, "latent_channels": 10}
SMALL = {ESVAE: SIZES, FSVAE: SIZES | {"k": 4}}
KINDS = pytest.mark.parametrize("kind", SMALL)


def make(kind, **options):
    return kind(**SMALL[kind] | options)


def test_original_neuron_has_a_surrogate_of_width_and_height_1():
    x = (0.2 + torch.tensor([[-0.6, -0.4, 0.0, 0.4, 0.6]])).requires_grad_()
    original_neuron(step_mode="s")(x).sum().backward()
    assert x.grad.tolist() == [[0.0, 1.0, 1.0, 1.0, 0.0]]


@KINDS
def test_reconstruct_is_forward_in_eval_mode(kind):
    model, image = make(kind), images()
    torch.manual_seed(0)
    made = model.reconstruct(image)
    assert model.training and not made.requires_grad
    torch.manual_seed(0)
    assert torch.equal(made, model.eval()(image).image)
    torch.manual_seed(0)
    assert torch.equal(made, model.decode(model.latent_spikes(image)))


def test_fsvae_has_no_classes():
    with pytest.raises(ValueError, match=r"label must be one of \[\], .* an ESVAE's .* got 7"):
        make(FSVAE).sample(2, label=7)


@pytest.mark.parametrize("training", [True, False])
@KINDS
def test_forward_twice_never_mixes(kind, training):
    model = make(kind).train(training)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
            norm.momentum = 0.0  # the only state that training is meant to carry over

    def run(image):
        torch.manual_seed(0)
        return model(image)

    image = images()
    first = run(image)
    run(images(5))
    for a, b in zip(first, run(image), strict=True):
        assert torch.equal(a, b)


@KINDS
def test_encode_equals_repeating_the_image(kind):
    model = make(kind).double().eval()
    image = images().double()
    expected = model.encode(image)
    x_seq = image.expand(model.T, *image.shape)
    functional.reset_net(model)
    repeated = model.to_latent(model.encoder(model.stem(x_seq)).flatten(2))
    assert torch.equal(repeated, expected)


def test_subpixel_convolution():
    torch.manual_seed(0)
    conv, x = SubpixelConv2d(2, 3), torch.randn(2, 2, 4, 5)
    pixels = F.pixel_unshuffle(conv(x), 2).unflatten(1, (3, 4))
    assert pixels.std() > 0 and torch.equal(pixels, pixels[:, :, :1].expand_as(pixels))
    nn.init.normal_(conv.weight)  # [C_out * 4, C_in, 3, 3]
    plain = nn.Conv2d(2, 12, 3, padding=1)
    plain.load_state_dict({"weight": conv.weight, "bias": conv.bias.repeat_interleave(4)})
    assert torch.equal(conv(x), F.pixel_shuffle(plain(x), 2))
    assert set(conv.state_dict()) == {"weight", "bias"} and conv.bias.shape == (3,)


@pytest.mark.parametrize(
    ("kind", "options", "decoder"),
    [
        (ESVAE, {}, TAID),
        (ESVAE, {"subpixel": False, "in_channels": 3}, FixedDecoder),
        (FSVAE, {"in_channels": 3}, partial(TAID, squeeze="pixel")),
    ],
)
def test_training_loss_every_parameter_learns(kind, options, decoder):
    model = make(kind, **options, image_decoder=decoder(6))
    image = images(16, model.in_channels)
    assert model(image).image.shape == image.shape
    losses = model.training_loss(image, progress=1.0)
    assert losses["loss"] == losses["reconstruction"] + losses["latent"]
    assert_every_parameter_learns(model, losses["loss"])


@KINDS
def test_takes_any_spikingjelly_neuron(kind):
    plif = partial(neuron.ParametricLIFNode, **original_neuron.keywords)
    model = make(kind, neuron=plif)
    model.training_loss(images())["loss"].backward()
    assert model.sample(2).shape == (2, 1, 8, 8)


@KINDS
def test_sample_needs_no_mode_and_changes_nothing(kind):
    model = make(kind)
    model(images())
    frozen = model.decoder[0][0][1].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match="n must be an integer >= 0"):
        model.sample(-1)
    drawn = model.sample(np.int64(5))
    assert drawn.shape == (5, 1, 8, 8) and not drawn.requires_grad
    assert model.training and model.to_latent.training and not frozen.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_sum_losses_of_neighbouring_pixels_and_of_colour():
    model = make(ESVAE, in_channels=3, gradient_weight=0.3, chroma_weight=3.0)
    # The first pixel is grey, so without chroma; the second is chroma alone.
    output = torch.tensor([[[[0.5, 1.0]], [[0.5, -0.5]], [[0.5, -0.5]]]]).repeat(1, 1, 2, 1)
    output[:, :, 1] *= 2
    losses = model.sum_losses(output, torch.zeros(1, 3, 2, 2), torch.tensor(2.0))
    terms = {
        "reconstruction": (0.75 + 1.5) * (1 + 4) / 12,
        "latent": 2.0,
        "gradient": 0.3 * ((0.5 + 1 + 1) * (1 + 2) / 6 + (0.5 + 0.5 * 2 + 2) / 6),
        "chroma": 3.0 * 1.5 * (1 + 4) / 12,
    }
    assert {name: losses[name].item() for name in terms} == pytest.approx(terms)
    assert losses["loss"].item() == pytest.approx(sum(terms.values()))


counting = partial(ALIFNode, levels=4, v_reset=None, step_mode="m")
BAD = {
    ESVAE: [
        ({"chroma_weight": 3.0}, "of 3 channels"),
        ({"latent_channels": 0}, "latent_channels must be an integer >= 1"),
        ({"hidden_channels": [4, 6]}, r"hidden_channels must be an integer >= 1, .* is \[4, 6\]"),
        ({"image_size": 8.0}, "image_size must be an integer >= 1, but it is 8.0"),
        ({"image_size": 9}, "image_size must be even, so that it can be halved, not 9"),
        ({"subpixel": "no"}, "subpixel must be True or False"),
        ({"gradient_weight": float("nan")}, "gradient_weight must be a finite number >= 0"),
        ({"image_decoder": TAID(3)}, r"for T=6, as TAID\(6\) is, but it is TAID\(\n?.*T=3"),
        ({"image_decoder": TAID}, "for T=6, .* but it is <class"),
        ({"neuron": ALIFNode}, "step mode 'm'"),
        ({"neuron": ALIFNode(step_mode="m")}, "neuron must make a neuron each time it is called"),
        ({"neuron": counting}, "a generator draws spikes"),
        ({"mmd_weight": -1}, "mmd_weight must be a finite number >= 0"),
        ({"exact_counts": "off"}, "exact_counts must be True or False"),
        ({"sample_from": "flwo"}, "learned or flow, but it is 'flwo'"),
    ],
    FSVAE: [({"k": 0}, "k must be an integer >= 1")],
}


@pytest.mark.parametrize(
    ("kind", "options", "message"), [(kind, *row) for kind, rows in BAD.items() for row in rows]
)
def test_bad_arguments(kind, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make(kind, **options)


@KINDS
def test_bad_images(kind):
    model = make(kind)
    for shape in ((2, 1, 8), (2, 3, 8, 8)):
        with pytest.raises(ValueError, match=r"expects images \[N, 1, 8, 8\], but got \["):
            model(torch.zeros(shape))
    image = images()
    image[0, 0, 0, 0] = 255
    message = rf"{kind.__name__} got values .*but expects finite values in \[-1, 1\]; scale pixels"
    with pytest.raises(ValueError, match=message), torch.no_grad():
        model(image)
    model(image)  # a training step does not wait for the values; its loss tells
    with pytest.raises(ValueError, match=message):
        model.eval()(image)
