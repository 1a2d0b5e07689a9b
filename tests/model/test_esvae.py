"""ESVAE: spikes from rates, the MMD, its loss, and samples from both of its priors."""

import numpy as np
import pytest
import torch

from sj_taid.model import ESVAE
from sj_taid.model.esvae import rbf_mmd, spikes_from_rate
from sj_taid.model.flow import FlowPrior
from tests.model.conftest import images

F64 = torch.float64
SCALES = (1, 2, 4, 8, 16)
SMALL = {"image_size": 8, "T": 6, "hidden_channels": 6, "latent_channels": 10}


def test_spikes_and_their_gradient_by_hand(monkeypatch):
    noise = torch.tensor([[[0.1, 0.3]], [[0.6, 0.8]], [[0.7, 0.95]]], dtype=F64)
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: noise.view(shape))
    rate = torch.tensor([[0.65, 0.2]], dtype=F64, requires_grad=True)
    spikes = spikes_from_rate(rate, T=3)
    assert spikes.tolist() == [[[1, 0]], [[1, 0]], [[0, 0]]]
    spikes.backward(torch.tensor([[[1.0, 10]], [[2, 20]], [[4, 40]]], dtype=F64))
    # |r - u| is 0.55, 0.05, 0.05 and 0.1, 0.6, 0.75: the gradient passes where it is below 1/2.
    assert rate.grad.tolist() == [[2 + 4, 10]]


@pytest.mark.parametrize(("T", "exact"), [(4, False), (3, True)])
def test_spikes_have_the_probability_of_the_rate_at_every_step(T, exact):
    rate = (torch.arange(T + 1) / T).expand(20_000, T + 1)
    spikes = spikes_from_rate(rate, T, exact)
    assert spikes.shape == (T, *rate.shape) and spikes.unique().tolist() == [0, 1]
    assert torch.allclose(spikes.mean(1), rate[0].expand(T, T + 1), atol=0.02)
    assert torch.equal(spikes.sum(0), (T * rate).round()) == exact


@pytest.mark.parametrize("wrong", [-0.1, torch.nan])
def test_spikes_of_bad_rates(wrong):
    with pytest.raises(ValueError, match=r"probabilities in \[0, 1\]"):
        spikes_from_rate(torch.tensor([[0.5, wrong]]), T=2)


def test_mmd_equals_its_closed_form():
    """Two points each: x at 0 and 2, y at 1 and 5."""
    x = torch.tensor([[0.0], [2]], dtype=F64, requires_grad=True)
    y = torch.tensor([[1.0], [5]], dtype=F64)
    # Squared distances of the six pairs of different points; the mean over pairs is the bandwidth.
    bandwidth = (4 + 1 + 25 + 1 + 9 + 16) / 6 / 4

    def k(squared):
        return sum(np.exp(-squared / (bandwidth * s)) for s in SCALES)

    within = (2 * k(0) + 2 * k(4)) / 4 + (2 * k(0) + 2 * k(16)) / 4
    between = (k(1) + k(25) + k(1) + k(9)) / 4
    mmd = rbf_mmd(x, y)
    assert mmd.item() == pytest.approx(within - 2 * between, rel=1e-12)
    # The bandwidth is a constant of the gradient.
    mmd.backward()
    slope = {
        d: sum(-2 * d / (bandwidth * s) * np.exp(-d * d / (bandwidth * s)) for s in SCALES)
        for d in (-2, -1, -5)
    }
    expected = slope[-2] / 2 - (slope[-1] + slope[-5]) / 2
    assert x.grad[0].item() == pytest.approx(expected, rel=1e-12)


def test_mmd_of_equal_points():
    x = torch.full((3, 2), 0.5, requires_grad=True)
    mmd = rbf_mmd(x, torch.full((3, 2), 0.5))
    mmd.backward()
    assert mmd.item() == 0 and x.grad.isfinite().all()


def test_mmd_of_half_precision():
    x, y = torch.rand(2, 50, 64).half()
    found, expected = x.clone().requires_grad_(), x.float().requires_grad_()
    mmd = rbf_mmd(found, y)
    mmd.backward()
    reference = rbf_mmd(expected, y.float())
    reference.backward()
    assert mmd > 0.01 and torch.equal(mmd, reference)
    assert torch.equal(found.grad, expected.grad.half()) and found.grad.abs().max() > 0


@pytest.mark.parametrize(("x", "y"), [((1, 3), (1, 3)), ((4, 3), (5, 3)), ((4, 3, 1), (4, 3, 1))])
def test_mmd_of_bad_samples(x, y):
    with pytest.raises(ValueError, match=r"\[N, d\]"):
        rbf_mmd(torch.rand(x), torch.rand(y))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("exact", [True, False])
def test_where_spike_counts_are_exact(training, exact, monkeypatch):
    model = ESVAE(**SMALL, exact_counts=exact).train(training)
    monkeypatch.setattr(model, "rate", lambda image: torch.full((2, 10), 0.5))
    monkeypatch.setattr(model.prior, "forward", lambda n: torch.full((n, 10), 0.5))
    monkeypatch.setattr(model, "decode", lambda z_seq: z_seq.sum(0))
    for counts in (model(images()).image, model.latent_spikes(images()).sum(0)):
        assert (counts == 3).all() == (exact or not training)
    assert not (model.sample(2) == 3).all()


def test_training_loss_is_the_squared_error_and_the_weighted_mmd():
    model = ESVAE(**SMALL, mmd_weight=0.5).eval()
    image = images(4)
    torch.manual_seed(0)
    output = model(image)
    assert torch.equal(output.q, model.encode(image).mean(0))
    torch.manual_seed(0)
    losses = model.training_loss(image)
    assert losses["reconstruction"] == (output.image - image).square().mean()
    assert losses["latent"] == 0.5 * rbf_mmd(output.q, output.p)


def test_flow_is_built_by_name_and_its_fit_leaves_the_other_weights():
    models = []
    for source in ("learned", "flow"):
        torch.manual_seed(0)
        models.append(ESVAE(**SMALL, sample_from=source, flow_epochs=1))
    without, model = models
    with pytest.raises(ValueError, match="the flow is not fitted"):
        model.sample(2)
    with model.draw_from("learned"):
        assert model.sample(2).shape == (2, 1, 8, 8)
    assert model.sample_from == "flow"
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.fit_prior(images(8) for _ in range(4))
    assert model.training and model.flow.fitted
    for name, value in without.state_dict().items():
        assert torch.equal(value, before[name]), name
        assert torch.equal(value, model.state_dict()[name]), name
    without.sample_from = "flow"
    for call in (lambda: without.sample(1), lambda: without.fit_prior(images(30))):
        with pytest.raises(ValueError, match=r"no prior 'flow'; train one with sample_from=flow"):
            call()


def test_fit_prior_uses_the_rates_in_eval_mode(monkeypatch):
    given = []
    monkeypatch.setattr(FlowPrior, "fit", lambda self, *args: given.append(args))
    model = ESVAE(**SMALL, sample_from="flow", flow_epochs=7)
    batches = [images(8), images(4)]
    model.fit_prior(batches, labels=[*range(12)])
    model.fit_prior(batches, labels=[*range(12)], mirror=True, seed=5)
    (rates, labels, *how), (both, labels_of_both, *how_both) = given
    model.eval()
    mirrored = [model.rate(image.flip(-1)) for image in batches]
    assert torch.equal(rates[:, 0], torch.cat([model.rate(image) for image in batches]))
    assert torch.equal(both, torch.stack([rates[:, 0], torch.cat(mirrored)], 1))
    assert labels == labels_of_both == [*range(12)]
    assert (rates.shape[1], how, how_both) == (1, [0, 7], [5, 7])


def test_fit_prior_says_what_it_was_given():
    model = ESVAE(**SMALL, sample_from="flow")
    for given, labels, message in (
        (images(12), [0] * 11, "expected 12 labels, .* but got"),
        (images(9), None, "at least 10 images, but got 9"),
        ([], None, "at least 10 images, but got 0"),
        ([(images(12), torch.zeros(12))], None, r"expects images \[N, 1, 8, 8\], but got a tuple"),
    ):
        with pytest.raises(ValueError, match=message):
            model.fit_prior(given, labels)


def test_sample_of_a_class(monkeypatch):
    model = ESVAE(**SMALL, sample_from="flow", flow_epochs=1)
    model.fit_prior(images(40), labels=torch.arange(40) % 2 + 3)
    assert model.labels == [3, 4]
    assert model.sample(0, label=[]).shape == model.sample(0, label=3).shape == (0, 1, 8, 8)
    drawn = []
    monkeypatch.setattr(model.flow, "forward", lambda n, labels: drawn.append(labels.tolist()))
    monkeypatch.setattr("sj_taid.model.esvae.spikes_from_rate", lambda *_: torch.zeros(6, 3, 10))
    for label in (4, np.array(4), [3, 4, 3], torch.tensor([4, 4, 3], dtype=torch.int32)):
        assert model.sample(3, label=label).shape == (3, 1, 8, 8)
    assert drawn == [[4, 4, 4], [4, 4, 4], [3, 4, 3], [4, 4, 3]]
    for label in (7, [3, 4], [3, 4, 7], 3.0, True, "3", "343", {3}, [3, None, 4], [[3], 3, 4]):
        with pytest.raises(ValueError, match=r"label must be one of \[3, 4\], .* a list of 3"):
            model.sample(3, label=label)
    with model.draw_from("learned"), pytest.raises(ValueError, match=r"of \[\], .*fit_prior"):
        model.sample(3, label=3)


def test_walk_is_decoded_from_rates_between_those_of_both_images(monkeypatch):
    model = ESVAE(**SMALL)
    rates = torch.tensor([[0.0] * 10, [1.0] * 10])
    monkeypatch.setattr(model, "rate", lambda both: rates)
    monkeypatch.setattr(model, "decode", lambda z_seq: z_seq.sum(0))
    counts = model.walk(*images(2), steps=7)
    assert torch.equal(counts, torch.arange(7.0)[:, None].expand(7, 10))
    assert model.training
    with pytest.raises(ValueError, match="steps"):
        model.walk(*images(2), steps=1)
