"""The rate latent: the spike sampler, the MMD, and both priors."""

import numpy as np
import pytest
import torch
from torch import nn

from sj_taid.model.rate import GaussianMixturePrior, LearnedPrior, rbf_mmd, spikes_from_rate

F64 = torch.float64


def test_spikes_and_their_gradient_by_hand(monkeypatch):
    noise = torch.tensor([[[0.1, 0.3]], [[0.6, 0.8]], [[0.7, 0.95]]], dtype=F64)
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: noise.view(shape))
    rate = torch.tensor([[0.65, 0.2]], dtype=F64, requires_grad=True)
    spikes = spikes_from_rate(rate, T=3)
    assert spikes.tolist() == [[[1, 0]], [[1, 0]], [[0, 0]]]
    spikes.backward(torch.tensor([[[1.0, 10]], [[2, 20]], [[4, 40]]], dtype=F64))
    # |r - u| is 0.55, 0.05, 0.05 and 0.1, 0.6, 0.75: the gradient passes where it is below 1/2.
    assert rate.grad.tolist() == [[2 + 4, 10]]


def test_spikes_have_the_probability_of_the_rate_at_every_step():
    rate = torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0]).expand(20_000, 5)
    spikes = spikes_from_rate(rate, T=4)
    assert spikes.shape == (4, 20_000, 5) and spikes.unique().tolist() == [0, 1]
    assert torch.allclose(spikes.mean(1), rate[0].expand(4, 5), atol=0.015)


@pytest.mark.parametrize("T", [3, 8])
def test_exact_spikes_have_the_count_of_the_rate_at_random_steps(T):
    rate = (torch.arange(T + 1) / T).expand(4000, T + 1)
    spikes = spikes_from_rate(rate, T, exact=True)
    assert torch.equal(spikes.sum(0), (T * rate).round())
    assert torch.allclose(spikes.mean(1), rate[0].expand(T, T + 1), atol=0.05)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [(-0.1, "from -0.1 to .*clamp"), (1.1, "to 1.1; clamp"), (torch.nan, "from nan to .*diverged")],
)
def test_spikes_of_bad_rates(wrong, message):
    with pytest.raises(ValueError, match=rf"probabilities in \[0, 1\].*{message}"):
        spikes_from_rate(torch.tensor([[0.5, wrong]]), T=2)


def test_mmd_equals_its_closed_form():
    """Two points each: x at 0 and 2, y at 1 and 5."""
    x = torch.tensor([[0.0], [2]], dtype=F64, requires_grad=True)
    y = torch.tensor([[1.0], [5]], dtype=F64)
    # Squared distances of the six pairs of different points; the mean over pairs is the bandwidth.
    bandwidth = (4 + 1 + 25 + 1 + 9 + 16) / 6 / 4

    def k(squared):
        return sum(np.exp(-squared / (bandwidth * s)) for s in (1, 2, 4, 8, 16))

    within = (2 * k(0) + 2 * k(4)) / 4 + (2 * k(0) + 2 * k(16)) / 4
    between = (k(1) + k(25) + k(1) + k(9)) / 4
    mmd = rbf_mmd(x, y)
    assert mmd.item() == pytest.approx(within - 2 * between, rel=1e-12)

    def slope(squared, difference):  # of k with respect to one point
        return sum(
            -2 * difference / (bandwidth * s) * np.exp(-squared / (bandwidth * s))
            for s in (1, 2, 4, 8, 16)
        )

    mmd.backward()
    expected = 2 * slope(4, -2) / 4 - 2 * (slope(1, -1) + slope(25, -5)) / 4
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


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ((1, 3), (1, 3), r"at least 2 points, but got \[1, 3\] .*dataset\.batch_size"),
        ((4, 3), (5, 3), r"of one shape .*but got \[4, 3\] and \[5, 3\]"),
        ((4, 3, 1), (4, 3, 1), r"\[N, d\]"),
    ],
)
def test_mmd_of_bad_samples(x, y, message):
    with pytest.raises(ValueError, match=message):
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


def test_mixture_draws_its_training_rates():
    spread = 0.03
    centres = torch.tensor([[0.2, 0.3, 0.5], [0.8, 0.6, 0.4]])
    which = torch.arange(4000) % 4 == 0  # a quarter in the first of two clusters
    rates = torch.where(which[:, None], *centres.unsqueeze(1)) + spread * torch.randn(4000, 3)
    mixture = GaussianMixturePrior(3, components=2, levels=1000)
    assert not mixture.fitted
    mixture.fit(rates)
    drawn = mixture(4000)
    near_first = (drawn - centres[0]).norm(dim=1) < 0.3
    assert near_first.float().mean().item() == pytest.approx(0.25, abs=0.03)
    for cluster, centre in zip((near_first, ~near_first), centres, strict=True):
        assert torch.allclose(drawn[cluster].mean(0), centre, atol=0.01)
        assert torch.allclose(drawn[cluster].std(0), torch.full((3,), spread), atol=0.005)


def test_mixture_draws_correlated_rates_of_0_and_1():
    """No Gaussian has that density; the ranks of its draws have."""
    score = torch.randn(4000, 1)
    other = score + 0.3 * torch.randn(4000, 1)
    rates = torch.cat([score > 0.5, other > 0.5, other < 0.5], 1).float()
    mixture = GaussianMixturePrior(3, components=1, levels=4)
    mixture.fit(rates)
    drawn = mixture(4000)
    assert drawn.unique().tolist() == [0, 1]
    assert torch.allclose(drawn.mean(0), rates.mean(0), atol=0.03)
    # One Gaussian with the correlation rho of 0s and 1s gives back about (2 / pi) arcsin(rho).
    expected = 2 / torch.pi * torch.corrcoef(rates.T).asin()
    assert expected[0, 1] > 0.5 and expected[0, 2] < -0.5
    assert torch.allclose(torch.corrcoef(drawn.T), expected, atol=0.05)


def test_mixture_draws_by_rank():
    mixture = GaussianMixturePrior(1, components=2, levels=4)
    mixture.weights.copy_(torch.tensor([0.5, 0.5]))
    mixture.means.copy_(torch.tensor([[0.0], [10]]))
    mixture.cholesky.copy_(torch.ones(2, 1, 1))
    # A fifth at each level: of the first Gaussian, ranks 0 to 1/2, nothing is above level 2.
    mixture.cumulative.copy_(torch.tensor([[0.2, 0.4, 0.6, 0.8, 1.0]]))
    shares = (mixture(5000) * 4).long().ravel().bincount() / 5000
    assert torch.allclose(shares, torch.full((5,), 0.2), atol=0.02)


def test_mixture_draws_without_a_copy_of_a_factor_per_draw():
    """Memory grows by the draws, n x d, and not by n x components x d x d."""
    n, components, d = 2000, 10, 64
    mixture = GaussianMixturePrior(d, components)
    mixture.fit(torch.rand(200, d).round())
    with torch.profiler.profile(profile_memory=True) as profile:
        mixture(n)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest <= 8 * n * d * 4, "bytes"


def test_mixture_in_a_state_dict(tmp_path):
    mixture = GaussianMixturePrior(2, components=3)
    mixture.fit(torch.rand(100, 2).round())
    torch.save(mixture.state_dict(), tmp_path / "mixture.pt")
    other = GaussianMixturePrior(2, components=3)
    other.load_state_dict(torch.load(tmp_path / "mixture.pt", weights_only=True))
    torch.manual_seed(0)
    drawn = mixture(500)
    torch.manual_seed(0)
    assert torch.equal(other(500), drawn) and other(0).shape == (0, 2)
    other.clear()
    assert not other.fitted


@pytest.mark.parametrize("options", [{"components": 3}, {"levels": 8}])
def test_mixture_of_another_size_is_not_loaded(options):
    fitted, other = (
        GaussianMixturePrior(2, 2),
        GaussianMixturePrior(2, **{"components": 2} | options),
    )
    fitted.fit(torch.rand(100, 2).round())
    with pytest.raises(RuntimeError, match="size mismatch"):
        other.load_state_dict(fitted.state_dict())
    assert not other.fitted


@pytest.mark.parametrize(
    ("rates", "iterations", "message"),
    [
        (torch.linspace(0, 1, 600).view(200, 3), 1, "did not converge.* increase max_iter"),
        (torch.eye(3).repeat(5, 1), 100, r"distinct clusters \(3\) found smaller"),
    ],
)
def test_mixture_fit_warns(rates, iterations, message):
    with pytest.warns(UserWarning, match=message):
        GaussianMixturePrior(3, components=4, iterations=iterations).fit(rates)


def test_mixture_fit_of_a_channel_without_spread():
    rates = torch.rand(50, 3)
    rates[:, 1] = 0.0
    mixture = GaussianMixturePrior(3, components=2)
    mixture.fit(rates)
    assert mixture(100)[:, 1].max() == 0


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: GaussianMixturePrior(2)(3), RuntimeError, "not fitted.*sample_from='learned'"),
        (lambda: GaussianMixturePrior(2, 5).fit(torch.rand(4, 2)), ValueError, "got 4; give more"),
        (lambda: GaussianMixturePrior(2, 1).fit(torch.ones(4, 2) * 2), ValueError, "clamp"),
        (lambda: GaussianMixturePrior(2).fit(torch.rand(50, 3)), ValueError, "expected rates"),
        (lambda: GaussianMixturePrior(2, 0), ValueError, "components .* integer >= 1, but it is 0"),
        (lambda: GaussianMixturePrior(2, iterations=2.5), ValueError, "iterations .* 2.5"),
    ],
)
def test_mixture_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_mixture_fit_that_fails_changes_nothing(monkeypatch):
    mixture = GaussianMixturePrior(2, 2)
    mixture.fit(torch.rand(50, 2))
    before = {name: tensor.clone() for name, tensor in mixture.state_dict().items()}

    def fail(matrix):
        raise RuntimeError("not positive definite")

    monkeypatch.setattr(torch.linalg, "cholesky", fail)
    for rates in (torch.rand(50, 3), torch.rand(50, 2)):
        with pytest.raises((ValueError, RuntimeError)):
            mixture.fit(rates)
    for name, tensor in mixture.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_both_priors_follow_the_models_dtype():
    net = nn.ModuleList([LearnedPrior(2), GaussianMixturePrior(2, 1)]).double()
    net[1].fit(torch.rand(10, 2))
    assert net[0](3).dtype == net[1](3).dtype == F64
