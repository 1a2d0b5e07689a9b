"""The rate latent: the spike sampler, the MMD, and the learned prior."""

import numpy as np
import pytest
import torch

from sj_taid.model.rate import LearnedPrior, rbf_mmd, spikes_from_rate

F64 = torch.float64
SCALES = (1, 2, 4, 8, 16)


def test_spikes_and_their_gradient_by_hand(monkeypatch):
    noise = torch.tensor([[[0.1, 0.3]], [[0.6, 0.8]], [[0.7, 0.95]]], dtype=F64)
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: noise.view(shape))
    rate = torch.tensor([[0.65, 0.2]], dtype=F64, requires_grad=True)
    spikes = spikes_from_rate(rate, T=3)
    assert spikes.tolist() == [[[1, 0]], [[1, 0]], [[0, 0]]]
    spikes.backward(torch.tensor([[[1.0, 10]], [[2, 20]], [[4, 40]]], dtype=F64))
    # |r - u| is 0.55, 0.05, 0.05 and 0.1, 0.6, 0.75: the gradient passes where it is below 1/2.
    assert rate.grad.tolist() == [[2 + 4, 10]]


@pytest.mark.parametrize(("T", "exact"), [(4, False), (3, True), (8, True)])
def test_spikes_have_the_probability_of_the_rate_at_every_step(T, exact):
    rate = (torch.arange(T + 1) / T).expand(20_000, T + 1)
    spikes = spikes_from_rate(rate, T, exact)
    assert spikes.shape == (T, *rate.shape) and spikes.unique().tolist() == [0, 1]
    assert torch.allclose(spikes.mean(1), rate[0].expand(T, T + 1), atol=0.02)
    assert torch.equal(spikes.sum(0), (T * rate).round()) == exact


@pytest.mark.parametrize("wrong", [-0.1, 1.1, torch.nan])
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mmd_of_half_precision(dtype):
    x, y = torch.rand(2, 250, 64).to(dtype)
    found, expected = x.clone().requires_grad_(), x.float().requires_grad_()
    mmd = rbf_mmd(found, y)
    mmd.backward()
    reference = rbf_mmd(expected, y.float())
    reference.backward()
    assert mmd > 0.01 and torch.equal(mmd, reference)
    assert torch.equal(found.grad, expected.grad.to(dtype)) and found.grad.abs().max() > 0


@pytest.mark.parametrize(("x", "y"), [((1, 3), (1, 3)), ((4, 3), (5, 3)), ((4, 3, 1), (4, 3, 1))])
def test_mmd_of_bad_samples(x, y):
    with pytest.raises(ValueError, match=r"\[N, d\]"):
        rbf_mmd(torch.rand(x), torch.rand(y))


def test_learned_prior_learns_through_the_mmd():
    prior = LearnedPrior(2)
    optimizer = torch.optim.Adam(prior.parameters(), 0.05)
    target = torch.rand(256, 2) * torch.tensor([0.2, 0.4]) + torch.tensor([0.7, 0.1])
    first = rbf_mmd(target, prior(256)).item()
    for _ in range(60):
        optimizer.zero_grad()
        rbf_mmd(target, prior(256)).backward()
        optimizer.step()
    assert rbf_mmd(target, prior(256)).item() < first / 20
    assert ((prior(64) >= 0) & (prior(64) <= 1)).all()
