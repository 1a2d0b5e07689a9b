"""What RESULTS.md holds: sections of tables, made of the kept runs and the published values."""

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, takewhile
from pathlib import Path

import pandas as pd

from .columns import COLUMNS, natural
from .gather import EXPERIMENTS, STUDIES, Metrics, chosen_alone, overrides, stored, studied
from .heat_maps import Maps, short
from .tables import changes, frame, markdown, present, summary, text

REPORT = Path("RESULTS.md")
NEURONS = ["lif", "plif", "alif", "alif_channel"]  # each learns more than the one before
DIFFERENCE = ("alif", "plif")
SMALL_BUDGET = "_cpu"  # ends the name of an experiment for a laptop


def fill(page: str, tables: Mapping[str, str]) -> str:
    """``page`` with that table in each ``<!-- table: NAME -->`` ... ``<!-- end -->``."""
    place = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
    return place.sub(lambda found: f"{found[1]}\n{tables[found[2]]}\n{found[3]}", page)


def tables(root: Path) -> dict[str, str]:
    """What RESULTS.md holds of the runs and the published values in ``root/results``."""
    runs = {name: stored(root, name) for name in EXPERIMENTS if name not in STUDIES}
    small = {name: ours for name, ours in runs.items() if name.endswith(SMALL_BUDGET)}
    papers = {name: ours for name, ours in runs.items() if name not in small}
    sections = [small_section(name, ours) for name, ours in small.items() if ours]
    published = pd.read_csv(root / "results" / "published.csv")
    rows = paper_sections([*chain(*papers.values())], published)
    return {
        "decoders": decoders(runs),
        "small": "\n".join([*sections, not_run(small)]),
        "papers": "\n".join([*rows, not_run(papers)]),
        "runs": every_run([*chain(*runs.values())]),
        "start_map": start_map(studied(root, "start_map")),
        "lr_scale": lr_scale(studied(root, "lr_scale")),
        "yardsticks": yardsticks(root / "results" / "yardsticks.csv"),
    }


def decoders(runs: Mapping[str, Sequence[Metrics]]) -> str:
    """What TAID changes, in % of the fixed decoder's mean over seeds."""
    figures = ["reconstruction", "fad_published"]
    rows = []
    for budget in ("esvae_cpu", "esvae_sharp", "fsvae_sharp"):
        names = [f"{dataset}_{budget}" for dataset in ("mnist", "fashion_mnist")]
        ours = chosen_alone(chain(*(runs[name] for name in names)), "decoder")
        if "fixed" not in {metrics["choices"]["decoder"] for metrics in ours}:
            continue
        mean = frame(ours)[0].groupby(["decoder", "dataset"])[figures].mean()
        change = 100 * (mean / mean.loc["fixed"] - 1)
        for decoder in mean.index.unique("decoder").difference(["fixed"]):
            row = {"experiment": f"`*_{budget}`", "decoder": f"`{decoder}`"}
            for (name, dataset), value in change.loc[decoder].unstack().items():
                row[f"{COLUMNS[name].title[:-2]}, {dataset}, %"] = f"{value:+.1f}"
            rows.append(row)
    return markdown(pd.DataFrame(rows)) if rows else not_run({"mnist_esvae_sharp": []})


def start_maps(table: pd.DataFrame) -> Maps:
    """Of all data sets, with and without norm and calibration."""
    ranks = {neuron: rank for rank, neuron in enumerate(NEURONS)}
    others = ["dataset", "model.norm", "neuron_start.calibrate"]
    keys = [key for key in others if table[key].nunique() > 1]
    start = ("neuron_start.tau", "neuron_start.v_threshold", "neuron")

    def order(neuron: str) -> tuple[int, str]:
        return ranks.get(neuron, len(ranks)), neuron

    return Maps.of(table, [*keys, *start], "accuracy", *start, order)


def start_map(table: pd.DataFrame) -> str:
    """How many starts are good, for each neuron."""
    return markdown(start_maps(table).regions()) if len(table) else not_run({"start_map": []})


def lr_scale(table: pd.DataFrame) -> str:
    """The accuracy by how much faster the neurons learn than the weights."""
    if table.empty:
        return not_run({"lr_scale": []})
    rows = ["dataset", "model.norm", "neuron", "neuron_start.tau", "neuron_start.v_threshold"]
    cells = table.pivot_table("accuracy", rows, "task.lr_scale", COLUMNS["accuracy"].text)
    ordered = cells[sorted(cells, key=natural)].fillna("").reset_index()
    return markdown(ordered.rename(columns={row: short(row) for row in rows}))


def yardsticks(path: Path) -> str:
    """FAD as published of images that no model drew, and how sharp they are."""
    if not path.is_file():
        return not_run({"yardsticks": []})
    rows = pd.read_csv(path)
    columns = {"fad_published": "{:.2f}", "gradient": "{:.3f}"}
    shown = rows.assign(**{name: rows[name].map(form.format) for name, form in columns.items()})
    table = shown.pivot(index="images", columns="dataset", values=[*columns])
    titles = {"fad_published": COLUMNS["fad_published"].title, "gradient": "gradient"}
    table.columns = pd.Index([f"{dataset}: {titles[name]}" for name, dataset in table.columns])
    return markdown(table.loc[rows["images"].unique()].reset_index())


def draw_start_maps(root: Path) -> None:
    """A picture in docs/images for each data set, with and without calibration, that is begun."""
    table = studied(root, "start_map")
    for (dataset, rate), part in table.groupby(["dataset", "neuron_start.calibrate"]):
        if not {*DIFFERENCE} <= {*part["neuron"]}:
            continue
        name = f"start-map-{dataset}" + ("" if rate == "null" else "-calibrated")
        start_maps(part).draw(root / "docs" / "images" / f"{name}.png", DIFFERENCE)


def small_section(experiment: str, runs: Sequence[Metrics]) -> str:
    """One budget for all: the table of its choices, and what they change."""
    both = [markdown(table) for table in (summary(runs), changes(runs)) if len(table)]
    return "\n".join([f"### `{experiment}`\n\n{comment(experiment)}\n", *both])


def comment(experiment: str) -> str:
    """What an experiment's file says of itself in its first lines."""
    lines = EXPERIMENTS[experiment].read_text(encoding="utf-8").splitlines()
    first = takewhile(lambda line: line.startswith("# "), lines[1:])  # after the package
    return "\n".join(line.removeprefix("# ") for line in first)


def not_run(runs: Mapping[str, Sequence[Metrics]]) -> str:
    return f"Not run: {', '.join(f'`{name}`' for name in runs if not runs[name]) or 'none'}.\n"


def label(metrics: Metrics) -> str:
    """Ours, and in what it was run otherwise than the row's config says."""
    choices = overrides(metrics).items()
    otherwise = [f"{k}={v}" for k, v in choices if k not in ("experiment", "dataset", "seed")]
    return f"ours, with `{' '.join(otherwise)}`" if otherwise else "ours"


def paper_sections(runs: Sequence[Metrics], published: pd.DataFrame) -> Iterator[str]:
    """A table for each data set and task: ours, then the published values."""
    index = ["dataset", "task", "row", "from"]
    parts = []
    if runs:
        table = frame(runs)[0].rename(columns={"experiment": "row"})
        groups = table.assign(**{"from": [*map(label, runs)]}).groupby(index, sort=False)
        ours = groups.agg({name: partial(text, name, table) for name in present(table)})
        parts = [ours.assign(runs=groups.size().astype(str))]
    units = published["figure"].map(lambda name: COLUMNS[name].unit)
    parts.append(
        published.assign(value=(published["value"] / units).map("{:g}".format))
        .rename(columns={"source": "from"})
        .pivot(index=index, columns="figure", values="value")
    )
    both = pd.concat(parts).fillna("")
    for (dataset, task), rows in both.groupby(["dataset", "task"], sort=False):
        filled = [name for name in (*COLUMNS, "runs") if name in rows and any(rows[name] != "")]
        shown = rows[filled].rename(columns={name: COLUMNS[name].title for name in COLUMNS})
        yield f"### {dataset}: {task}\n\n{markdown(shown.droplevel([0, 1]).reset_index())}"


def every_run(runs: Sequence[Metrics]) -> str:
    """The protocols, numbered, and what each run and each later evaluation of it measured."""
    protocols = {f"{name}: {how}" for m in runs for name, how in m.get("protocol", {}).items()}
    numbers = {how: str(number) for number, how in enumerate(sorted(protocols), 1)}
    rows = []
    for metrics in runs:
        protocol, later = metrics.get("protocol", {}), metrics["evaluations"]
        at_once = protocol.keys() - {name for evaluation in later for name in evaluation["figures"]}
        for origin in (metrics | {"figures": at_once}, *later):
            names = sorted(name for name in origin["figures"] if name in protocol)
            by = ", ".join(numbers[f"{name}: {protocol[name]}"] for name in names)
            facts = {name: str(origin[name]) for name in ("commit", "machine", "threads")}
            rows.append({"command": f"`{origin['command']}`", "protocols": by, **facts})
    listed = "".join(f"{number}. {how}\n" for how, number in numbers.items())
    return f"{listed}\n{markdown(pd.DataFrame(rows))}"
