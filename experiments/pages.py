"""Fill the tables of README.md, RESULTS.md, results/README.md and docs/: ``make tables``.

    python experiments/pages.py [FOLDER ...]

Finished runs of experiments below the folders are first copied into results/. What TABLES has by
its name fills a table between ``<!-- table: NAME -->`` and ``<!-- end -->`` from the runs in
results/ and the CSVs in experiments/benchmark/results/, or by trying: no number is copied by hand.
"""

import argparse
import inspect
import json
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.figure import Figure
from spikingjelly.activation_based import neuron
from torch import nn

from sj_taid._internal import compat
from sj_taid.data.image import Torchvision
from sj_taid.ops.step.program import NotRead
from sj_taid.ops.step.record import Neuron, Notes
from sj_taid.pretrained import list_models, read_config
from sj_taid.training import compare
from sj_taid.training.compare import METRICS, Column, Metrics, frame, markdown, overrides, summary
from sj_taid.training.config import folder_name, key_of
from sj_taid.training.files import atomic_write
from sj_taid.training.plot import save

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"
PAGES = [ROOT / "README.md", ROOT / "RESULTS.md", RESULTS / "README.md"]
PAGES += sorted((ROOT / "docs").glob("*.md"))
BENCHMARKS = ROOT / "experiments" / "benchmark" / "results"
EPYC = BENCHMARKS / "epyc-2-cores"
DATASETS = {
    "mnist": "MNIST",
    "fashion_mnist": "Fashion-MNIST",
    "cifar10": "CIFAR10",
    "celeba": "CelebA",
}
#: Our samples by prior, what a perfect prior would draw, and training images in place of samples,
#: each with the ending of its metrics.
OURS = {
    "our ESVAE, flow prior": "",
    "our ESVAE, learned prior": "_learned",
    "training images' rates, decoded": "_perfect",
    "training images": "_floor",
}
#: A metric of stored runs alone.
STORED = {"fad_published_median": Column("FAD as published, median of draws ↓", 1, 2)}
METRICS.update(STORED)
compare.COLUMNS.update(STORED)
#: What changes no net: where images lie, and what no config has any more.
UNTOLD = {"dataset.root", "dataset.test_root", "metric.published_autoencoders", "metric.features"}
#: Where the images of ``dataset=image_folder`` were, by the beginnings of experiments' names.
FOLDERS = {"cifar10": "cifar10", "celeba": "faces"}
#: The metrics in the list of models.
ON_CARD = ("accuracy", "reconstruction", "fad", "fad_published_median", "fad_recall")
#: The choices of the generators that are compared; they differ in decoder and neuron alone.
CHOICES = [
    *("decoder", "neuron", "dataset", "dataset.batch_size", "dataset.image_size"),
    *("dataset.limit", "dataset.num_workers", "trainer.max_epochs", "trainer.precision"),
    "trainer.check_val_every_n_epoch",
]
#: What runs share that are compared with each other.
BUDGET = ["experiment", "epochs", "dataset.limit", "trainer.precision"]
PRECISIONS = {"default": "float32", "bf16-mixed": "bfloat16"}
#: The groups that a table names where all its rows have one choice.
SHOWN = ("dataset", "model", "decoder", "neuron", "surrogate", "loss", "optimizer")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Fill the tables of the pages from results.")
    parser.add_argument("folders", nargs="*", type=Path, help="folders that hold runs to store")
    options = parser.parse_args(arguments)
    if options.folders:
        print(*store(compare.gather(options.folders)), sep="\n")
    for page in PAGES:
        with atomic_write(page) as temporary:
            temporary.write_text(fill(page), encoding="utf-8")
    save(energy(), ROOT / "docs" / "images" / "energy.png")
    draw_rivals(ROOT / "docs" / "images" / "memory-time.png")


#: whose bars README shows, by their names in the CSV, and their colours
RIVALS = {
    "SpikingJelly": ("plain", "0.75"),
    "memopt 1": ("SpikingJelly's memopt, level 1", "tab:orange"),
    "accelerate": ("accelerate", "tab:blue"),
    "accelerate + memopt 1": ("both", "tab:green"),
}


def rivals() -> pd.DataFrame:
    """Bytes and time of a step of LIF nets over the plain net's, by net and system."""
    rows = frontier().query("dtype == 'float32' and T == 8 and neuron == 'LIF'")
    rows = rows.set_index(["net", "system"])[["mb_per_sample", "median_ms"]].unstack()
    for metric in ("mb_per_sample", "median_ms"):
        rows[metric] = rows[metric].div(rows[metric]["SpikingJelly"], axis="index")
    return rows


def draw_rivals(path: Path) -> None:
    """Draw :func:`rivals` as bars."""
    titles = {"mb_per_sample": "peak bytes per sample", "median_ms": "time of a training step"}
    table = rivals()
    figure, axes = plt.subplots(1, 2, figsize=(9, 2.9), sharey=True, layout="constrained")
    for plot, (metric, title) in zip(axes, titles.items(), strict=True):
        for k, (system, (label, colour)) in enumerate(RIVALS.items()):
            places = [place + 0.2 * k for place in range(len(table))]
            bars = plot.barh(places, table[metric][system], 0.19, color=colour, label=label)
            plot.bar_label(bars, fmt="%.2f", fontsize=7, padding=2)
        plot.set(title=f"{title}, plain = 1", xlim=(0, 1.8))
        plot.set_yticks([place + 0.3 for place in range(len(table))], table.index)
        plot.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def energy() -> Figure:
    """Bars of the energy of an image by layer, a colour for each of two classifiers."""
    rows = pd.read_csv(RESULTS / "energy.csv").query("nj > 0")
    figure = Figure((7, 3.6), layout="tight")
    axis = figure.subplots()
    sums = rows.groupby("net", sort=False)["nj"].transform("sum") / 1e3
    names = rows["net"].replace(r"(counts .*)", r"\1, fixed threshold", regex=True)
    names += (100 * rows["accuracy"]).map(": {:.1f} % right, ".format)
    names += sums.map("{:.2f} µJ in all".format)
    table = rows.assign(net=names).pivot_table("nj", "layer", "net", sort=False)
    table.plot.bar(ax=axis, rot=20)
    axis.set(xlabel="", ylabel="energy of an image, nJ")
    axis.legend(title=None)
    return figure


def store(finished: Mapping[Path, Metrics], results: Path = RESULTS) -> Iterator[str]:
    """Copy the metrics of experiments' runs into results; yields a line for each."""
    for folder, metrics in finished.items():
        words = shlex.split(metrics["command"])
        command = shlex.join(word for word in words if key_of(word) not in UNTOLD)
        metrics = metrics | {"overrides": told(metrics), "command": command}
        choices = overrides(metrics) | {"seed": str(metrics["seed"])}
        experiment = choices.pop("experiment", "")
        if not experiment:
            yield f"not stored: {folder} (it is no run of experiment=...)"
            continue
        name = folder_name(",".join(sorted(f"{key}={value}" for key, value in choices.items())))
        path = results / "runs" / experiment / f"{name}.json"
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
        yield f"stored: {path}"


def fill(page: Path) -> str:
    """The text of a page, with its tables up to date."""

    def make(found: re.Match[str]) -> str:
        made = TABLES[found[2]]()
        if made is None:
            return found[0]
        if isinstance(made, pd.DataFrame):
            made = markdown(made.replace({"dataset": DATASETS}))
        return f"{found[1]}\n{made}\n{found[3]}"

    table = r"(?s)(<!-- table: (\w+) -->\n).*?(<!-- end -->)"
    return re.sub(table, make, page.read_text(encoding="utf-8"))


def load_runs(experiment: str, results: Path = RESULTS) -> list[Metrics]:
    """The metrics of an experiment's runs."""
    paths = sorted((results / "runs" / experiment).glob("*.json"))
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    for run in runs:
        run["overrides"] = told(run)
    return runs


def told(run: Metrics) -> list[str]:
    """What a run chose on the command line, without what changes no net."""
    return [word for word in run["overrides"] if key_of(word) not in UNTOLD]


def experiments() -> list[str]:
    """The names of the experiments that have runs."""
    return sorted(path.name for path in (RESULTS / "runs").iterdir())


def load_frame(names: Sequence[str], *keys: str) -> pd.DataFrame:
    """The runs of experiments with no choice on the command line beyond ``keys`` and the seed."""
    runs, known = chain(*map(load_runs, names)), {"experiment", "seed", *keys}
    return frame([run for run in runs if overrides(run).keys() <= known])[0]


def gains() -> pd.DataFrame:
    """Memory, time and quality, each with SpikingJelly's LIF or FSVAE's image decoder before."""
    steps = frontier().query("net == 'sew_resnet18' and dtype == 'float32' and T == 8")
    steps = steps.set_index(["step", "T"])
    held = read_csv("zoo").set_index("net").loc[["Spikformer"]]
    held = 1e3 * pd.concat({name: held[f"{name}_mb"] for name in ("before", "after")})
    sew = "SEW-ResNet-18, T = 8, 64 x 64, batch of 8"
    published = "Spikformer as published, of width 16, T = 4, 32 x 32, batch of 2"
    alone = pd.read_csv(RESULTS / "image_decoders.csv").rename(columns={"error": "reconstruction"})
    digits = "FSVAE of digits, T = 8", decoded("digits_small_cpu")
    small = "autoencoder of digits, T = 8", alone.assign(neuron="lif")
    read = frame(load_runs("mnist_classifier_cpu"))[0].set_index(["neuron", "seed"])
    mnist = f"classifier of MNIST, T = 4, {read['epochs'].max()} epochs"
    lif = "LIF", "LIF accelerate"
    rows = [
        gain("`accelerate`: MB per sample", sew, steps["mb_per_sample"], *lif),
        gain("`accelerate`: ms of a training step", sew, steps["median_ms"], *lif),
        gain("`accelerate`: kB kept for backward", published, held, "before", "after"),
        *fsvae_gains(),
        decoder_gain("`TAID`", *digits, "taid"),
        decoder_gain("weights times 0.25", *digits, "fixed, 0.25"),
        decoder_gain("`TAID`", "ESVAE of faces, T = 8", decoded("celeba_esvae_cpu"), "taid"),
        decoder_gain("`TAID`", *small, "taid"),
        decoder_gain("plain mean over time", *small, "mean over time"),
        gain("`ALIFNode`: accuracy, %", mnist, read["accuracy"], "lif", "alif"),
    ]
    table = pd.DataFrame(rows).fillna("")
    return table[[*table.columns.drop("seeds"), "seeds"]]


def fsvae_gains() -> Iterator[dict[str, str]]:
    """Rows of :func:`gains`: FSVAE on MNIST, for each budget that has runs, most epochs first."""
    paper = pd.read_csv(RESULTS / "published.csv").query("row == 'FSVAE' and metric == 'epochs'")
    published = f"of {paper['value'].max():g} "
    names = {"taid": "`TAID`", "fixed, 0.0625, decay 1": "plain mean over time"}
    names |= {"fixed, 0.07": "weights times 0.07"}
    budgets = [*load_decoders(["fsvae"]).groupby(BUDGET)]
    for (_, _, limit, precision), runs in reversed(budgets):
        images = limit or f"{Torchvision.sources['MNIST'][0]:,} images"
        for name, what in names.items():
            if name in [*runs["decoder"]]:
                net = f"FSVAE of MNIST, {images}, T = 16, {precision}"
                yield decoder_gain(what, net, runs, name, published)


def decoded(experiment: str) -> pd.DataFrame:
    """The shortest runs of an experiment."""
    runs = load_decoders([experiment])
    return runs[runs["epochs"] == runs["epochs"].min()]


def load_decoders(names: Sequence[str]) -> pd.DataFrame:
    """Runs of experiments; ``decoder`` tells other weights of the fixed one apart."""
    runs = load_frame(names, *CHOICES, "decoder.scale", "decoder.decay")
    options = {"decoder.scale": ", {:g}", "decoder.decay": ", decay {:g}"}
    for key in {*BUDGET, *options} - {*runs}:
        runs[key] = "default"
    for key, text in options.items():
        given = runs[key] != "default"
        runs.loc[given, "decoder"] += runs.loc[given, key].astype(float).map(text.format)
    limits = runs["dataset.limit"].replace("default", "0").astype(int)
    runs["dataset.limit"] = limits.map("{:,} images".format).where(limits > 0, "")
    return runs.replace({"trainer.precision": PRECISIONS})


def decoder_gain(
    what: str, net: str, runs: pd.DataFrame, name: str, published: str = ""
) -> dict[str, str]:
    """A row of :func:`gains`: the error of an image decoder, with both FAD beside it."""
    values = runs.set_index(["decoder", "neuron", "seed"])
    ours = runs[runs["decoder"] == name]
    neurons = ", ".join(ours["neuron"].str.upper().unique())
    net = f"{net}, {neurons}, {ours['epochs'].max()} {published}epochs"
    row = gain(f"{what}: error", net, values["reconstruction"], "fixed", name)
    for fad, title in (("fad", "own FAD"), ("fad_published", "FAD as published")):
        if fad in values:
            measured = medians(values, fad).dropna()
            fads = gain("", "", measured, "fixed", name)
            few = f" ({fads['seeds'] or 1} pair)" if fads["seeds"] != row["seeds"] else ""
            row[title] = fads["gain"] + few
    return row


def gain(what: str, net: str, values: pd.Series, theirs: str, ours: str) -> dict[str, str]:
    """A row of :func:`gains`: values by kind and seed of ``theirs``, of ``ours``, their change."""
    before, after = values[theirs].align(values[ours], join="inner")
    column = METRICS["reconstruction"] if "error" in what else Column("", 1, 0)
    change = signed(100 * (after / before - 1), 0) + " %"
    if "accuracy" in what:
        column = METRICS["accuracy"]
        change = signed((after - before) / column.unit, 2)
    row = {"what": what, "net": net, "before": column.text(before), "after": column.text(after)}
    return row | {"gain": change, "seeds": str(len(after)) if len(after) > 1 else ""}


def medians(runs: pd.DataFrame, metric: str, ending: str = "") -> pd.Series:
    """A metric, the median of a run's draws where it has several."""
    values = runs[f"{metric}{ending}"]
    return runs.get(f"{metric}_median{ending}", values).fillna(values)


def generators() -> pd.DataFrame:
    """FAD as published of the papers' generators and of our longest runs, with what is known."""
    published = pd.read_csv(RESULTS / "published.csv").query("task == 'generation'")
    fads = published.query("metric == 'fad_published'")
    papers = fads.pivot(index=["row", "source"], columns="dataset", values="value")
    table = papers.map("{:g}".format).replace("nan", "").reset_index("source")
    epochs = published.query("metric == 'epochs'").groupby("row")["value"].max()
    table["epochs"] = epochs.map("{:g}".format)
    runs = load_frame([f"{name}_esvae_sharper" for name in DATASETS], *CHOICES)
    runs = runs.query("neuron == 'alif' and epochs == epochs.max()")
    for name, ending in OURS.items():
        groups = medians(runs, "fad_published", ending).groupby(runs["dataset"])
        values = {dataset: METRICS["fad_published"].text(part) for dataset, part in groups}
        table.loc[name] = {"source": "this project", **values}
        if name.startswith("our"):
            millions = f"{runs['parameters'].max() / 1e6:.1f}"
            costs = {"epochs": f"{runs['epochs'].max():g}", "parameters, M": millions}
            table.loc[name, [*costs]] = [*costs.values()]
    cards = [read_config(name)["metrics"] for name in list_models()]
    for name, metric in (("samples", "fad_published_median"), ("rates", "fad_published_perfect")):
        values = {c["choices"]["dataset"]: f"{c[metric]:.2f}" for c in cards if metric in c}
        table.loc[f"the package's ESVAE, {name}"] = {"source": "this project", **values}
    for name, dataset, fads in judged():
        table.loc[name, [dataset, "source"]] = METRICS["fad_published"].text(fads), "this project"
    shown = (
        table[[*DATASETS, "epochs", "parameters, M", "source"]].rename(columns=DATASETS).fillna("")
    )
    return shown.rename_axis("FAD as published ↓", axis="index").reset_index()


def judged() -> Iterator[tuple[str, str, pd.Series]]:
    """FAD from one half of the test images of the model that is nearest to the other, by data set.

    And of training images; each row's name, its data set and its draws.
    """
    for dataset, rows in pd.read_csv(RESULTS / "halves.csv").groupby("dataset"):
        parts = rows.set_index(["images", "of"])["fad"]
        means = parts["A"].groupby("of").mean().drop("training images")
        kinds = {"the package's ESVAE": means.idxmin(), "training images": "training images"}
        for name, of in kinds.items():
            yield f"{name}, by half the test images", str(dataset), parts["B", of]


def decoders() -> pd.DataFrame:
    """The generators' changes in % against the fixed decoder, over pairs of one neuron and seed."""
    runs = load_decoders(experiments()).dropna(subset="reconstruction")
    runs = runs.assign(**{metric: medians(runs, metric) for metric in ("fad", "fad_published")})
    plain, others = (part for _, part in runs.groupby(runs["decoder"] != "fixed"))
    keys = [*BUDGET, "seed", "neuron"]
    pairs = others.merge(plain, on=keys, suffixes=("", " before"), validate="many_to_one")
    titles = {"reconstruction": "error, %", "fad": "own FAD, %", "fad_published": "FAD, %"}
    for metric, title in titles.items():
        pairs[title] = 100 * (pairs[metric] / pairs[f"{metric} before"] - 1)
    other = pairs["fad protocol"] != pairs["fad protocol before"]
    pairs.loc[other, "own FAD, %"] = float("nan")
    groups = pairs.groupby([*BUDGET, "decoder"])
    neurons = groups["neuron"].agg(lambda of: ", ".join(sorted({*of.str.upper()})))
    table = groups[[*titles.values()]].agg(signed).assign(neuron=neurons, pairs=groups.size())
    table = table.reset_index().astype(str)
    for key, usual in (("dataset.limit", ""), ("trainer.precision", "float32")):
        table["epochs"] += (", " + table[key]).where(table[key] != usual, "")
    return table[["experiment", "epochs", "neuron", "decoder", *titles.values(), "pairs"]]


def attention_rates() -> pd.DataFrame:
    """Training loss of the third epoch by image decoder and learning rate."""
    rows = pd.read_csv(RESULTS / "attention_rates.csv", dtype={"lr": str})
    losses = rows.pivot(index="decoder", columns="lr", values="loss").map("{:.4f}".format)
    losses["taken"] = rows.loc[rows.groupby("decoder")["loss"].idxmin()].set_index("decoder")["lr"]
    return losses[["5e-4", "1e-3", "2e-3", "taken"]].reset_index()


def attention_runs() -> pd.DataFrame | None:
    """Errors of the image decoders that are compared, by updates, and both FAD, over seeds."""
    rows = compared()
    if rows is None:
        return None
    errors = {f"error_{n}": f"{n:,} updates" for n in (500, 1000, 2000, 3000)}
    errors |= {"error_refitted": "refitted"}
    fads = {"fad": "own FAD", "fad_published": "FAD as published"}
    # Samples that are far from all images say nothing by how far they are.
    published = pd.read_csv(RESULTS / "published.csv").query(
        "row == 'FSVAE' and metric == 'fad_published' and dataset == 'mnist'"
    )
    rows.loc[rows["fad_published"] > 3 * published["value"].item(), [*fads]] = float("nan")
    groups = rows.groupby("decoder")
    texts = {
        title: groups[name].agg(METRICS["reconstruction"].text) for name, title in errors.items()
    }
    texts |= {title: groups[name].agg(METRICS[name].text) for name, title in fads.items()}
    return pd.DataFrame(texts).assign(seeds=groups.size()).reset_index()


def attention_verdicts() -> pd.DataFrame | None:
    """The image decoders' errors against each other's, by the rule that RESULTS has."""
    rows = compared()
    if rows is None:
        return None
    tables = []
    for metric, title in (("error_3000", "3,000 updates"), ("error_refitted", "refitted")):
        values = rows.pivot(index="seed", columns="decoder", values=metric)
        table = pd.DataFrame(
            {f"than {b}": {a: verdict(values[a], values[b]) for a in values} for b in values}
        )
        table.insert(0, "error", title)
        tables.append(table.rename_axis("decoder").reset_index())
    return pd.concat(tables)


def compared() -> pd.DataFrame | None:
    """The runs of ``experiments/attention.py``, as soon as there are any."""
    path = RESULTS / "attention_runs.csv"
    return pd.read_csv(path) if path.exists() else None


def verdict(ours: pd.Series, theirs: pd.Series, seeds: int = 3) -> str:
    """Whether errors are better or worse: one sign in all seeds, and more than 5 % in the mean."""
    if ours.name == theirs.name:
        return ""
    changes = 100 * (ours / theirs - 1).dropna()
    if len(changes) < seeds:
        return f"{len(changes)} of {seeds} runs"
    mean = 100 * (ours.mean() / theirs.mean() - 1)
    if abs(mean) > 5 and changes.lt(0).nunique() == 1:
        return f"{'better' if mean < 0 else 'worse'}, {mean:+.0f} %"
    return f"no difference, {mean:+.0f} %"


def signed(change: pd.Series, decimals: int = 1) -> str:
    text = Column("", 1, decimals).text(change)
    return text if text.startswith("-") or not text else f"+{text}"


def start_map() -> pd.DataFrame:
    """How many starts end near the best: of all neurons with the same data, and of each neuron."""
    rows = pd.read_csv(RESULTS / "maps" / "start_map.csv", dtype=str, keep_default_na=False)
    rows = rows.rename(columns=lambda key: key.rpartition(".")[2])
    rows = rows.replace({"dataset": {"image_folder": "cifar10"}}).astype({"accuracy": float})
    by_map = ["dataset", "norm", "calibrate", "neuron"]
    cells = 100 * rows.groupby([*by_map, "tau", "v_threshold"])["accuracy"].mean()
    table = pd.DataFrame(index=cells.groupby(by_map).size().index)
    table["best, accuracy in %"] = cells.groupby(by_map).max().map("{:.2f}".format)
    for title, group in (("near the best of all", by_map[:-1]), ("near its own best", by_map)):
        near = cells >= cells.groupby(group).transform("max") - 2.0
        counts = near.groupby(by_map).agg(["sum", "size"]).astype(str)
        table[title] = counts["sum"] + " of " + counts["size"]
    return table.reset_index()


def classes() -> pd.DataFrame:
    """The share of images that are read as their class, and FAD as published, of each class."""
    rows, keys = pd.read_csv(RESULTS / "classes.csv"), ["dataset", "class", "images"]
    # Test and training images are the same whatever the fit.
    groups = rows.drop_duplicates([*keys, "draw", "read", "fad"]).groupby(keys, sort=False)
    shown = {"read, %": ("read", Column("", 0.01, 1)), "FAD": ("fad", Column("", 1, 2))}
    parts = (groups[n].agg(c.text).rename(title) for title, (n, c) in shown.items())
    table = pd.concat(parts, axis=1).unstack(fill_value="", sort=False)
    table.columns = [f"{images}: {title}" for title, images in table.columns]
    return table.drop(columns="test images: FAD").reset_index()


def recipes() -> str:
    """A table for each experiment, over seeds, with the command and the choices of all its rows."""
    sections = []
    for name in experiments():
        runs = load_runs(name)
        comment, words = recipe(name)
        given = [choices_of(name, run) for run in runs]
        shared = [word for word in given[0] if all(word in others for others in given)]
        line = shlex.join(join(words, shared))
        kinds = {key: {run["choices"].get(key) for run in runs} - {None} for key in SHOWN}
        common = [f"{key} {kind.pop()}" for key, kind in kinds.items() if len(kind) == 1]
        common += sorted({run["machine"] for run in runs})
        if not all(run.get("protocol") for run in runs):
            common.append("no protocol stored")
        sections.append(
            f"### `{name}`\n\n{comment}\n\n{markdown(summary(runs))}\n"
            f"`sj-taid train {line}`\n\nCommon to all rows: {'; '.join(common)}.\n"
        )
    return "\n".join(sections)


def recipe(name: str) -> tuple[str, list[str]]:
    """What an experiment is, and the command line of today's configs that chooses it."""
    gone = pd.read_csv(RESULTS / "recipes.csv", index_col="experiment")
    if name in gone.index:
        row = gone.loc[name]
        return row["description"], shlex.split(row["command"].removeprefix("-m "))
    config = (ROOT / "conf" / "experiment" / f"{name}.yaml").read_text(encoding="utf-8")
    return "\n".join(re.findall(r"^# ([^@].*)", config, re.M)), [f"experiment={name}"]


def choices_of(name: str, run: Metrics) -> list[str]:
    """What an experiment's run chose besides it, with the folders of its images."""
    given = [word for word in run["overrides"] if key_of(word) != "experiment"]
    if "dataset=image_folder" in given:
        folder = next(folder for start, folder in FOLDERS.items() if name.startswith(start))
        given += [f"dataset.root={folder}/train", f"dataset.test_root={folder}/test"]
    return given


def join(words: Sequence[str], later: Sequence[str]) -> list[str]:
    """A command line with further words, which replace those of their keys."""
    keys = {key_of(word) for word in later}
    return [word for word in words if key_of(word) not in keys] + [*later]


def models() -> pd.DataFrame:
    """The models that come with the package, with the metrics of each card."""
    rows = []
    for name in list_models():
        card = read_config(name)["metrics"]
        shown = compare.format_metrics({key: card[key] for key in ON_CARD if key in card})
        row = {"name": f"`{name}`", "decoder": card["choices"]["decoder"] or ""}
        rows.append(row | dict(shown.values()))
    return pd.DataFrame(rows).fillna("")


def read_csv(name: str) -> pd.DataFrame:
    return pd.read_csv(EPYC / f"{name}.csv", keep_default_na=False)


def show(name: str, columns: str, query: str = "index >= 0") -> pd.DataFrame:
    """Columns of a benchmark's CSV."""
    rows = read_csv(name).query(query)[columns.split()]
    return rows.map(lambda value: f"{value:,.2f}" if isinstance(value, float) else str(value))


def frontier() -> pd.DataFrame:
    """Steps of whole nets."""
    rows = read_csv("frontier")
    rows["step"] = (rows["neuron"] + " " + rows["system"]).str.removesuffix(" SpikingJelly")
    return rows


def memory() -> pd.DataFrame:
    """Peak bytes per sample and time of a step over those of SpikingJelly's PLIF, T = 8."""
    rows = frontier().query("T == 8")
    size, took = (rows[ratio].map("{:.2f}".format) for ratio in ("mb_ratio", "time_ratio"))
    rows = rows.assign(cell=size + " / " + took)
    table = rows.pivot(index=["dtype", "step"], columns="net", values="cell").fillna("")
    return table.sort_index(ascending=[False, True]).reset_index()


#: arguments that a neuron's constructor asks for
NEEDED: dict[str, dict[str, Any]] = {
    "LIAFNode": {"act": torch.relu, "threshold_related": True},
    "SimpleLIFNode": {"tau": 2.0, "decay_input": True},
    "MPBNBaseNode": {"out_features": 5},
    "MPBNLIFNode": {"out_features": 5},
}


def neurons_read() -> str | None:
    """Which of SpikingJelly 2.0.0's neurons are read on a CPU; ``None`` on other versions."""
    if version("spikingjelly") != "2.0.0":
        return None
    groups: dict[tuple[str, str], list[str]] = {}
    for name, kind in sorted(vars(neuron).items()):
        if inspect.isclass(kind) and issubclass(kind, nn.Module):
            groups.setdefault(read_neuron(kind), []).append(name)
    rows = [("outputs", "saved", "neurons"), ("---",) * 3]
    rows += sorted((*key, ", ".join(names)) for key, names in groups.items())
    return "\n".join([*(f"| {' | '.join(row)} |" for row in rows), ""])


def read_neuron(kind: Any) -> tuple[str, str]:
    """How equal a class's outputs are on a CPU, and how they are saved; or why it is not read."""
    reason = (
        compat.why_not_stepwise(kind) if issubclass(kind, compat.NEURONS) else "it is no `BaseNode`"
    )
    if reason is None:
        node = kind(**NEEDED.get(kind.__name__, {}))
        try:
            reading = Neuron(node, compat.step_of(kind)).read((2, 5, 7), Notes())
        except NotRead as error:
            reason = f"its step {error}"
        else:
            saved = {0: "as they are", 1: "as bits"}.get(reading.levels, "in four bits")
            return f"equal to {'the bit' if reading.exact else 'rounding'}", saved
    return f"not read: {reason}".rstrip(": "), ""


#: the functions of the tables, by name
TABLES: dict[str, Callable[[], Any]] = {
    **{f.__name__: f for f in (gains, generators, decoders, start_map, classes, recipes)},
    **{f.__name__: f for f in (models, memory, neurons_read)},
    **{f.__name__: f for f in (attention_rates, attention_runs, attention_verdicts)},
    "taid": lambda: gains().query("net.str.contains('epochs') and what.str.contains('error')"),
    "zoo": partial(show, "zoo", "written net norms fused left before_mb after_mb ratio"),
    "host": partial(show, "host", "what shape system cpu_us cpu_ratio", "system != 'plain'"),
    "neurons": partial(
        show, "neuron-reused-memory", "T neuron median_ms", "T > 4 and N == N.max()"
    ),
}

if __name__ == "__main__":
    main()
