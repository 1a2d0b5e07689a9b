"""Measuring a generator's checkpoint further."""

import measure

from sj_taid.training.run import Run
from tests.training.conftest import TINY_ESVAE


def test_measure_adds_an_evaluation(trained):
    run = Run(trained(*TINY_ESVAE, "model.sample_from=learned"))  # a flow takes longer to fit
    measure.main([str(run.folder), "--draws", "2"])
    (evaluation,) = run.evaluations
    metrics, protocol = evaluation["metrics"], evaluation["protocol"]
    fad = run.metrics["fad"]
    assert abs(metrics["fad_median"] - fad) < metrics["fad_range"]
    assert metrics["fad_floor"] < fad != metrics["fad_perfect"]
    assert metrics["fad_precision_floor"] > 0.5
    assert protocol["fad_median"].endswith(", of 2 draws")
    assert protocol["fad_floor"].endswith("images at 8x8, samples: training images")
    assert protocol["fad_perfect"].endswith("from the rates of training images")
