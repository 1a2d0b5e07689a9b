"""Prove on this machine that the fused kernels are right, and time them: ``sj-taid prove``.

Each step is a process of its own with a time limit, so that the next one goes on past a kernel that
fails, hangs or takes the GPU's context with it. What came of them is in FOLDER/MACHINE, ready to
attach to an issue: prove.md to paste, MACHINE.csv with every row, and what each step printed and
wrote. Both are written anew after every step, so they are there whatever happens. The exit code is
0 where all steps passed. The command sj-taid needs the extra train. ``python -m sj_taid.prove`` is
the same and needs nothing but torch and SpikingJelly; a step that needs more fails and says so.
"""

import argparse
import csv
import importlib.util
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from . import __version__, doctor
from .ops import backends

#: What the steps are given. On a GPU each of them is thought to take a minute at most.
SIZES = {
    "cuda": {
        "doctor": "--kernels",
        "neuron": "--dtypes float32 bfloat16 --steps 4 16 --neurons 262144 4194304 --only cupy LIF",
        "memory": "--dtypes float32 bfloat16 --steps 4 16 32",
        "norm": "--steps 8 --batch 32 --repeats 20 --zoo sew_resnet18",
        "fsvae": "--parts compare --batch 64",
    },
    "cpu": {
        "neuron": "--steps 4 16 --neurons 4096 65536 --repeats 5 --only numba LIF",
        "memory": "--dtypes float32 bfloat16 --steps 4 16 32",
        "norm": "--steps 4 --batch 2 --repeats 3 --dtypes float32 "
        "--nets 'norm + neuron' '3 x [conv, norm, neuron]'",
        "fsvae": "--parts compare --T 8 --batch 4 --repeats 3",
    },
}

COMPILERS = (
    "NVRTC, the compiler, is known to miscompile or to refuse kernels for compute capability 10.0 "
    "and 12.0 in CUDA 13.1 to 13.3. Where it is one of them, try another and prove again: "
    "`pip install 'nvidia-cuda-nvrtc==13.0.*'`, or `'nvidia-cuda-nvrtc>=13.4'`. Until then "
    "`SJ_TAID_BACKEND=torch` computes without the kernels."
)

#: Of each CSV that a step writes, the columns on the page.
SHOWN = {
    "conformance-*.csv": "case outcome difference",
    "neuron.csv": "neuron dtype T N median_ms p20_ms p80_ms share_of_floor plif_implementation",
    "memory.csv": "neuron dtype T bytes_per_neuron_and_step",
    "norm.csv": "net variant dtype T kept_mb kept_ratio median_ms time_ratio",
    "fsvae.csv": "work model T batch median_ms ratio",
}
PASSED, FAILED, SKIPPED, LEFT_OUT = "passed", "failed", "skipped", "left out"


class Step(NamedTuple):
    """A command of Python's, and what to say where it fails."""

    name: str
    arguments: Sequence[str]
    environment: Mapping[str, str] = {}
    hint: str = ""
    #: why this machine does without it
    left_out: str = ""

    @property
    def command(self) -> str:
        """As one types it."""
        given = [f"{name}={value}" for name, value in self.environment.items()]
        return shlex.join([*given, "python", *self.arguments])


class Outcome(NamedTuple):
    """What came of a step."""

    step: Step
    outcome: str
    error: str = ""
    seconds: float = 0.0
    output: str = ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the steps and write the page; 1 if one of them did not pass."""
    parser = argparse.ArgumentParser(
        prog="sj-taid prove",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=SIZES, default="cuda")
    parser.add_argument("--minutes", type=float, default=10.0, help="for all steps together")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("prove-results"),
        help="a folder; what it has of this machine is replaced",
    )
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print(without_a_gpu(options.out))
        return 1
    machine = torch.cuda.get_device_name() if options.device == "cuda" else doctor.cpu_name()
    folder = options.out / slug(machine)
    folder.mkdir(parents=True, exist_ok=True)
    for pattern in (*SHOWN, "*.txt", "*.png"):
        for path in folder.glob(pattern):
            path.unlink()
    planned = [*steps(options.device, folder)]
    done: list[Outcome] = []
    end = time.monotonic() + 60 * options.minutes
    for step in planned:
        left = end - time.monotonic()
        if step.left_out:
            done.append(Outcome(step, LEFT_OUT, step.left_out))
        elif left <= 0:
            done.append(Outcome(step, SKIPPED, f"the {options.minutes:g} minutes are used up"))
        else:
            # One that hangs leaves time for the others.
            done.append(run(step, folder, min(left, 60 * options.minutes / 4)))
        print(f"{done[-1].outcome:8}  {step.name}  {done[-1].error}".rstrip(), flush=True)
        write(folder, machine, options.device, done)
    print(f"attach to an issue: {folder / 'prove.md'} and {folder / folder.name}.csv")
    return 0 if all(one.outcome in (PASSED, LEFT_OUT) for one in done) else 1


def without_a_gpu(out: Path) -> str:
    """Why nothing runs, and what would."""
    why = (f"  {line}" for line in (*doctor.devices(), *doctor.availability()))
    would = (f"  {step.name}: {step.command}" for step in steps("cuda", out / "MACHINE"))
    return "\n".join(
        (
            "torch finds no GPU here, so nothing was run:",
            *why,
            "On a machine with one these steps would be, in ten minutes at most:",
            *would,
            "What a CPU can do of it: sj-taid prove --device cpu",
        )
    )


def steps(device: str, folder: Path) -> Iterator[Step]:
    """What is run on a device, in order."""
    (backend,) = backends.PREFERENCE[device]
    contract = {backends.ENVIRONMENT_VARIABLE: backend}  # that backend, or an error
    hint = COMPILERS if device == "cuda" else ""
    where = ("--device", device, "--out", str(folder))
    sizes = {name: shlex.split(given) for name, given in SIZES[device].items()}

    yield Step("doctor", ("-m", "sj_taid.doctor", *sizes.get("doctor", ())))
    check = ("-m", "sj_taid.ops.alif.conformance", *where)
    yield Step("kernel", (*check, "--tiny"), hint=hint)
    for dtype in ("float32", "float16", "bfloat16"):
        cases = sizes.get("conformance", ())
        yield Step(f"conformance {dtype}", (*check, "--dtypes", dtype, *cases), hint=hint)
    neuron = ("-m", "sj_taid.benchmark.neuron", *where, *sizes["neuron"])
    yield Step("neuron", neuron)
    for implementation in ("cuda", "triton") if device == "cuda" else ():
        yield Step(
            f"neuron, PLIF by {implementation}",
            (*neuron, "--only", "PLIF", "--append"),
            {"SJ_PLIF_CUDA_IMPLEMENTATION": implementation},
            left_out=why_not(implementation),
        )
    yield Step("memory", ("-m", "sj_taid.benchmark.memory", *where, *sizes["memory"]))
    for name in ("norm", "fsvae"):
        yield Step(name, ("-m", f"sj_taid.benchmark.{name}", *where, *sizes[name]), contract)


def why_not(implementation: str) -> str:
    """Why SpikingJelly has no such implementation of PLIF here, or nothing."""
    if importlib.util.find_spec("spikingjelly._ops") is None:
        return "SpikingJelly 0.0.0.0.14 has one implementation"
    if implementation == "cuda" and importlib.util.find_spec("spikingjelly._ops.plif._C") is None:
        return "SpikingJelly was installed without its native operators"
    if implementation == "triton" and importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    return ""


def run(step: Step, folder: Path, seconds: float) -> Outcome:
    """Run a step, and wait for at most so many ``seconds``."""
    path = folder / f"{slug(step.name)}.txt"
    # What it printed is there where it is killed, and where it dies in a library.
    whole = {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
    error, start = "", time.monotonic()
    with path.open("w", encoding="utf-8") as output:
        try:
            code = subprocess.run(
                [sys.executable, *step.arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **whole, **step.environment},
                timeout=seconds,
            ).returncode
            if code:
                error = f"exit code {code}" if code > 0 else signal.Signals(-code).name
        except subprocess.TimeoutExpired:
            error = f"stopped after {seconds:.0f} s (--minutes gives more)"
    took = time.monotonic() - start
    text = path.read_text(encoding="utf-8", errors="replace").strip()
    if error:
        error = ": ".join([error, *text.splitlines()[-1:]])
    return Outcome(step, FAILED if error else PASSED, error, took, text)


def slug(name: str) -> str:
    """A name for files and folders.

    >>> slug("NVIDIA H100 80GB HBM3"), slug("../a b/")
    ('nvidia-h100-80gb-hbm3', 'a-b')
    """
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:80] or "machine"


# ---- the page and the CSV ----


def write(folder: Path, machine: str, device: str, done: Sequence[Outcome]) -> None:
    """The page and the CSV of what is done so far."""
    commit, packages = doctor.commit() or "", doctor.installed()
    versions = {"sj-taid": __version__, **packages, "cuda": torch.version.cuda}
    facts = {"device": machine, "commit": commit}
    facts |= {f"{name}_version": number or "" for name, number in versions.items()}
    tables = {
        path.stem: [*csv.DictReader(path.open(newline="", encoding="utf-8"), restval="")]
        for pattern in SHOWN
        for path in sorted(folder.glob(pattern))
    }
    rows = [
        {
            "step": one.step.name,
            "outcome": one.outcome,
            "seconds": f"{one.seconds:.1f}",
            "error": one.error,
            "command": one.step.command,
            **facts,
        }
        for one in done
    ]
    rows += [{"step": name, **facts, **row} for name, table in tables.items() for row in table]
    columns = dict.fromkeys(key for row in rows for key in row)
    with (folder / f"{folder.name}.csv").open("w", newline="", encoding="utf-8") as file:
        whole = csv.DictWriter(file, list(columns))
        whole.writeheader()
        whole.writerows(rows)
    lines = page(machine, device, done, rows[: len(done)], tables)
    (folder / "prove.md").write_text("\n".join([*lines, ""]), encoding="utf-8")


def page(
    machine: str,
    device: str,
    done: Sequence[Outcome],
    rows: Sequence[Mapping[str, str]],
    tables: Mapping[str, Sequence[Mapping[str, str]]],
) -> Iterator[str]:
    """The lines of the page: how each step ended, what failed and why, then what was found."""
    counts = {name: sum(one.outcome == name for one in done) for name in (PASSED, FAILED, SKIPPED)}
    said = ", ".join(f"{count} {name}" for name, count in counts.items())
    yield f"# {machine}: {said}"
    yield ""
    commit = doctor.commit() or "not a checkout"
    yield f"`sj-taid prove --device {device}`, sj-taid {__version__}, commit: {commit}"
    yield ""
    yield from table(rows, ("step", "outcome", "seconds", "error"))
    for one in done:
        if one.outcome == FAILED:
            yield from ("", f"## {one.step.name} failed: {one.error}", "", f"`{one.step.command}`")
            yield from ("", one.step.hint) if one.step.hint else ()
            yield from quoted("\n".join(one.output.splitlines()[-40:]))
    for one in done:
        if one.step.name in ("doctor", "kernel") and one.outcome == PASSED:
            yield from ("", f"## {one.step.name}", *quoted(one.output))
    for name, found in tables.items():
        yield from ("", f"## {name}", "")
        (columns,) = (
            shown for pattern, shown in SHOWN.items() if Path(f"{name}.csv").match(pattern)
        )
        if name.startswith("conformance"):
            wrong = [row for row in found if row["outcome"] != "equal"]
            equal = len(found) - len(wrong)
            yield f"{equal} of the {len(found)} cases that ran equal the definition."
            yield from ("", *table(wrong, columns.split())) if wrong else ()
        else:
            yield from table(found, columns.split())


def table(rows: Sequence[Mapping[str, str]], columns: Sequence[str]) -> Iterator[str]:
    """In Markdown."""
    yield f"| {' | '.join(columns)} |"
    yield f"|{'---|' * len(columns)}"
    for row in rows:
        cells = (" ".join(row.get(name, "").split()).replace("|", r"\|") for name in columns)
        yield f"| {' | '.join(cells)} |"


def quoted(text: str) -> Iterator[str]:
    """As it is, in Markdown."""
    yield from ("", "~~~text", text, "~~~")


if __name__ == "__main__":
    raise SystemExit(main())
