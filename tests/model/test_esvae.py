"""ESVAE: its loss, and samples from both of its priors."""

import pytest
import torch

from sj_taid.model import ESVAE
from sj_taid.model.flow import FlowPrior
from sj_taid.model.rate import rbf_mmd
from tests.model.conftest import images

SMALL = {"image_size": 8, "T": 6, "hidden_channels": (6, 12), "latent_channels": 10}


def test_rate_is_the_mean_of_the_encoders_spikes():
    model = ESVAE(**SMALL).eval()
    image = images()
    assert torch.equal(model(image).q, model.encode(image).mean(0))
    assert model.prior.linear.weight.shape == (10, 10)


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
    torch.manual_seed(0)
    losses = model.training_loss(image)
    assert losses["reconstruction"] == (output.image - image).square().mean()
    assert losses["latent"] == 0.5 * rbf_mmd(output.q, output.p)


def test_sample_from_the_fitted_flow():
    model = ESVAE(**SMALL, sample_from="flow", flow_epochs=1)
    with pytest.raises(ValueError, match="the flow is not fitted"):
        model.sample(2)
    with model.draw_from("learned"):
        assert model.sample(2).shape == (2, 1, 8, 8)
    assert model.sample_from == "flow"
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.fit_prior(images(8) for _ in range(4))
    assert model.training and model.flow.fitted
    for name, value in model.state_dict().items():
        if not name.startswith("flow"):
            assert torch.equal(value, before[name]), name

    other = ESVAE(**SMALL, sample_from="flow")
    other.load_state_dict(model.state_dict())
    torch.manual_seed(0)
    drawn = model.sample(5)
    torch.manual_seed(0)
    assert torch.equal(other.sample(5), drawn)


def test_flow_is_built_by_name_and_leaves_the_other_weights():
    models = []
    for source in ("learned", "flow"):
        torch.manual_seed(0)
        models.append(ESVAE(**SMALL, sample_from=source))
    without, model = models
    for name, value in without.state_dict().items():
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
    assert torch.equal(rates, torch.cat([model.rate(image) for image in batches]))
    assert torch.equal(both[::2], rates)
    assert torch.equal(both[1::2], torch.cat([model.rate(image.flip(-1)) for image in batches]))
    assert labels.tolist() == labels_of_both[::2].tolist() == labels_of_both[1::2].tolist()
    assert (how, how_both) == ([0, 7, 1], [5, 7, 2])


@pytest.mark.parametrize("mirror", [False, True])
def test_fit_prior_says_what_it_was_given(mirror):
    model = ESVAE(**SMALL, sample_from="flow")
    for given, labels, message in (
        (images(12), [0] * 11, "expected 12 labels, .* but got"),
        ([], None, "at least 10 images, but got 0"),
        ([(images(12), torch.zeros(12))], None, r"expects images \[N, 1, 8, 8\], but got a tuple"),
    ):
        with pytest.raises(ValueError, match=message):
            model.fit_prior(given, labels, mirror)


def test_sample_of_a_class(monkeypatch):
    model = ESVAE(**SMALL, sample_from="flow", flow_epochs=1)
    model.fit_prior(images(40), labels=torch.arange(40) % 2 + 3)
    assert model.labels == [3, 4]
    drawn = []
    monkeypatch.setattr(model.flow, "forward", lambda n, labels: drawn.append(labels.tolist()))
    monkeypatch.setattr("sj_taid.model.esvae.spikes_from_rate", lambda *_: torch.zeros(6, 3, 10))
    for label in (4, [3, 4, 3], torch.tensor([4, 4, 3])):
        assert model.sample(3, label=label).shape == (3, 1, 8, 8)
    assert drawn == [[4, 4, 4], [3, 4, 3], [4, 4, 3]]
    for label in (7, [3, 4], [3, 4, 7], 3.0, True, "333"):
        with pytest.raises(ValueError, match=r"label must be one of \[3, 4\]"):
            model.sample(3, label=label)
    with (
        model.draw_from("learned"),
        pytest.raises(ValueError, match="fit_prior"),
    ):
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
    a, b = images(2)
    for wrong in (a[None], a[:, 1:], torch.cat([a, a])):
        with pytest.raises(ValueError, match=r"walk takes two images \[1, 8, 8\], but got"):
            model.walk(wrong, b)
        with pytest.raises(ValueError, match=r"walk takes two images"):
            model.walk(b, wrong)
