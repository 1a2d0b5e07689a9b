"""What the benchmarks count, on grids too small to mean anything, and their committed results."""

import re
from itertools import chain
from pathlib import Path

import any_net
import common
import halves
import published_nets
import pytest
import torch
import zoo
from spikingjelly.activation_based.layer import SeqToANNContainer
from spikingjelly.activation_based.neuron import LIFNode
from spikingjelly.activation_based.surrogate import ATan
from torch import nn

from sj_taid.data import Torchvision
from sj_taid.metric import FrechetDistance
from tests.data.made_up import ready
from tests.data.test_image import write_idx
from tests.metric.pixels import Pixels
from tests.nets.alike import robust

CPU = torch.device("cpu")
RESULTS = Path(common.__file__).parent / "results"
FACTS = ["command", "commit", "threads", "machine", "torch_version", "spikingjelly_version"]
TIMES = ["p20_ms", "median_ms", "p80_ms"]


@pytest.fixture
def measure(tmp_path, monkeypatch):
    """Run a benchmark with options, and read the CSV that it writes."""
    monkeypatch.setattr(common, "WARM_UP", 2)

    def run(script, *options):
        script.main(["--device", "cpu", "--out", str(tmp_path), *options])
        (path,) = tmp_path.glob(f"{script.__name__}*.csv")
        return read_csv(path)

    return run


def read_csv(path):
    """A benchmark's CSV, whose facts and times must be whole."""
    table = common.read_csv(path)
    assert table[FACTS].notna().all(axis=None)
    assert (table.select_dtypes("number").fillna(0) >= 0).all(axis=None)
    if {*TIMES} <= {*table.columns}:
        timed = table[TIMES].T
        assert all(timed[row].is_monotonic_increasing for row in timed)
    return table


#: norms fused, and the share of bytes that is left at most; the first net is SpikingJelly's own
ZOO = {
    "ms_resnet18": (9, 0.38),
    "Spikformer": (9, 0.38),
    "SpikeDriven": (5, 0.36),
    "MetaSpikeformer": (6, 0.52),
    "SpikingResformer": (2, 0.40),
    "SpikingUNet": (3, 0.52),
    "SpikingVQVAE": (4, 0.42),
    "SFOD": (0, 0.68),
    "SEWResNet": (7, 0.32),
}


@pytest.mark.slow
def test_zoo_counts_norms_and_bytes(measure):
    table = measure(zoo, "--size", "16", "--nets", *ZOO).fillna({"left": ""})
    for row in table.itertuples():
        fused, ratio = ZOO[row.net]
        left = map(int, re.findall(r"(\d+) ", row.left))
        assert row.fused >= fused and row.fused + sum(left) == row.norms, row
        assert row.after_mb <= ratio * row.before_mb, row
    own = table["net"][table["written"] == "by SpikingJelly"]
    assert [*own] == ["ms_resnet18"] and {*ZOO} - {*own} == published_nets.NETS.keys()


SHAPE = (4, 4, 2, 16, 16)


def tiny():
    """A net whose spikes survive rounding on the input that is drawn next."""
    states = []

    def make():
        neurons = (LIFNode(surrogate_function=ATan(), step_mode="m") for _ in range(2))
        layers = [SeqToANNContainer(nn.Conv2d(c, 8, 3), nn.BatchNorm2d(8)) for c in (2, 8)]
        states.append(torch.get_rng_state())
        return nn.Sequential(*chain(*zip(layers, neurons, strict=True))), torch.rand(SHAPE)

    net, _ = robust(make)
    torch.set_rng_state(states[-1])
    return net


def test_any_net_measures_its_gain_and_writes_it_before_the_next(measure, monkeypatch, tmp_path):
    monkeypatch.setattr(torch, "compile", lambda net, **_: nn.Module())  # which has no forward
    options = ["--shape", *map(str, SHAPE), "--repeats", "1", "--budget", "0.01", "--compile"]
    with pytest.raises(NotImplementedError):
        measure(any_net, f"{__name__}:tiny", *options)
    plain, ours = read_csv(tmp_path / "any_net-tiny.csv").itertuples()
    assert (plain.system, ours.system) == ("plain", "accelerate")
    assert plain.held_mb > ours.held_mb and plain.peak_mb > ours.peak_mb
    assert ours.largest_batch > plain.largest_batch > 4 and ours.difference < 1e-4
    assert plain.largest_batch * plain.mb_per_sample == pytest.approx(10, rel=0.2)
    with pytest.raises(SystemExit, match=r"nothing:make: .*; expected package\.module:factory"):
        measure(any_net, "nothing:make", *options)
    with pytest.raises(SystemExit, match="expected a batch of 2 or more"):
        measure(any_net, f"{__name__}:tiny", "--shape", "4", "1", "2", "8", "8")


def test_any_net_compares_what_is_not_zero_but_for_rounding():
    net = tiny()
    zero = any_net.zero_gradients(net, torch.rand(SHAPE))
    assert zero == {"0.0.bias", "2.0.bias"}  # in front of norms
    one, nan, none = torch.ones(1), torch.full((1,), float("nan")), torch.zeros(1)
    plain = {"output 0": one, "w": one, "0.0.bias": one * 1e-9, "unused": none}
    for ours, expected in (
        (plain, ("", 0.0)),
        (plain | {"0.0.bias": one}, ("", 0.0)),
        (plain | {"w": one * 0.75}, ("w", 0.25)),
        (plain | {"w": nan}, ("w", float("inf"))),
        (plain | {"unused": one}, ("unused", float("inf"))),
    ):
        assert any_net.compare(ours, plain, zero) == expected


@pytest.mark.parametrize(
    "path", [*RESULTS.glob("*/*.csv")], ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_committed_csv_is_whole(path):
    table = read_csv(path)
    assert table["commit"].str.fullmatch("[0-9a-f]{12}").all()
    assert not table["command"].str.contains("--out").any()


def test_a_command_names_no_folder_of_this_machine(monkeypatch):
    words = ["/home/me/x.py", "/data/run-0", "run-1", "--published", "/data/fad", "--out", "/out"]
    monkeypatch.setattr("sys.argv", words)
    assert common.command() == "python x.py run-0 run-1 --published fad"


def test_halves_hold_each_test_image_once(tmp_path, monkeypatch):
    write_idx(tmp_path)
    options = {"source": "MNIST", "image_size": 2, "batch_size": 10}
    data = ready(Torchvision, tmp_path, **options)
    monkeypatch.setattr(halves, "PublishedCodes", lambda path: Pixels())
    whole = FrechetDistance(Pixels(), reset_real_features=False)
    for images, _ in data.test_dataloader():
        whole.update(images, real=True)
    monkeypatch.setattr(halves, "PublishedFrechetAutoencoderDistance", lambda *names: whole)
    metrics = halves.distances(data, tmp_path)
    sums = [metrics[half].real_features_sum for half in "AB"]
    assert [int(metrics[half].real_features_num_samples) for half in "AB"] == [50, 50]
    torch.testing.assert_close(sum(sums), whole.real_features_sum)
    batches = iter(data.test_dataloader())  # in the place of samples
    monkeypatch.setattr(halves, "BATCHES", len(batches))
    rows = {
        row["images"]: row["fad"] for row in halves.measure(metrics, lambda n: next(batches)[0], 0)
    }
    assert rows["all"] == pytest.approx(0, abs=1e-6) and min(rows["A"], rows["B"]) > 1e-5
