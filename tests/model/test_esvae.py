"""ESVAE: shapes, state, gradients, both priors, errors."""

from functools import partial

import numpy as np
import pytest
import torch

from sj_taid import TAID, FixedDecoder
from sj_taid.model import ESVAE, Classifier
from sj_taid.model.rate import rbf_mmd
from tests.model.conftest import (
    assert_every_parameter_learns,
    images,
    lif,
    plif,
    without_running_statistics,
)

SMALL = {"image_size": 8, "T": 6, "hidden_channels": (6, 12), "latent_channels": 10}


def test_the_originals_sizes():
    model = ESVAE(latent_channels=32, T=2).eval()
    with torch.no_grad():
        output = model(images(1, size=32))
    assert output.image.shape == (1, 1, 32, 32) and output.image.abs().max() <= 1
    assert output.q.shape == output.p.shape == (1, 32)
    assert model.learned.linear.weight.shape == (32, 32)


def test_the_latent_rate_is_the_mean_of_the_encoders_spikes():
    model = ESVAE(**SMALL).eval()
    image = images()
    rate = model(image).q
    assert torch.equal(rate, model.encode(image).mean(0))


@pytest.mark.parametrize("make_decoder", [TAID, partial(TAID, squeeze="all"), FixedDecoder])
def test_every_parameter_learns(make_decoder):
    torch.manual_seed(0)
    model = ESVAE(**SMALL, decoder=make_decoder(SMALL["T"]))
    losses = model.training_loss(images(16))
    assert_every_parameter_learns(model, losses)


@pytest.mark.parametrize("options", [{"subpixel": True}, {"decoder": TAID(6, 3, squeeze="none")}])
def test_other_decoders_learn_too(options):
    torch.manual_seed(0)
    model = ESVAE(**SMALL, **options, in_channels=3)
    image = images(4, channels=3)
    output = model(image)
    assert output.image.shape == image.shape
    model.training_loss(image)["loss"].backward()
    for name, parameter in model.named_parameters():
        if not name.endswith(("stem.0.bias", ".0.0.bias")):
            assert parameter.grad.abs().sum() > 0, name


def test_sharpness_is_the_error_of_neighbouring_pixels_differences():
    model = ESVAE(**SMALL, gradient_weight=0.3)
    image = torch.zeros(1, 1, 2, 3)
    output = torch.tensor([[[[0.0, 1, 1], [0, 1, 0]]]])
    # Along the width 1, 0, 1, -1; along the height 0, 0, -1.
    losses = model.summed(output, image, torch.tensor(2.0))
    assert losses["gradient"].item() == pytest.approx(0.3 * (3 / 4 + 1 / 3))
    assert losses["reconstruction"].item() == pytest.approx(3 / 6)
    assert losses["loss"].item() == pytest.approx(0.3 * (3 / 4 + 1 / 3) + 3 / 6 + 2)


def test_the_loss_is_the_squared_error_and_the_weighted_mmd():
    model = ESVAE(**SMALL, mmd_weight=0.5).eval()
    image = images(4)
    torch.manual_seed(0)
    output = model(image)
    torch.manual_seed(0)
    losses = model.training_loss(image)
    assert losses["reconstruction"] == (output.image - image).square().mean()
    assert losses["latent"] == 0.5 * rbf_mmd(output.q, output.p)


@pytest.mark.parametrize("make", [lif, plif])
def test_takes_any_spikingjelly_neuron(make):
    model = ESVAE(**SMALL, neuron=make)
    model.training_loss(images())["loss"].backward()
    assert model.sample(2).shape == (2, 1, 8, 8)


@pytest.mark.parametrize("training", [True, False])
def test_two_calls_in_a_row_never_mix(training):
    model = without_running_statistics(ESVAE(**SMALL).train(training))
    image = images()

    def run():
        torch.manual_seed(0)
        return model(image)

    first = run()
    model(images(5))
    for a, b in zip(first, run(), strict=True):
        assert torch.equal(a, b)


def test_samples_come_from_the_prior_that_is_asked_for():
    model = ESVAE(**SMALL, prior="gaussian_mixture", components=2)
    with pytest.raises(RuntimeError, match="not fitted"):
        model.sample(2)
    with model.drawing_from("learned"):
        assert model.sample(2).shape == (2, 1, 8, 8)
    assert model.prior == "gaussian_mixture"
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.fit_prior(images(8) for _ in range(2))
    assert model.training and model.gaussian_mixture.fitted
    for name, value in model.state_dict().items():
        if not name.startswith("gaussian_mixture"):
            assert torch.equal(value, before[name]), name
    assert model.sample(5).shape == (5, 1, 8, 8)

    other = ESVAE(**SMALL, prior="gaussian_mixture", components=2)
    other.load_state_dict(model.state_dict())
    torch.manual_seed(0)
    drawn = model.sample(5)
    torch.manual_seed(0)
    assert torch.equal(other.sample(5), drawn)


def test_the_mixture_is_fitted_to_the_rates_in_eval_mode():
    model = ESVAE(**SMALL, components=1)
    batches = [images(8), images(4)]
    model.fit_prior(batches)
    rates = torch.cat([model.eval().rate(image) for image in batches])
    assert torch.allclose(model.gaussian_mixture.means[0], rates.mean(0), atol=1e-6)


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ([], ValueError, "no batch of images to fit the prior to"),
        ([(images(8), 0)], TypeError, r"images alone, but got a tuple; .*for image, label in"),
    ],
)
def test_batches_that_a_mixture_is_not_fitted_to(batches, error, message):
    model = ESVAE(**SMALL)
    with pytest.raises(error, match=message):
        model.fit_prior(batches)
    assert not model.gaussian_mixture.fitted


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latent_channels": 0}, "latent_channels must be an integer >= 1, but it is 0"),
        ({"in_channels": 1.0}, "in_channels must be an integer >= 1, but it is 1.0"),
        ({"hidden_channels": (0, 4)}, r"hidden_channels\[0\] must be an integer >= 1, but it is 0"),
        ({"hidden_channels": 0}, "hidden_channels must be an integer >= 1, but it is 0"),
        ({"hidden_channels": 4.5}, "hidden_channels must be an integer >= 1, but it is 4.5"),
        ({"hidden_channels": (4, 4.5)}, "hidden_channels must be numbers of channels"),
        ({"T": True}, "T must be an integer >= 1, but it is True"),
        ({"mmd_weight": -1}, "mmd_weight must be a number >= 0, but it is -1"),
        ({"gradient_weight": float("nan")}, "gradient_weight must be a number >= 0, but it is nan"),
        ({"prior": "normal"}, "prior must be one of learned, gaussian_mixture"),
        ({"components": 0}, "components must be an integer >= 1"),
        ({"covariance": "round"}, "covariance must be one of full"),
        ({"decoder": TAID(3)}, "made for T=3, the model for T=6"),
        ({"image_size": 9}, "image_size=9 cannot be halved"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        ESVAE(**{**SMALL, **options})


def test_takes_numpys_whole_numbers():
    model = ESVAE(**{**SMALL, "hidden_channels": np.int64(4), "T": np.int64(6)})
    assert model.sample(2).shape == (2, 1, 8, 8)
    assert Classifier(classes=np.int64(3), stages=[[np.int64(4)]], hidden=8).classes == 3


def test_images_of_another_shape():
    with pytest.raises(ValueError, match=r"ESVAE expects images \[N, 1, 8, 8\], but got"):
        ESVAE(**SMALL)(images(size=16))


@pytest.mark.parametrize("wrong", [255.0, -1.1, torch.nan, torch.inf])
def test_images_with_values_that_are_none_of_an_image(wrong):
    model = ESVAE(**SMALL, components=1)
    image = images()
    image[0, 0, 0, 0] = wrong
    message = r"ESVAE got values .*but expects finite values in \[-1, 1\]; scale pixels"
    with pytest.raises(ValueError, match=message):
        model.fit_prior([image])
    assert not model.gaussian_mixture.fitted
    for call in (model, model.rate, model.latent_spikes):
        call(image)  # a training step does not wait for the values; its loss tells
        with pytest.raises(ValueError, match=message), torch.no_grad():
            call(image)
    with pytest.raises(ValueError, match=message):
        model.eval()(image)
