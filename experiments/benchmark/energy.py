"""Energy by layer of CIFAR10's classifiers on spikes of 0 and 1 alone.

    python experiments/benchmark/energy.py RUN ...

writes ``results/energy.csv`` and draws it: a row for each layer of each finished run of
``experiment=cifar10_classifier_cpu``, per test image.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from common import RESULTS, parser, write_csv
from matplotlib.figure import Figure

from sj_taid import binary, fresh_state
from sj_taid.training.parts import build_parts
from sj_taid.training.plot import save
from sj_taid.training.run import Run

PICTURE = RESULTS.parent / "docs" / "images" / "energy.png"


def main(arguments: Sequence[str] | None = None) -> None:
    options_parser = parser(__doc__, device=False, out=RESULTS)
    options_parser.add_argument("runs", nargs="+", type=Path)
    options = options_parser.parse_args(arguments)
    rows = pd.DataFrame(row for folder in options.runs for row in measure(Run(folder)))
    write_csv(rows, options.out / "energy.csv")
    draw(rows)


def measure(run: Run) -> Iterator[dict[str, Any]]:
    """A row for each layer, per image."""
    data, model = build_parts(run.config).load_data(), run.model()
    with binary(model) as report:
        for images, _ in data.test_dataloader():
            with fresh_state(model):
                model(images)
    most = max(level for row in report.rows[1:] for level in row.levels)
    reads = f"counts up to {most}" if most > 1 else "spikes"
    net = {"net": f"{reads}, T = {run.config.model.T}", "accuracy": run.metrics["accuracy"]}
    for row in report.rows:
        costs = {"additions": row.additions, "macs": row.macs, "nj": row.energy_pj / 1e3}
        per_image = {name: cost / len(data.test_set) for name, cost in costs.items()}
        ones = row.ones / row.values if row.values else None
        yield net | {"layer": row.layer, "reads": row.cells()[2], "ones": ones} | per_image


def draw(rows: pd.DataFrame) -> None:
    """Bars by layer, a colour for each net."""
    figure = Figure((7, 3.6), layout="tight")
    axis = figure.subplots()
    names = rows["net"] + (100 * rows["accuracy"]).map(": {:.1f} % right".format)
    table = rows.assign(net=names).query("nj > 0")
    table.pivot_table("nj", "layer", "net", sort=False).plot.bar(ax=axis, rot=20)
    axis.set(xlabel="", ylabel="energy of an image, nJ")
    axis.legend(title=None)
    save(figure, PICTURE)


if __name__ == "__main__":
    main()
