"""Compare runs: ``sj-taid compare FOLDER ... [--out FOLDER]``.

Every finished run below the folders counts. The terminal shows each combination of choices with its
mean and standard deviation over seeds, as ``results.md`` does; ``results.csv`` holds every run.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from .files import atomic_write, check_replaceable
from .gather import gather
from .tables import frame, markdown, summary


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "sj-taid compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, help="folders that hold runs")
    parser.add_argument("--out", type=Path, help="where to write; default: the first folder")
    options = parser.parse_args(arguments)
    out = options.out or options.folders[0]
    check_replaceable(out / "results.csv", ",folder\n")  # what ends the head of each
    check_replaceable(out / "results.md", "| runs ")
    finished, _ = gather(options.folders)
    runs = [*finished.values()]
    print(markdown(summary(runs)))
    with atomic_write(out / "results.csv") as temporary:
        frame(runs)[0].assign(folder=[*map(str, finished)]).to_csv(temporary, index=False)
    with atomic_write(out / "results.md") as temporary:
        temporary.write_text(markdown(summary(runs)), encoding="utf-8")
    print(f"results.csv and results.md are in {out}")
