"""Fill the tables of README.md, RESULTS.md, results/README.md and docs/: ``make tables``.

    python experiments/pages.py [FOLDER ...]

Finished runs of experiments below the folders are first copied into results/. Each table stands
between ``<!-- table: NAME -->`` and ``<!-- end -->`` and is made of the runs in results/ and of the
CSVs in experiments/benchmark/results/, so no number is copied by hand.
"""

import argparse
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import pandas as pd
import start_maps
from store import FOLDERS, RESULTS, load_all_runs, load_runs, load_study, sort_key, store

from sj_taid.pretrained import WEIGHTS, list_models, read_config
from sj_taid.training.columns import COLUMNS, METRICS, Column, format_metrics
from sj_taid.training.files import atomic_write
from sj_taid.training.gather import gather, overrides
from sj_taid.training.tables import frame, markdown, present, summary

ROOT = RESULTS.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "RESULTS.md", "results/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
PRETRAINED = ROOT / "sj_taid" / "pretrained"
BENCHMARKS = ROOT / "experiments" / "benchmark" / "results"
EPYC = BENCHMARKS / "epyc-2-cores"
PLIF = "SpikingJelly PLIF"
DATASETS = {
    "mnist": "MNIST",
    "fashion_mnist": "Fashion-MNIST",
    "cifar10": "CIFAR10",
    "celeba": "CelebA",
}
#: The papers' spiking generators, and the plain VAE that the first of them was compared with.
MODELS = ["VAE", "FSVAE", "TAID", "ESVAE", "FSDDIM"]
#: Our best recipes: model, the priors it draws from, and the ending of the metrics of each.
RECIPES = {
    "esvae_sharp": ("ESVAE", {"mixture": ""}),
    "esvae_sharper": (
        "ESVAE, exact counts",
        {"flow": "", "mixture": "_mixture", "learned": "_learned"},
    ),
    "fsvae_sharp": ("FSVAE", {"learned": ""}),
}
BEST = "esvae_sharper"
#: What no generator, and no prior, can be expected to do better than.
BOUNDS = {"training images": "_floor", "training images' rates, decoded": "_perfect"}
#: The metrics in the list of models.
ON_CARD = ("accuracy", "reconstruction", "fad", "fad_published", "fad_published_recall")
#: The experiments with generators of several decoders or neurons
GENERATORS = [
    *("fsvae", "digits_small_cpu", "mnist_small_cpu", "mnist_fsvae_sharp"),
    *("fashion_mnist_fsvae_sharp", "cifar10_fsvae_cpu", "mnist_esvae_cpu"),
    *("fashion_mnist_esvae_cpu", "mnist_esvae_sharp", "fashion_mnist_esvae_sharp"),
    *("mnist_esvae_sharper", "fashion_mnist_esvae_sharper", "cifar10_esvae_cpu"),
]
#: The choices of their runs; those of one experiment differ in decoder and neuron alone
CHOICES = [
    *("decoder", "neuron", "dataset", "dataset.batch_size", "dataset.image_size"),
    *("dataset.num_workers", "trainer.max_epochs", "trainer.precision"),
]
#: The choices of the runs with and without losses
LOSSES = [
    *("dataset.limit", "trainer.max_epochs", "trainer.precision", "metric.draws"),
    *("metric.features", "feature_loss", "critic", "critic.warmup"),
]
#: The paper's comparisons: its metrics, and the experiment that repeats it in small
GENERATED = ("fad_published", "fid_published", "inception_score_published")
CLAIMS = {
    ("cifar10", "FSVAE", "TAID"): (GENERATED, "cifar10_fsvae_cpu"),
    ("celeba", "FSVAE", "TAID"): (GENERATED, ""),
    ("mnist", "PLIF", "ALIF"): (("accuracy_published",), "mnist_classifier_cpu"),
    ("cifar10", "PLIF", "ALIF"): (("accuracy_published",), "cifar10_classifier_cpu"),
}
#: The choice that makes a classifier's run one of protocol A or of B
VALIDATION = "dataset.validation"
DECODERS = {"fixed": "fixed decoder", "taid": "TAID", "taid_pixel": "TAID by pixel"}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="*", type=Path, help="folders that hold runs to store")
    options = parser.parse_args(arguments)
    if options.folders:
        finished, _ = gather(options.folders)
        print(*store(finished), sep="\n")
    start_maps.draw_all()
    for page in PAGES:
        with atomic_write(page) as temporary:
            temporary.write_text(fill(page), encoding="utf-8")


def fill(page: Path) -> str:
    """The text of a page, with its tables up to date."""

    def make(found: re.Match[str]) -> str:
        table = TABLES[found[2]]()
        if isinstance(table, pd.DataFrame):
            table = markdown(table.replace({"dataset": DATASETS}))
        return f"{found[1]}\n{table}\n{found[3]}"

    pattern = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
    return pattern.sub(make, page.read_text(encoding="utf-8"))


# ---- runs ----


def load_frame(names: Sequence[str], *keys: str) -> pd.DataFrame:
    """The runs of experiments with no choice on the command line beyond ``keys`` and the seed."""
    runs, known = chain(*map(load_runs, names)), {"experiment", "seed", *keys}
    return frame([run for run in runs if overrides(run).keys() <= known])[0]


def over_seeds(groups: Any, names: Sequence[str]) -> pd.DataFrame:
    """Mean and spread of metrics in each group of runs, under their titles."""
    table = groups.agg({name: METRICS[name].text for name in names})
    return table.rename(columns={name: METRICS[name].title for name in names})


def gains() -> pd.DataFrame:
    """Memory, time and quality before and after, and where each was measured."""
    pairs = norms().query("net == 'norm + neuron'")
    nets = frontier().query("net == 'sew_resnet18' and dtype == 'float32' and T == 16")
    decoders = load_frame(["fsvae"], *CHOICES).query("dataset == 'mnist'")
    classifiers = frame(load_runs("mnist_classifier_cpu"))[0]
    one = "ALIF, one operator"
    rows = [
        ("training step, MB per sample", nets, "mb_per_sample", PLIF, "PLIF accelerate"),
        ("training step, ms", nets, "median_ms", PLIF, "PLIF accelerate"),
        ("norm and neuron, ms", pairs, "median_ms", PLIF, one),
        ("FSVAE on MNIST, reconstruction error", decoders, "reconstruction", "fixed", "taid"),
        ("classifier on MNIST, accuracy in %", classifiers, "accuracy", "plif", "alif"),
    ]
    return pd.DataFrame([gain(*row) for row in rows])


def gain(what: str, table: pd.DataFrame, name: str, theirs: str, ours: str) -> dict[str, str]:
    """A row of :func:`gains`: ``name`` of the neuron or decoder ``theirs`` and of ``ours``."""
    column = METRICS.get(name, Column(what, 1, 0, spread=False))
    rows = table.set_index("decoder" if ours == "taid" else "neuron")
    before, after = rows.loc[[theirs], name], rows.loc[[ours], name]
    more, ratio = after.mean() - before.mean(), after.mean() / before.mean()
    return {
        "what": what,
        "before": f"{column.text(before)} ({theirs})",
        "after": f"{column.text(after)} ({ours})",
        "gain": f"{100 * (ratio - 1):.0f} %" if more < 0 else f"+{more / column.unit:.2f}",
        "on": " / ".join(rows.loc[[ours], "machine"].str.replace("(R)", "").unique()),
    }


def generators() -> pd.DataFrame:
    """FAD as published of the papers' generators and of our best."""
    rows = pd.read_csv(RESULTS / "published.csv").query("task == 'generation'")
    fads = rows[rows["metric"] == "fad_published"]
    papers = fads.pivot(index=["row", "source"], columns="dataset", values="value")
    table = papers.map("{:g}".format).replace("nan", "not reported").reset_index("source")
    epochs = rows[rows["metric"] == "epochs"].groupby("row")["value"].first()
    table = table.assign(epochs=epochs.map("{:g}".format)).fillna({"epochs": "not reported"})
    for recipe, (model, priors) in RECIPES.items():
        runs = recipe_runs(recipe)
        for (neuron, decoder), group in runs.groupby(["neuron", "decoder"]):
            counts = "/".join(map(str, sorted(group["epochs"].unique())))
            # Of other neurons than ALIF only the first, which samples are drawn from.
            for prior in priors if neuron == "alif" else [*priors][:1]:
                values = by_dataset(group, "fad_published", priors[prior])
                name = f"{model}, {neuron.upper()}, {DECODERS.get(decoder, decoder)}, {prior} prior"
                table.loc[name] = {"source": "this project, last epoch", "epochs": counts, **values}
    best = best_runs()
    for images, ending in BOUNDS.items():
        values = by_dataset(best, "fad_published", ending)
        table.loc[images] = {"source": "this project", "epochs": "", **values}
    table = table.fillna("not measured").loc[[*MODELS, *table.index.difference(MODELS)]]
    shown = table[[*DATASETS, "epochs", "source"]].rename(columns=DATASETS)
    return shown.rename_axis("FAD as published ↓", axis="index").reset_index()


def recipe_runs(recipe: str) -> pd.DataFrame:
    """The runs of a recipe on all data sets that differ in decoder, neuron and precision alone."""
    names = [f"{name}_{recipe}" for name in DATASETS]
    return load_frame(names, "decoder", "neuron", "trainer.precision")


def best_runs() -> pd.DataFrame:
    """The runs of the best recipe, whose models come with the package."""
    return recipe_runs(BEST).query("neuron == 'alif'")


def medians(runs: pd.DataFrame, metric: str, ending: str = "") -> pd.Series:
    """A metric, the median of a run's draws where it has several."""
    values = runs[f"{metric}{ending}"]
    return runs.get(f"{metric}_median{ending}", values).fillna(values)


def by_dataset(runs: pd.DataFrame, metric: str, ending: str) -> dict[str, str]:
    """The text of a metric on each data set."""
    groups = medians(runs, metric, ending).groupby(runs["dataset"])
    return {name: METRICS[metric].text(part) for name, part in groups}


def fad() -> pd.DataFrame:
    """The rows of :func:`generators` for README, and a second distance of ours."""
    model, priors = RECIPES[BEST]
    ours = {f"{model}, ALIF, TAID by pixel, {p} prior": end for p, end in priors.items()} | BOUNDS
    table = generators().set_index("FAD as published ↓").drop(columns=["CIFAR10", "CelebA"])
    best = best_runs()
    features = {name: by_dataset(best, "features", ending) for name, ending in ours.items()}
    for position, dataset in enumerate(("mnist", "fashion_mnist"), 2):
        column = pd.Series({name: values[dataset] for name, values in features.items()})
        table.insert(position, f"{DATASETS[dataset]}, EfficientNet ↓", column)
    return table.loc[["VAE", "FSVAE", "ESVAE", "FSDDIM", *ours]].fillna("").reset_index()


def decoders() -> pd.DataFrame:
    """Changes in % against the fixed decoder, over pairs of runs of one neuron and seed."""
    rows = change_rows("decoder", "fixed")
    return pd.DataFrame(rows).rename(columns={"after": "decoder"}).drop(columns="before")


def scales() -> pd.DataFrame:
    """TAID next to the fixed decoder at several scales."""
    scale = "decoder.scale"
    runs = load_frame(["fsvae", "digits_small_cpu"], *CHOICES, scale)
    runs = runs[(runs["neuron"] == "alif") & runs["decoder"].isin(["fixed", "taid"])]
    runs[scale] = runs[scale].replace("default", "1").mask(runs["decoder"] == "taid", "")
    groups = runs.groupby(["experiment", "decoder", scale])
    table = over_seeds(groups, ["reconstruction", "fad"])
    return table.assign(runs=groups.size().astype(str)).reset_index()


def generator_neurons() -> pd.DataFrame:
    """Changes in % by ALIF against LIF and PLIF, over pairs of runs of one decoder and seed."""
    rows = pd.DataFrame(chain(change_rows("neuron", "lif"), change_rows("neuron", "plif")))
    shown = rows[rows["after"] == "`alif`"].sort_values("experiment", kind="stable")
    return shown.rename(columns={"before": "ALIF instead of"}).drop(columns="after")


def change_rows(choice: str, before: str) -> Iterator[dict[str, str]]:
    """The generators' changes in % against those with ``before``, a row for each other choice."""
    for name, runs in chain(*map(by_length, GENERATORS)):
        if before not in runs[choice].unique():
            continue
        measured = runs.dropna(axis="columns")
        metric = "fad_published" if "fad_published" in measured else "fad"
        error = changes(runs, "reconstruction", choice, before)
        distance = changes(runs, metric, choice, before)
        second = changes(runs, "features", choice, before) if "features" in runs else {}
        for after in error:
            row = {"experiment": name, "before": f"`{before}`", "after": f"`{after}`"}
            row |= {"reconstruction, %": signed(error[after], 1)}
            row |= {"FAD, %": signed(distance[after], 1)}
            row["FAD through"] = "own autoencoder" if metric == "fad" else "the papers' autoencoder"
            row["EfficientNet, %"] = signed(second[after], 1) if after in second else ""
            yield row | {"pairs": str(error[after].count())}


def by_length(experiment: str) -> Iterator[tuple[str, pd.DataFrame]]:
    """The runs of an experiment with generators, those of each number of epochs under a name."""
    lengths = load_frame([experiment], *CHOICES).groupby("epochs")
    for epochs, runs in lengths:
        yield f"`{experiment}`" + f", {epochs} epochs" * (len(lengths) > 1), runs


def changes(runs: pd.DataFrame, metric: str, choice: str, before: str) -> pd.DataFrame:
    """Changes of a metric in % against runs with ``before``: a column for each other choice."""
    (other,) = {"decoder", "neuron"} - {choice}
    values = runs.assign(value=medians(runs, metric))
    table = values.pivot(index=["seed", other], columns=choice, values="value")
    relative = 100 * (table.div(table[before], axis="index") - 1)
    return relative.drop(columns=before).dropna(axis="columns", how="all")


def signed(change: pd.Series, decimals: int) -> str:
    text = Column("", 1, decimals).text(change)
    return text if text.startswith("-") else f"+{text}"


def claims() -> pd.DataFrame:
    """What the paper of TAID and ALIF says, what the same change does here, and a verdict."""
    papers = pd.read_csv(RESULTS / "published.csv").set_index(["dataset", "row", "metric"])["value"]
    rows = []
    for (dataset, before, after), (metrics, experiment) in CLAIMS.items():
        paper = []
        for metric in metrics:
            # The accuracy that PLIF's own paper has, where this one quotes no other.
            quoted = papers.get((dataset, before, "accuracy_best_test_epoch"))
            values = papers.get((dataset, before, metric), quoted), papers[dataset, after, metric]
            numbers = " to ".join(f"{value / METRICS[metric].unit:g}" for value in values)
            paper.append(f"{METRICS[metric].title.split(' as ')[0]} {numbers}")
        row = {"claim": f"{after} instead of {before}, {DATASETS[dataset]}"}
        row |= {"paper": ", ".join(paper)}
        rows.append(row | measure_claim(experiment, after))
    return pd.DataFrame(rows)


def measure_claim(experiment: str, after: str) -> dict[str, str]:
    """The changes between runs of one seed; the claim holds if all agree."""
    if not experiment:
        return {"here": "not measured", "verdict": "cannot be measured without the data"}
    measure = fad_changes if after == "TAID" else accuracy_changes
    here, better = [], []
    for name, text, gains in measure(experiment):
        here.append(f"{text}, better in {gains.sum()} of {len(gains)} seeds, {name}")
        better.extend(gains)
    verdict = "holds" if all(better) else "not seen" if any(better) else "does not hold"
    return {"here": "; ".join(here), "verdict": f"{verdict} at this budget"}


def fad_changes(experiment: str) -> Iterator[tuple[str, str, pd.Series]]:
    """Runs of each length: their name, the change of FAD by TAID, and which seeds gain."""
    for name, runs in by_length(experiment):
        change = changes(runs, "fad", "decoder", "fixed")["taid"].dropna()
        yield name, f"our FAD {signed(change, 0)} %", change < 0


def accuracy_changes(experiment: str) -> Iterator[tuple[str, str, pd.Series]]:
    """The runs' name, the change of accuracy from PLIF to ALIF, and which seeds gain."""
    runs = [run for run in load_runs(experiment) if VALIDATION not in overrides(run)]
    accuracies = frame(runs)[0].pivot(index="seed", columns="neuron", values="accuracy")
    change = 100 * (accuracies["alif"] - accuracies["plif"]).dropna()
    yield f"`{experiment}`", f"accuracy {signed(change, 2)} points", change > 0


def classifiers() -> pd.DataFrame:
    """Accuracy of the small classifiers by neuron."""
    names = ["digits_classifier", "mnist_classifier", "fashion_mnist_recipe", "cifar10_classifier"]
    rows = []
    for name in (f"{name}_cpu" for name in names):
        table = frame(load_runs(name))[0].assign(name=f"`{name}`")
        if VALIDATION in table:
            own = table[VALIDATION] != "default"
            table.loc[own, "name"] += f", `{VALIDATION}=" + table[VALIDATION] + "`"
        for label, runs in table.groupby("name"):
            accuracies = runs.groupby("neuron")["accuracy"].agg(METRICS["accuracy"].text)
            row = {"accuracy, last epoch, % ↑": label}
            row |= {neuron: accuracies.get(neuron, "not run") for neuron in start_maps.NEURONS}
            rows.append(row | {"epochs": str(runs["epochs"].max()), "runs": str(len(runs))})
    return pd.DataFrame(rows)


def dead_start() -> pd.DataFrame:
    """Accuracy and epochs from a start at which no neuron fires."""
    table = summary(load_runs("mnist_dead_start_cpu"))
    columns = ["neuron", "neuron_start.calibrate", COLUMNS["accuracy"].title, "epochs", "runs"]
    return table[columns].rename(columns=start_maps.short).astype(str)


def lr_scale() -> pd.DataFrame:
    """Accuracy by how much faster the neurons learn than the weights."""
    rows = ["dataset", "model.norm", "neuron", start_maps.TAU, start_maps.THRESHOLD]
    table = load_study("lr_scale")
    cells = table.pivot_table("accuracy", rows, "task.lr_scale", COLUMNS["accuracy"].text)
    ordered = cells[sorted(cells, key=sort_key)].fillna("").reset_index()
    return ordered.rename(columns={row: start_maps.short(row) for row in rows})


def yardsticks() -> pd.DataFrame:
    """FAD as published of images that no model drew, and how sharp they are."""
    rows = pd.read_csv(RESULTS / "yardsticks.csv")
    formats = {"fad_published": "{:.2f}", "gradient": "{:.3f}"}
    shown = rows.assign(**{name: rows[name].map(form.format) for name, form in formats.items()})
    table = shown.pivot(index="images", columns="dataset", values=[*formats])
    titles = {"fad_published": COLUMNS["fad_published"].title, "gradient": "gradient"}
    table.columns = pd.Index([f"{dataset}: {titles[name]}" for name, dataset in table.columns])
    return table.loc[rows["images"].unique()].reset_index()


def colour() -> pd.DataFrame:
    """How much of CIFAR-10's colour reconstructions have."""
    rows = pd.read_csv(RESULTS / "colour.csv")
    shares = {
        name: rows[name].map("{:.2f}".format) for name in ("grey", "red_green", "blue_yellow")
    }
    others = {"reconstruction ↓": rows["reconstruction"].map("{:.4f}".format)}
    return rows[["subpixel", "chroma_weight"]].assign(**others, **shares)


def attention() -> pd.DataFrame:
    """Reconstruction errors with the weights of image decoders changed."""
    rows = pd.read_csv(RESULTS / "attention.csv").replace({"dataset": FOLDERS})
    rows["differs"] *= 100
    columns = {
        "sum": Column("sum of weights", 1, 2),
        "differs": Column("differs between steps, %", 1, 1),
        "reconstruction": Column("error as it is", 1, 4),
        "reconstruction_permuted": Column("steps permuted", 1, 4),
        "reconstruction_mean": Column("mean weights", 1, 4),
        "reconstruction_equal": Column("equal weights", 1, 4),
    }
    groups = rows.groupby(["dataset", "model", "epochs", "decoder"])
    table = groups.agg({name: column.text for name, column in columns.items()})
    table.columns = pd.Index([column.title for column in columns.values()])
    return table.assign(runs=groups.size().astype(str)).reset_index()


def distances() -> pd.DataFrame:
    """Where the distance of the best recipe's samples comes from."""
    rows, priors = [], RECIPES[BEST][1].items()
    images_of = BOUNDS | {f"samples of the {prior} prior": ending for prior, ending in priors}
    for dataset, runs in best_runs().groupby("dataset", sort=False):
        for images, ending in images_of.items():
            row = {"dataset": dataset, "images": images}
            rows.append(row | both_distances(runs, ending))
    return pd.DataFrame(rows)


def both_distances(runs: pd.DataFrame, ending: str = "") -> dict[str, str]:
    """The distances of samples as published and by EfficientNet, with precision and recall."""
    row = {}
    for distance, title, of_it in (
        ("fad_published", "FAD as published", ""),
        ("features", "EfficientNet", ", EfficientNet"),
    ):
        row[f"{title} ↓"] = METRICS[distance].text(medians(runs, distance, ending))
        for key in ("precision", "recall"):
            name = f"{distance}_{key}"
            row[f"{key}{of_it} ↑"] = METRICS[name].text(runs[f"{name}{ending}"])
    return row


def losses() -> pd.DataFrame:
    """The best recipe with and without its losses, on a part of the training images."""
    runs = load_frame([f"{name}_{BEST}" for name in DATASETS], *LOSSES)
    table = runs[runs["dataset.limit"] != "default"].replace({"critic": {"default": "none"}})
    rows = []
    for (dataset, critic, loss), group in table.groupby(["dataset", "critic", "feature_loss"]):
        row = {"dataset": dataset, "critic": critic, "feature_loss": loss}
        row["reconstruction ↓"] = METRICS["reconstruction"].text(group["reconstruction"])
        rows.append(row | both_distances(group))
    return pd.DataFrame(rows)


def recipes() -> str:
    """A table for each experiment, over seeds."""
    sections = []
    for name, runs in load_all_runs().items():
        config = (ROOT / "conf" / "experiment" / f"{name}.yaml").read_text(encoding="utf-8")
        comment = "\n".join(re.findall(r"^# ([^@].*)", config, re.M))
        sections.append(f"### `{name}`\n\n{comment}\n\n{markdown(summary(runs))}")
    return "\n".join(sections)


def papers() -> str:
    """The papers' values: a table for each data set and task."""
    rows = pd.read_csv(RESULTS / "published.csv", keep_default_na=False)
    values = rows["value"] / rows["metric"].map(lambda name: COLUMNS[name].unit)
    timed = pd.read_csv(EPYC / "published.csv").set_index("recipe")
    hours = timed["core_hours"].map(lambda value: f"{float(f'{value:.2g}'):,.0f}")
    sections = []
    for (dataset, task), part in rows.assign(value=values).groupby(["dataset", "task"]):
        table = part.pivot(index=["row", "source", "command"], columns="metric", values="value")
        shown = table[present(table)].map("{:g}".format).replace("nan", "")
        shown.columns = pd.Index([COLUMNS[name].title for name in shown])
        shown["core-hours"] = shown.index.get_level_values("command").map(hours).fillna("")
        sections.append(f"### {dataset}: {task}\n\n{markdown(shown.reset_index())}")
    return "\n".join(sections)


def every_run() -> str:
    """The protocols, numbered, and the metrics' protocols of each run and later evaluation."""
    runs = [*chain(*load_all_runs().values())]
    protocols = {f"{name}: {how}" for m in runs for name, how in m.get("protocol", {}).items()}
    numbers = {how: str(number) for number, how in enumerate(sorted(protocols), 1)}
    rows = []
    for run in runs:
        protocol, later = run.get("protocol", {}), run["evaluations"]
        at_once = protocol.keys() - {*chain(*(evaluation["metrics"] for evaluation in later))}
        for measured, source in ((at_once, run), *((one["metrics"], one) for one in later)):
            names = sorted(name for name in measured if name in protocol)
            row = {"command": f"`{source['command']}`"}
            row["protocols"] = ", ".join(numbers[f"{name}: {protocol[name]}"] for name in names)
            rows.append(row | {key: str(source[key]) for key in ("commit", "machine", "threads")})
    listed = "".join(f"{number}. {how}\n" for how, number in numbers.items())
    return f"{listed}\n{markdown(pd.DataFrame(rows))}"


def models() -> pd.DataFrame:
    """The models that come with the package, with the metrics of each card."""
    rows = []
    for name in list_models():
        metrics = read_config(name)["metrics"]
        shown = {key: metrics[key] for key in ON_CARD if key in metrics}
        rows.append(
            {
                "name": f"`{name}`",
                "data": metrics["choices"]["dataset"],
                "decoder": metrics["choices"].get("decoder") or "",
                "parameters, M": f"{metrics['parameters'] / 1e6:.2f}",
                "MB": f"{(PRETRAINED / name / WEIGHTS).stat().st_size / 1e6:.2f}",
                "metrics": "; ".join(map(" ".join, format_metrics(shown).values())),
            }
        )
    return pd.DataFrame(rows)


# ---- benchmarks ----


def norms() -> pd.DataFrame:
    rows = pd.read_csv(EPYC / "norm.csv")
    return rows[rows["dtype"] == "float32"].rename(columns={"variant": "neuron"})


def frontier() -> pd.DataFrame:
    """Training steps of whole nets, by what makes the step."""
    rows = pd.read_csv(EPYC / "frontier.csv")
    first = rows["system"].where(rows["system"] == "SpikingJelly", rows["neuron"])
    last = rows["neuron"].where(rows["system"] == "SpikingJelly", rows["system"])
    return rows.assign(neuron=first.str.cat(last, sep=" "))


def memory() -> pd.DataFrame:
    """Peak bytes per sample and time of a step over those of SpikingJelly's PLIF, T = 8."""
    rows = frontier().query("T == 8")
    keys = ["net", "dtype"]
    rival = rows[rows["neuron"] == PLIF].set_index(keys)["mb_per_sample"].rename("rival")
    rows = rows.join(rival, on=keys)
    size = (rows["mb_per_sample"] / rows["rival"]).map("{:.2f}".format)
    rows["cell"] = size.str.cat(rows["time_ratio"].map("{:.2f}".format), sep=" / ")
    table = rows.pivot(index=["dtype", "neuron"], columns="net", values="cell")
    order = rows[["dtype", "neuron"]].drop_duplicates()
    return table.loc[[*order.itertuples(index=False, name=None)]].fillna("").reset_index()


def zoo() -> pd.DataFrame:
    """What is fused in the nets of the zoo, and the bytes saved for backward."""
    rows = pd.read_csv(EPYC / "zoo.csv", keep_default_na=False)
    columns = {
        "net": rows["net"],
        "neurons": rows["neurons"],
        "norms fused": [f"{row.fused} of {row.norms}" for row in rows.itertuples()],
        "the others are": rows["left"],
        "MB before": rows["before_mb"].map("{:.3g}".format),
        "after": rows["after_mb"].map("{:.3g}".format),
        "ratio": (rows["after_mb"] / rows["before_mb"]).map("{:.2f}".format),
    }
    return pd.DataFrame(columns).astype(str)


def norm() -> pd.DataFrame:
    """Milliseconds of norm and neuron and of two blocks with them, forward and backward."""
    rows = norms()
    rows = rows[~rows["neuron"].str.endswith("bits")]
    table = rows.pivot(index="net", columns="neuron", values="median_ms")
    table = table.loc[rows["net"].unique(), rows["neuron"].unique()]
    one, two = table["ALIF, one operator"], table["ALIF, two operators"]
    table["one / two"], table["one / PLIF"] = one / two, one / table[PLIF]
    digits = {name: "{:.2f}" if "/" in name else "{:.1f}" for name in table}
    return table.apply(lambda column: column.map(digits[column.name].format)).reset_index()


def neurons() -> pd.DataFrame:
    """Milliseconds of the largest layer, without and with its memory reused."""
    files = {"given back": "neuron.csv", "reused": "neuron-reused-memory.csv"}
    rows = pd.concat({memory: pd.read_csv(EPYC / name) for memory, name in files.items()})
    rows = rows.rename_axis(["freed memory", None]).reset_index("freed memory")
    rows = rows[(rows["N"] == rows["N"].max()) & (rows["T"] >= 8)]
    table = rows.pivot(index=["freed memory", "T"], columns="neuron", values="median_ms")
    table["PLIF / ALIF numba"] = table[PLIF] / table["ALIF numba"]
    return table.map("{:.1f}".format).reset_index()


def esvae() -> pd.DataFrame:
    """Milliseconds per image of the sharp recipe's step and of variants of it."""
    rows = pd.read_csv(BENCHMARKS / "epyc-avx2-2-cores" / "esvae.csv")
    columns = {
        "work": rows["work"],
        "batch": rows["batch"],
        "ms per image": rows["ms_per_image"].map("{:.3g}".format),
        "of the recipe's step": rows["ratio"].map("{:.2f}".format),
    }
    return pd.DataFrame(columns)


TABLES: dict[str, Callable[[], pd.DataFrame | str]] = {
    **{table.__name__: table for table in (gains, generators, fad, decoders, classifiers)},
    **{table.__name__: table for table in (claims, attention, generator_neurons, scales)},
    **{table.__name__: table for table in (dead_start, lr_scale, yardsticks, colour)},
    **{table.__name__: table for table in (recipes, papers, models, memory, zoo, distances)},
    **{table.__name__: table for table in (norm, neurons, esvae, losses)},
    "start_map": lambda: start_maps.count_good_starts(start_maps.load_start_map()),
    "runs": every_run,
}


if __name__ == "__main__":
    main()
