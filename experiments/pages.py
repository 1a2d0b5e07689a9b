"""Fill the tables of README.md, RESULTS.md and docs/, and draw the maps of starts in docs/images:
``python experiments/pages.py``.

Each is made of the metrics in results/ and of the CSVs in experiments/benchmark/results/, so that
no number is copied by hand.
"""

from functools import cache
from pathlib import Path

import pandas as pd

from sj_taid.pretrained import WEIGHTS, list_models, read_config
from sj_taid.training.columns import METRICS, Column
from sj_taid.training.export import figures
from sj_taid.training.files import atomic_write
from sj_taid.training.gather import chosen_alone, stored
from sj_taid.training.results_page import draw_start_maps, fill, tables
from sj_taid.training.tables import frame, markdown

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "RESULTS.md", *sorted((ROOT / "docs").glob("*.md"))]
PRETRAINED = ROOT / "sj_taid" / "pretrained"
RESULTS = ROOT / "experiments" / "benchmark" / "results"
BENCHMARKS = RESULTS / "epyc-2-cores"
XEON = RESULTS / "xeon-2-cores"
DATASETS = {
    "mnist": "MNIST",
    "fashion_mnist": "Fashion-MNIST",
    "cifar10": "CIFAR10",
    "celeba": "CelebA",
}
#: The papers' generators that spike, and the plain VAE that the first of them was held against.
MODELS = ["VAE", "FSVAE", "TAID", "ESVAE", "FSDDIM"]
#: The priors that our own draw from, and the figure of each.
PRIORS = {
    "ESVAE": {"fitted": "fad_published", "learned": "fad_published_learned"},
    "FSVAE": {"learned": "fad_published"},
}
DECODERS = {"fixed": "fixed decoder", "taid": "TAID", "taid_place": "TAID by place"}


def filled(page: Path) -> str:
    """The text of a page, with its tables as they should be."""
    return fill(page.read_text(encoding="utf-8"), all_tables())


@cache
def all_tables() -> dict[str, str]:
    made = {
        "gains": gains(),
        "standing": standing(),
        "models": models(),
        "memory": memory(),
        "norm": norm(),
        "neurons": neurons(),
        "fsvae": fsvae(),
        "esvae": esvae(),
        "compile": compiled(),
        "loading": loading(),
    }
    return tables(ROOT) | {name: markdown(table) for name, table in made.items()}


def gains() -> pd.DataFrame:
    """Memory, time and quality, each beside what it is held against, and where it was measured."""
    pairs = norms().query("net == 'norm + neuron' and T == 16")
    nets = norms().query("net == 'sew_resnet18' and T == 8")
    layers = pd.read_csv(BENCHMARKS / "neuron-reused-memory.csv").query("N == N.max() and T == 16")
    steps = pd.read_csv(XEON / "fsvae.csv").query("work == 'training step'")
    steps = steps.rename(columns={"model": "neuron"})
    decoders = frame(stored(ROOT, "fsvae"))[0]
    classifiers = frame(stored(ROOT, "mnist_classifier_cpu"))[0]
    plif = "SpikingJelly PLIF"
    rows = [
        ("saved for backward, MB", nets, "saved_mb", plif, "ALIF, one operator, bits"),
        ("norm and neuron, ms", pairs, "median_ms", plif, "ALIF, one operator"),
        ("a layer of neurons, ms", layers, "median_ms", plif, "ALIF numba"),
        ("a training step of FSVAE, ms", steps, "median_ms", f"{plif}, stepping", "ours"),
        ("FSVAE on MNIST, reconstruction error", decoders, "reconstruction", "fixed", "taid"),
        ("FSVAE on MNIST, FAD", decoders, "fad", "fixed", "taid"),
        ("classifier on MNIST, accuracy in %", classifiers, "accuracy", "plif", "alif"),
    ]
    return pd.DataFrame([gain(*row) for row in rows])


def gain(what: str, table: pd.DataFrame, column: str, theirs: str, ours: str) -> dict[str, str]:
    """A row of :func:`gains`: ``column`` of the neuron or decoder ``theirs`` beside ``ours``."""
    quantity = METRICS.get(column, Column(what, 1, 0, spread=False))
    rows = table.set_index("decoder" if ours == "taid" else "neuron")
    before, after = rows.loc[[theirs], column], rows.loc[[ours], column]
    more, ratio = after.mean() - before.mean(), before.mean() / after.mean()
    return {
        "what": what,
        "before": f"{quantity.text(before)} ({theirs})",
        "after": f"{quantity.text(after)} ({ours})",
        "gain": f"{ratio:.1f} times less" if more < 0 else f"+{more / quantity.unit:.2f}",
        "on": " / ".join(rows.loc[[ours], "machine"].str.replace("(R)", "").unique()),
    }


def standing() -> pd.DataFrame:
    """FAD as published of the papers' generators and of our best, for every data set."""
    rows = pd.read_csv(ROOT / "results" / "published.csv")
    rows = rows[rows["figure"].isin(["fad_published", "epochs"]) & (rows["task"] == "generation")]
    rows = rows.rename(columns={"row": "model"})
    papers = rows[rows["figure"] == "fad_published"].pivot(
        index=["model", "source"], columns="dataset", values="value"
    )
    epochs = rows[rows["figure"] == "epochs"].groupby("model")["value"].first()
    table = papers.map("{:g}".format).replace("nan", "not reported").reset_index("source")
    table = table.assign(epochs=epochs.map("{:g}".format)).fillna({"epochs": "not reported"})
    for model, priors in PRIORS.items():
        kept = [run for name in DATASETS for run in stored(ROOT, f"{name}_{model.lower()}_sharp")]
        runs = frame(chosen_alone(kept, "decoder", "neuron"))[0]
        for (neuron, decoder), alike in runs.groupby(["neuron", "decoder"]):
            counts = "/".join(map(str, sorted(alike["epochs"].unique())))
            for prior, figure in priors.items():
                fads = alike.groupby("dataset")[figure].agg(METRICS[figure].text)
                name = f"{model}, {neuron.upper()}, {DECODERS.get(decoder, decoder)}, {prior} prior"
                table.loc[name] = {"source": "this project, last epoch", "epochs": counts, **fads}
    table = table.fillna("not measured").loc[[*MODELS, *table.index.difference(MODELS)]]
    shown = table[[*DATASETS, "epochs", "source"]].rename(columns=DATASETS)
    return shown.rename_axis("FAD as published ↓", axis="index").reset_index()


def models() -> pd.DataFrame:
    """What comes with the package, with the figures of each card."""
    rows = []
    for name in list_models():
        metrics = read_config(name)["metrics"]
        rows.append(
            {
                "name": f"`{name}`",
                "data": metrics["choices"]["dataset"],
                "parameters, M": f"{metrics['parameters'] / 1e6:.2f}",
                "MB": f"{(PRETRAINED / name / WEIGHTS).stat().st_size / 1e6:.2f}",
                "figures": "; ".join(map(" ".join, figures(metrics).values())),
            }
        )
    return pd.DataFrame(rows)


def norms() -> pd.DataFrame:
    rows = pd.read_csv(XEON / "norm.csv")
    return rows[rows["dtype"] == "float32"].rename(columns={"variant": "neuron"})


def memory() -> pd.DataFrame:
    """Bytes kept for backward over those of SpikingJelly's PLIF, T = 8."""
    rows = norms()
    rows = rows[(rows["T"] == 8) & rows["net"].str.contains("_")]
    table = rows.pivot(index="neuron", columns="net", values="saved_ratio")
    return table.loc[rows["neuron"].unique()].map("{:.2f}".format).reset_index()


def norm() -> pd.DataFrame:
    """Milliseconds of norm and neuron, forward and backward."""
    rows = norms()
    rows = rows[rows["net"] == "norm + neuron"]
    table = rows.pivot(index="T", columns="neuron", values="median_ms")[rows["neuron"].unique()]
    one, two = table["ALIF, one operator"], table["ALIF, two operators"]
    table["one / two"], table["one / PLIF"] = one / two, one / table["SpikingJelly PLIF"]
    places = {name: "{:.2f}" if "/" in name else "{:.1f}" for name in table}
    return table.apply(lambda column: column.map(places[column.name].format)).reset_index()


def neurons() -> pd.DataFrame:
    """Milliseconds of the largest layer, without and with its memory reused."""
    files = {"given back": "neuron.csv", "reused": "neuron-reused-memory.csv"}
    rows = pd.concat({memory: pd.read_csv(BENCHMARKS / name) for memory, name in files.items()})
    rows = rows.rename_axis(["freed memory", None]).reset_index("freed memory")
    rows = rows[(rows["N"] == rows["N"].max()) & (rows["T"] >= 8)]
    table = rows.pivot(index=["freed memory", "T"], columns="neuron", values="median_ms")
    table["PLIF / ALIF numba"] = table["SpikingJelly PLIF"] / table["ALIF numba"]
    return table.map("{:.1f}".format).reset_index()


def fsvae() -> pd.DataFrame:
    """Milliseconds of each model, and ours over its rival's."""
    rows = pd.read_csv(XEON / "fsvae.csv")
    works = ["training step", "training step, channels last, bfloat16", "sampling"]
    rows = rows[rows["work"].isin(works)]
    table = rows.pivot(index="work", columns="model", values="median_ms").loc[works]
    ratio = table["ours"] / table["SpikingJelly PLIF, prefixes"]
    shown = table.map("{:.0f}".format).assign(
        **{"ours / PLIF, prefixes": ratio.map("{:.2f}".format)}
    )
    return shown.replace("nan", "").reset_index()


def esvae() -> pd.DataFrame:
    """Milliseconds an image of the sharp recipe's step, of variants of it and of its parts."""
    rows = pd.read_csv(RESULTS / "epyc-avx2-2-cores" / "esvae.csv")
    part, each = rows["ratio"].isna(), rows["ms_per_image"]
    columns = {
        "work": rows["work"].mask(part, "of it: " + rows["work"]),
        "batch": rows["batch"],
        "ms an image": each.map("{:.3g}".format),
        "of the recipe's step": (each / each[0]).map("{:.2f}".format),
    }
    return pd.DataFrame(columns)


def compiled() -> pd.DataFrame:
    """Milliseconds by backend, eager and compiled."""
    rows = pd.concat(map(pd.read_csv, sorted(BENCHMARKS.glob("compile-*.csv"))))
    table = rows.pivot(index="net", columns=["backend", "mode"], values="median_ms")
    table.columns = table.columns.map(", ".join)
    return table.map("{:.1f}".format).reset_index()


def loading() -> pd.DataFrame:
    """Samples per second of the loader that augments without processes, and of the fastest net."""
    rows = pd.read_csv(BENCHMARKS / "loading.csv").rename(columns={"samples_per_second": "rate"})
    loader = rows[(rows["processes"] == 0) & rows["augment"].notna()].set_index("data")["rate"]
    step = rows.sort_values("rate").dropna(subset="net").groupby("data").last().loc[loader.index]
    columns = {
        "loader": loader.map("{:.0f}".format),
        "training step": step["rate"].map("{:.1f}".format),
        "of": step["net"],
        "loading takes": (step["rate"] / loader).map("{:.1%}".format),
    }
    return pd.DataFrame(columns).reset_index()


if __name__ == "__main__":
    draw_start_maps(ROOT)
    for page in PAGES:
        with atomic_write(page) as whole:
            whole.write_text(filled(page), encoding="utf-8")
