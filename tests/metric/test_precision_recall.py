"""Precision and recall of sets on a line, worked by hand."""

import pytest
import torch

from sj_taid.metric import Precision, Recall
from tests.metric.pixels import Pixels

REAL = [0.0, 1.0, 3.0, 4.0]  # the nearest other is 1 away from each
GENERATED = [0.5, 0.6, 9.0, 20.0]  # 0.1, 0.1, 8.4 and 11


def images(values):
    """Images whose features are on a line."""
    return torch.tensor(values).view(-1, 1, 1, 1) * torch.tensor([0.6, 0.0, 0.8, 0.0]).view(1, 2, 2)


def compute(metric, real, generated, batch=3):
    for part in images(real).split(batch):
        metric.update(part, real=True)
    for part in images(generated).split(batch):
        metric.update(part, real=False)
    return metric.compute().item()


def test_precision_and_recall_by_the_nearest_neighbour():
    # 0.5 and 0.6 are within 1 of a real one; 1, 3 and 4 are within 8.4 of 9, and 0 is not.
    assert compute(Precision(Pixels(), k=1), REAL, GENERATED) == 0.5
    assert compute(Recall(Pixels(), k=1), REAL, GENERATED) == 0.75
    with pytest.raises(ValueError, match="k must be an integer >= 1, but it is 0"):
        Recall(Pixels(), k=0)


@pytest.mark.parametrize("kind", [Precision, Recall])
def test_precision_and_recall_take_as_many_of_each_kind(kind):
    line = torch.rand(600, generator=torch.Generator().manual_seed(0)).tolist()
    state = torch.random.get_rng_state()
    first = compute(kind(Pixels()), line[:500], line[500:])
    assert 0.8 < first <= 1 and first * 100 == pytest.approx(round(first * 100), abs=1e-4)
    assert compute(kind(Pixels()), line[:500], line[500:], batch=50) == first
    assert torch.equal(torch.random.get_rng_state(), state)


def test_precision_of_groups_far_from_each_other():
    """Against differences in float64, which are exact; by float32 distances would lose digits."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(2, 1100, 4, generator=generator)  # more than are at once
    groups = 1e7 * torch.randint(2, (2, 1100, 1), generator=generator)
    real, generated = features = pixels + groups

    def distances(points):
        return (points.double().unsqueeze(1) - real.double()).norm(dim=2)

    radii = distances(real).kthvalue(6).values
    expected = (distances(generated) <= radii).any(1).float().mean().item()
    metric = Precision(Pixels())
    metric.real_features, metric.fake_features = [[one] for one in features]
    assert metric.compute().item() == pytest.approx(expected, abs=1e-6)
