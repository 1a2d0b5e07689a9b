"""Fill the tables of README.md, RESULTS.md, results/README.md and docs/: ``make tables``.

    python experiments/pages.py [FOLDER ...]

Finished runs of experiments below the folders are first copied into results/. Each table stands
between ``<!-- table: NAME -->`` and ``<!-- end -->``. The function of its name makes it of the runs
in results/ and of the CSVs in experiments/benchmark/results/: no number is copied by hand.
"""

import argparse
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import pandas as pd

from sj_taid.pretrained import WEIGHTS, list_models, read_config
from sj_taid.training.compare import (
    COSTS,
    METRICS,
    Column,
    Metrics,
    format_metrics,
    frame,
    gather,
    markdown,
    overrides,
    summary,
)
from sj_taid.training.config import folder_name
from sj_taid.training.files import atomic_write

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"
PAGES = [
    *(ROOT / name for name in ("README.md", "RESULTS.md", "results/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
BENCHMARKS = ROOT / "experiments" / "benchmark" / "results"
EPYC, AVX2 = BENCHMARKS / "epyc-2-cores", BENCHMARKS / "epyc-avx2-2-cores"
PLIF = "SpikingJelly PLIF"
DATASETS = {
    "mnist": "MNIST",
    "fashion_mnist": "Fashion-MNIST",
    "cifar10": "CIFAR10",
    "celeba": "CelebA",
}
#: The recipe of the shipped models: its samples by prior, what a perfect prior would draw, and
#: training images in place of samples; each with the ending of its metrics.
BEST = "esvae_sharper"
OURS = {
    "our ESVAE, flow prior": "",
    "our ESVAE, learned prior": "_learned",
    "training images' rates, decoded": "_perfect",
    "training images": "_floor",
}
PERFECT = "fad_published_perfect"
#: The metrics in the list of models.
ON_CARD = ("accuracy", "reconstruction", "fad", "fad_published_median", "fad_recall")
#: The choices of the generators that are compared; they differ in decoder and neuron alone.
CHOICES = [
    *("decoder", "neuron", "dataset", "dataset.batch_size", "dataset.image_size"),
    *("dataset.num_workers", "metric.features", "trainer.max_epochs", "trainer.precision"),
]
NEURONS = ["lif", "plif", "alif", "alif_channel"]  # each learns more than the one before
#: A start whose accuracy is at most so many points below the best counts as near it.
NEAR_BEST = 2.0


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="*", type=Path, help="folders that hold runs to store")
    options = parser.parse_args(arguments)
    if options.folders:
        print(*store(gather(options.folders)), sep="\n")
    for page in PAGES:
        with atomic_write(page) as temporary:
            temporary.write_text(fill(page), encoding="utf-8")


def store(finished: Mapping[Path, Metrics], results: Path = RESULTS) -> Iterator[str]:
    """Copy the metrics of experiments' runs into results; yields a line for each."""
    for folder, metrics in finished.items():
        choices = overrides(metrics) | {"seed": str(metrics["seed"])}
        experiment = choices.pop("experiment", "")
        if not experiment:
            yield f"not stored: {folder} (it is no run of experiment=...)"
            continue
        name = folder_name([f"{key}={value}" for key, value in choices.items()])
        path = results / "runs" / experiment / f"{name}.json"
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
        yield f"stored: {path}"


#: the functions of the tables, by name
TABLES: dict[str, Callable[[], Any]] = {}


def makes_table(make: Callable[[], Any]) -> Callable[[], Any]:
    """Let a function make the table of its name."""
    TABLES[make.__name__] = make
    return make


def fill(page: Path) -> str:
    """The text of a page, with its tables up to date."""

    def make(found: re.Match[str]) -> str:
        made = TABLES[found[2]]()
        if isinstance(made, pd.DataFrame):
            made = markdown(made.replace({"dataset": DATASETS}))
        return f"{found[1]}\n{made}\n{found[3]}"

    pattern = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
    return pattern.sub(make, page.read_text(encoding="utf-8"))


# ---- runs ----


def load_runs(experiment: str, results: Path = RESULTS) -> list[Metrics]:
    """The metrics of an experiment's runs."""
    paths = sorted((results / "runs" / experiment).glob("*.json"))
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def experiments() -> list[str]:
    """The names of the experiments that have runs."""
    return sorted(path.name for path in (RESULTS / "runs").iterdir())


def load_frame(names: Sequence[str], *keys: str) -> pd.DataFrame:
    """The runs of experiments with no choice on the command line beyond ``keys`` and the seed."""
    runs, known = chain(*map(load_runs, names)), {"experiment", "seed", *keys}
    return frame([run for run in runs if overrides(run).keys() <= known])[0]


@makes_table
def gains() -> pd.DataFrame:
    """Memory, time and quality, each with SpikingJelly's LIF or FSVAE's image decoder before."""
    nets = frontier().query("net == 'sew_resnet18' and dtype == 'float32' and T == 8")
    nets, lif = nets.set_index("neuron"), ("SpikingJelly LIF", "LIF accelerate")
    held = read_zoo().set_index("net").loc["Spikformer", ["before_mb", "after_mb"]].astype(float)
    kilobytes = "`accelerate`, Spikformer as published: held after a forward, kB"
    fsvae = load_frame(["fsvae"], *CHOICES).query("dataset == 'mnist'").set_index("decoder")
    faces = load_frame(["celeba_esvae_cpu"], *CHOICES).query("epochs == 4").set_index("decoder")
    digits = frame(load_runs("mnist_classifier_cpu"))[0].set_index("neuron")
    counting = integer_runs().set_index("neuron")
    step = "`accelerate`, training step of SEW-ResNet-18"
    rows = [
        gain(f"{step}: MB per sample", nets["mb_per_sample"], *lif),
        gain(f"{step}: ms", nets["median_ms"], *lif),
        gain(kilobytes, 1e3 * held, *held.index),
        gain("`TAID`, FSVAE on MNIST: error", fsvae["reconstruction"], "fixed", "taid"),
        gain("`TAID`, ESVAE on faces: error", faces["reconstruction"], "fixed", "taid"),
        gain("`ALIFNode`, classifier on MNIST: accuracy, %", digits["accuracy"], "lif", "alif"),
        gain(
            "`ALIFNode(levels=4)` in one step, LIF in four, classifier on CIFAR10: accuracy, %",
            *(counting["accuracy"], INTEGER["lif", "default"], INTEGER["alif", "default"]),
        ),
    ]
    return pd.DataFrame(rows)


def gain(what: str, values: pd.Series, theirs: str, ours: str) -> dict[str, str]:
    """A row of :func:`gains`: the values of the neuron or decoder ``theirs`` and of ``ours``."""
    column = METRICS.get(str(values.name), Column(what, 1, 0, spread=False))
    before, after = values.loc[[theirs]], values.loc[[ours]]
    more, ratio = after.mean() - before.mean(), after.mean() / before.mean()
    return {
        "what": what,
        "before": column.text(before),
        "after": column.text(after),
        "gain": f"{100 * (ratio - 1):.0f} %" if more < 0 else f"+{more / column.unit:.2f}",
        "seeds": str(len(after)) if len(after) > 1 else "",
    }


def best_runs() -> pd.DataFrame:
    """The runs of the best recipe with ALIF, on all data sets."""
    keys = ("neuron", "metric.features", "trainer.precision", "trainer.max_epochs")
    runs = load_frame([f"{name}_{BEST}" for name in DATASETS], *keys)
    return runs[runs["neuron"] == "alif"]


def medians(runs: pd.DataFrame, metric: str, ending: str = "") -> pd.Series:
    """A metric, the median of a run's draws where it has several."""
    values = runs[f"{metric}{ending}"]
    return runs.get(f"{metric}_median{ending}", values).fillna(values)


@makes_table
def generators() -> pd.DataFrame:
    """FAD as published of the papers' generators and of our longest runs."""
    rows = pd.read_csv(RESULTS / "published.csv").query("task == 'generation'")
    fads = rows[rows["metric"] == "fad_published"]
    papers = fads.pivot(index=["row", "source"], columns="dataset", values="value")
    table = papers.map("{:g}".format).replace("nan", "").reset_index("source")
    epochs = rows[rows["metric"] == "epochs"].groupby("row")["value"].first()
    table = table.assign(epochs=epochs.map("{:g}".format))
    runs = best_runs().query("epochs == epochs.max()")
    for name, ending in OURS.items():
        groups = medians(runs, "fad_published", ending).groupby(runs["dataset"])
        values = {dataset: METRICS["fad_published"].text(part) for dataset, part in groups}
        trained = {} if ending == "_floor" else {"epochs": str(runs["epochs"].max())}
        table.loc[name] = {"source": "this project", **trained, **values}
    cards = [read_config(name)["metrics"] for name in list_models()]
    shipped = {card["choices"]["dataset"]: card for card in cards if PERFECT in card}
    for name, metric in (("its samples", "fad_published_median"), ("rates, decoded", PERFECT)):
        values = {dataset: f"{card[metric]:.2f}" for dataset, card in shipped.items()}
        table.loc[f"our ESVAE of the package, {name}"] = {"source": "this project", **values}
    shown = table[[*DATASETS, "epochs", "source"]].rename(columns=DATASETS).fillna("")
    return shown.rename_axis("FAD as published ↓", axis="index").reset_index()


@makes_table
def decoders() -> pd.DataFrame:
    """Changes in % against the fixed decoder, over pairs of runs of one neuron and seed."""
    return changes("decoder", "fixed")


@makes_table
def generator_neurons() -> pd.DataFrame:
    """Changes in % by ALIF against LIF and PLIF, over pairs of runs of one decoder and seed."""
    table = pd.concat({f"`{name}`": changes("neuron", name) for name in ("lif", "plif")})
    table = table[table["neuron"] == "`alif`"].drop(columns="neuron").droplevel(1)
    table.insert(1, "ALIF instead of", table.index)
    return table.sort_values("experiment", kind="stable")


def changes(choice: str, before: str) -> pd.DataFrame:
    """The generators' changes in % against those with ``before``, a row for each other choice."""
    runs = load_frame(experiments(), *CHOICES).dropna(subset="reconstruction")
    lengths = runs.groupby("experiment")["epochs"].transform("nunique")
    runs["row"] = "`" + runs["experiment"] + "`"
    runs.loc[lengths > 1, "row"] += ", " + runs["epochs"].astype(str) + " epochs"
    papers = runs["fad_published"].notna().groupby(runs["row"]).transform("all")
    runs["FAD through"] = papers.map({True: "the papers'", False: "own autoencoder"})
    runs["FAD, %"] = medians(runs, "fad_published").where(papers, medians(runs, "fad"))
    runs["reconstruction, %"] = runs["reconstruction"]
    (other,) = {"decoder", "neuron"} - {choice}
    plain = runs[runs[choice] == before]
    pairs = runs[runs[choice] != before].merge(
        plain, on=["row", "seed", other], suffixes=("", " before"), validate="many_to_one"
    )
    for title in ("reconstruction, %", "FAD, %"):
        pairs[title] = 100 * (pairs[title] / pairs[f"{title} before"] - 1)
    groups = pairs.groupby(["experiment", "epochs", "row", choice])
    table = groups[["reconstruction, %", "FAD, %"]].agg(signed)
    table = table.assign(**{"FAD through": groups["FAD through"].first()}, pairs=groups.size())
    table = table.droplevel(["experiment", "epochs"]).rename_axis(["experiment", choice])
    return table.rename("`{}`".format, level=choice).reset_index().astype(str)


def signed(change: pd.Series) -> str:
    text = Column("", 1, 1).text(change)
    return text if text.startswith("-") else f"+{text}"


@makes_table
def start_map() -> pd.DataFrame:
    """How many starts end near the best: of all neurons with the same data, and of each neuron."""
    rows = pd.read_csv(RESULTS / "maps" / "start_map.csv", dtype=str, keep_default_na=False)
    rows = rows.rename(columns=lambda key: key.rpartition(".")[2])
    rows = rows.replace({"dataset": {"image_folder": "cifar10"}}).astype({"accuracy": float})
    rows["neuron"] = pd.Categorical(rows["neuron"], NEURONS, ordered=True)
    by_map = ["dataset", "norm", "calibrate", "neuron"]
    cells = 100 * rows.groupby([*by_map, "tau", "v_threshold"], observed=True)["accuracy"].mean()
    table = pd.DataFrame(index=cells.groupby(by_map, observed=True).size().index)
    table["best, accuracy in %"] = cells.groupby(by_map, observed=True).max().map("{:.2f}".format)
    for title, group in (("near the best of all", by_map[:-1]), ("near its own best", by_map)):
        near = cells >= cells.groupby(group, observed=True).transform("max") - NEAR_BEST
        counts = near.groupby(by_map, observed=True).agg(["sum", "size"]).astype(str)
        table[title] = counts["sum"] + " of " + counts["size"]
    return table.reset_index()


@makes_table
def classes() -> pd.DataFrame:
    """The share of images that are read as their class, and FAD as published, of each class."""
    rows = pd.read_csv(RESULTS / "classes.csv")
    keys = ["dataset", "class", "images"]
    # Test and training images are the same whatever the fit.
    groups = rows.drop_duplicates([*keys, "draw", "read", "fad"]).groupby(keys, sort=False)
    read = groups["read"].agg(Column("", 0.01, 1).text).unstack(fill_value="", sort=False)
    fad = groups["fad"].agg(Column("", 1, 2).text).unstack(fill_value="", sort=False)
    columns = {
        "test images read, % ↑": read["test images"],
        "reconstructions read ↑": read["reconstructions"],
        "samples read ↑": read["samples"],
        "FAD of training images ↓": fad["training images"],
        "of reconstructions ↓": fad["reconstructions"],
        "of samples ↓": fad["samples"],
    }
    return pd.DataFrame(columns).reset_index()


@makes_table
def recipes() -> str:
    """A table for each experiment, over seeds."""
    sections = []
    for name in experiments():
        config = (ROOT / "conf" / "experiment" / f"{name}.yaml").read_text(encoding="utf-8")
        comment = "\n".join(re.findall(r"^# ([^@].*)", config, re.M))
        sections.append(f"### `{name}`\n\n{comment}\n\n{markdown(summary(load_runs(name)))}")
    return "\n".join(sections)


@makes_table
def models() -> pd.DataFrame:
    """The models that come with the package, with the metrics of each card."""
    rows = []
    for name in list_models():
        metrics = read_config(name)["metrics"]
        size = (ROOT / "sj_taid" / "pretrained" / name / WEIGHTS).stat().st_size
        shown = format_metrics({key: metrics[key] for key in ON_CARD if key in metrics})
        row = {
            "name": f"`{name}`",
            "data": metrics["choices"]["dataset"],
            "decoder": metrics["choices"].get("decoder") or "",
            "parameters, M": f"{metrics['parameters'] / 1e6:.2f}",
            "MB": f"{size / 1e6:.2f}",
            "metrics": "; ".join(map(" ".join, shown.values())),
        }
        rows.append(row)
    return pd.DataFrame(rows)


#: neurons of :func:`integer_runs` by their choices
INTEGER = {
    ("lif", "default"): "LIF, four steps",
    ("alif", "false"): "integer, one step, threshold fixed",
    ("alif", "default"): "integer, one step, threshold learned",
}


def integer_runs() -> pd.DataFrame:
    """Runs of a classifier with LIF in four steps, or integer neurons in one."""
    choices = ("neuron", "surrogate", "neuron_start.v_reset", "model.T", "trainer.accelerator")
    learned = ("neuron.learn_tau", "neuron.learn_threshold")
    given = ("dataset", "dataset.num_workers")
    runs = load_frame(["cifar10_classifier_cpu"], *choices, *learned, *given)
    runs = runs[runs["trainer.accelerator"] == "cpu"]  # the others are another comparison's
    kinds = zip(runs["neuron"], runs["neuron.learn_threshold"], strict=True)
    return runs.assign(neuron=[INTEGER[kind] for kind in kinds])


@makes_table
def integer_neurons() -> pd.DataFrame:
    """Integer neurons in one step against LIF in four, and their net's step with accelerate."""
    runs, rows = integer_runs(), []
    steps = pd.read_csv(AVX2 / "integer.csv").set_index("system")
    for name in INTEGER.values():
        part = runs[runs["neuron"] == name]
        step = steps.loc["LIF, accelerate" if "LIF" in name else "integer LIF, accelerate"]
        spikes = part["firing_rate"] * (4 if "four" in name else 1)
        row = {
            "neuron": name,
            METRICS["accuracy"].title: METRICS["accuracy"].text(part["accuracy"]),
            "spikes per neuron": Column("", 1, 2).text(spikes),
            COSTS["energy"].title: COSTS["energy"].text(part["energy"]),
            "MB per sample": f"{step['mb_per_sample']:.2f}",
            "step, ms": f"{step['median_ms']:.0f}",
        }
        rows.append(row)
    return pd.DataFrame(rows)


# ---- benchmarks ----


def frontier() -> pd.DataFrame:
    """Training steps of whole nets; bfloat16 and ``torch.compile`` from the machine with AVX-512.

    ``neuron`` is what makes the step; ``share`` is the peak of a sample over that of SpikingJelly's
    PLIF on the same machine.
    """
    tables, case = [], ["net", "dtype", "T", "batch"]
    for folder in (AVX2, EPYC):
        rows = pd.read_csv(folder / "frontier.csv")
        rivals = rows.query("neuron == 'PLIF' and system == 'SpikingJelly'").set_index(case)
        rows = rows.join(rivals["mb_per_sample"].rename("rival"), on=case)
        tables.append(rows.assign(share=rows["mb_per_sample"] / rows["rival"]))
    rows = pd.concat(tables).drop_duplicates([*case, "neuron", "system"])
    rows = rows.sort_values(["dtype", "neuron", "system"], ascending=[False, True, True])
    is_theirs = rows["system"] == "SpikingJelly"
    first = rows["system"].where(is_theirs, rows["neuron"])
    last = rows["neuron"].where(is_theirs, rows["system"])
    return rows.assign(neuron=first.str.cat(last, sep=" "))


@makes_table
def memory() -> pd.DataFrame:
    """Peak bytes per sample and time of a step over those of SpikingJelly's PLIF, T = 8."""
    rows = frontier().query("T == 8")
    size = rows["share"].map("{:.2f}".format)
    rows = rows.assign(cell=size.str.cat(rows["time_ratio"].map("{:.2f}".format), sep=" / "))
    table = rows.pivot(index=["dtype", "neuron"], columns="net", values="cell")
    order = rows[["dtype", "neuron"]].drop_duplicates()
    return table.loc[[*order.itertuples(index=False, name=None)]].fillna("").reset_index()


def read_zoo() -> pd.DataFrame:
    return pd.read_csv(AVX2 / "zoo.csv", keep_default_na=False)


@makes_table
def zoo() -> pd.DataFrame:
    """What is fused in the nets of both zoos, and the bytes held after a forward."""
    rows = read_zoo()
    columns = {
        "written": rows["written"],
        "net": rows["net"],
        "norms fused": [f"{row.fused} of {row.norms}" for row in rows.itertuples()],
        "the others are read by": rows["left"],
        "MB before": rows["before_mb"].map("{:.3g}".format),
        "after": rows["after_mb"].map("{:.3g}".format),
        "ratio": (rows["after_mb"] / rows["before_mb"]).map("{:.2f}".format),
    }
    return pd.DataFrame(columns).astype(str)


@makes_table
def neurons() -> pd.DataFrame:
    """Milliseconds of the largest layer, without and with its memory reused."""
    files = {"given back": "neuron.csv", "reused": "neuron-reused-memory.csv"}
    tables = {memory: pd.read_csv(EPYC / name) for memory, name in files.items()}
    rows = pd.concat(tables, names=["freed memory"]).reset_index("freed memory")
    rows = rows[(rows["N"] == rows["N"].max()) & (rows["T"] >= 8)]
    table = rows.pivot(index=["freed memory", "T"], columns="neuron", values="median_ms")
    table["PLIF / ALIF numba"] = table[PLIF] / table["ALIF numba"]
    return table.map("{:.1f}".format).reset_index()


@makes_table
def host_layers() -> pd.DataFrame:
    """CPU time of small and large layers and of operations on spikes, relative to their rivals'."""
    rows = _host()
    rows = rows[~rows["what"].str.contains(":")]
    columns = {
        "what": rows["what"],
        "[T, N, C, H, W]": rows["shape"],
        "system": rows["system"],
        "CPU ms": (rows["cpu_us"] / 1e3).map("{:.3g}".format),
        "of plain's": rows["cpu_ratio"].map("{:.2f}".format),
    }
    return pd.DataFrame(columns)


@makes_table
def host_nets() -> pd.DataFrame:
    """CPU time of nets, accelerated, relative to the plain nets'."""
    rows = _host().query("system == 'accelerate'")
    parts = rows["what"].str.partition(": ")
    rows = rows.assign(net=parts[0], does=parts[2]).query("does != ''")
    table = rows.pivot(index="net", columns="does", values="cpu_ratio")
    table.loc["median"] = table.median()
    return table.map("{:.2f}".format).rename_axis(None, axis="columns").reset_index()


def _host() -> pd.DataFrame:
    return pd.read_csv(AVX2 / "host.csv")


if __name__ == "__main__":
    main()
