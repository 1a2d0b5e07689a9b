"""Prove on this machine that the fused kernels are right, and time them: ``make gpu``.

    python experiments/prove.py [--device cpu] [--minutes 20] [--out FOLDER]

Each step is a process of its own with a time limit, so a kernel that fails, hangs or breaks the
GPU's context does not stop the next step. FOLDER/MACHINE then holds prove.md, to paste into an
issue, the CSVs of the benchmarks, and what each step printed. prove.md is rewritten after every
step, so it is there whatever happens. The exit code is 0 if all steps passed.
"""

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch

from sj_taid import __version__, doctor
from sj_taid.ops import backends
from sj_taid.training.compare import markdown

ROOT = Path(__file__).resolve().parents[1]

SEW_RESNET18 = "any_net:sew_resnet18 --shape 4 112 3 224 224 --dtype bfloat16 --repeats 10"

#: neurons that are no LIF, each behind a norm
OTHERS = ("klif", "qif", "clif", "izhikevich", "ternary")


def other_neurons(shape: str, repeats: int) -> dict[str, str]:
    """Steps that compare each of them with its plain class, and time both."""
    options = f"--shape {shape} --repeats {repeats}"
    return {f"any_net {name}": f"any_net:{name} {options}" for name in OTHERS}


#: Options of the steps. On a GPU each of them should take a minute at most.
SIZES = {
    "cuda": {
        "neuron": "--dtypes float32 bfloat16 --steps 4 16 --neurons 262144 4194304 "
        "--only cupy 'SpikingJelly LIF' PLIF",
        "frontier": "--nets sew_resnet18 --steps 8 --batch 32 --neurons PLIF --levels 0 1",
        "any_net norm_and_neuron": "any_net:norm_and_neuron --shape 8 32 128 14 14 --repeats 20",
        **other_neurons("8 32 128 14 14", 20),
        "any_net sew_resnet18": SEW_RESNET18,
        "any_net spikformer": "any_net:spikformer --shape 4 64 3 32 32 --dtype bfloat16 "
        "--repeats 10",
        # Last: compiling takes longest, and may fail where the net as it is runs.
        "any_net sew_resnet18 --compile": f"{SEW_RESNET18} --compile",
    },
    "cpu": {
        "neuron": "--steps 4 16 --neurons 4096 65536 --repeats 5 "
        "--only numba 'SpikingJelly LIF' PLIF",
        "frontier": "--nets spiking_vgg11_bn --dtypes float32 --steps 4 --neurons PLIF --repeats 3",
        "any_net norm_and_neuron": "any_net:norm_and_neuron --shape 4 8 128 14 14 --repeats 3",
        **other_neurons("4 4 128 8 8", 3),
        "any_net sew_resnet18": "any_net:sew_resnet18 --shape 4 2 3 64 64 --repeats 3",
    },
}

#: The tests, with pytest's options, that compare a device's backend with the definition in a dtype.
CONFORMANCE = {
    "cuda": "tests/ops/step/test_gpu.py -m 'conforms and {}'",
    "cpu": "tests/ops/step/test_cpu.py tests/ops/step/test_norm.py -m 'conforms and {}'",
}

OUTCOMES = PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"


class Step(NamedTuple):
    """Arguments of Python, run in the root of the checkout."""

    name: str
    arguments: Sequence[str]
    environment: Mapping[str, str] = {}

    @property
    def command(self) -> str:
        """The command line, as one types it."""
        variables = [f"{name}={value}" for name, value in self.environment.items()]
        return shlex.join([*variables, "python", *self.arguments])


class Result(NamedTuple):
    """How a step ended."""

    step: Step
    outcome: str
    error: str = ""
    seconds: float = 0.0
    output: str = ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the steps and write the page; 1 if one of them did not pass."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=SIZES, default="cuda")
    parser.add_argument("--minutes", type=float, default=20.0, help="for all steps together")
    parser.add_argument("--out", type=Path, default="prove-results", help="a folder")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("torch finds no GPU here, so nothing was run:")
        print(doctor.check_backend("cupy")[1])
        print("What a CPU can do of it: python experiments/prove.py --device cpu")
        return 1
    machine = torch.cuda.get_device_name() if options.device == "cuda" else doctor.cpu_name()
    folder = options.out.absolute() / slug(machine)
    folder.mkdir(parents=True, exist_ok=True)
    for name in SIZES[options.device]:  # of an earlier run
        (folder / f"{name.replace(' ', '-')}.csv").unlink(missing_ok=True)
    results: list[Result] = []
    end = time.monotonic() + 60 * options.minutes
    for step in steps(options.device, folder):
        left = end - time.monotonic()
        if left <= 0:
            results.append(Result(step, SKIPPED, f"the {options.minutes:g} minutes are used up"))
        else:  # a step that hangs leaves time for the others
            results.append(run(step, folder, min(left, 60 * options.minutes / 4)))
        print(f"{results[-1].outcome:8}  {step.name}  {results[-1].error}".rstrip(), flush=True)
        page = make_page(machine, options.device, results, folder)
        (folder / "prove.md").write_text(page, encoding="utf-8")
    print(f"attach to an issue: {folder / 'prove.md'} and the CSVs next to it")
    return 0 if all(result.outcome == PASSED for result in results) else 1


def steps(device: str, folder: Path) -> Iterator[Step]:
    """The steps for a device, in order."""
    (backend,) = backends.PREFERENCE[device]
    contract = {backends.ENVIRONMENT_VARIABLE: backend}  # that backend, or an error
    yield Step("doctor", ("-m", "sj_taid.doctor"))
    if device == "cuda":
        yield Step("registers", ("-m", "tests.ops.step.nvrtc"))
    half = ("float16", "bfloat16") if device == "cuda" else ("bfloat16",)  # all the loops take
    for dtype in ("float32", *half):
        tests = shlex.split(CONFORMANCE[device].format(dtype))
        # -v names a case before it runs, also one that never ends.
        yield Step(f"conformance {dtype}", ("-m", "pytest", "-v", *tests))
    for name, options in SIZES[device].items():
        script = f"experiments/benchmark/{name.partition(' ')[0]}.py"
        where = ("--device", device, "--out", str(folder))
        yield Step(name, (script, *where, *shlex.split(options)), contract)


def run(step: Step, folder: Path, seconds: float) -> Result:
    """Run a step for at most so many ``seconds``."""
    path = folder / f"{slug(step.name)}.txt"
    # So that the output is complete if the step is killed or crashes in a library.
    unbuffered = {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
    error, start = "", time.monotonic()
    with path.open("w", encoding="utf-8") as output:
        try:
            code = subprocess.run(
                [sys.executable, *step.arguments],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **unbuffered, **step.environment},
                timeout=seconds,
            ).returncode
            if code:
                error = f"exit code {code}" if code > 0 else signal.Signals(-code).name
        except subprocess.TimeoutExpired:
            error = f"stopped after {seconds:.0f} s (--minutes gives more)"
    duration = time.monotonic() - start
    text = path.read_text(encoding="utf-8", errors="replace").strip()
    if error:
        error = ": ".join([error, *text.splitlines()[-1:]])
    return Result(step, FAILED if error else PASSED, error, duration, text)


def slug(name: str) -> str:
    """A name for files and folders.

    >>> slug("NVIDIA H100 80GB HBM3"), slug("../a b/")
    ('nvidia-h100-80gb-hbm3', 'a-b')
    """
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:80] or "machine"


# ---- the page ----


def make_page(machine: str, device: str, results: Sequence[Result], folder: Path) -> str:
    """The page in Markdown: how each step ended, what failed and why, then the tables."""
    counts = Counter(result.outcome for result in results)
    packages = doctor.installed() | {"cuda": torch.version.cuda}
    commit = doctor.commit() or "not a checkout"
    rows = [(r.step.name, r.outcome, f"{r.seconds:.1f}", r.error) for r in results]
    table = pd.DataFrame(rows, columns=["step", "outcome", "seconds", "error"])
    parts = [
        f"# {machine}: " + ", ".join(f"{counts[name]} {name}" for name in OUTCOMES),
        f"`experiments/prove.py --device {device}`, sj-taid {__version__}, commit: {commit}",
        ", ".join(f"{name} {number}" for name, number in packages.items() if number),
        markdown(table.replace(r"\|", r"\\|", regex=True)),
    ]
    for result in results:
        step = result.step
        if result.outcome == FAILED:
            tail = "\n".join(result.output.splitlines()[-40:])
            parts += [f"## {step.name} failed: {result.error}", f"`{step.command}`"]
            parts += [f"~~~text\n{tail}\n~~~"]
        elif step.arguments[0] == "-m":  # no benchmark
            shown = result.output.splitlines()[-1] if "pytest" in step.arguments else result.output
            parts += [f"## {step.name}", f"~~~text\n{shown}\n~~~"]
    for path in sorted(folder.glob("*.csv")):
        table = pd.read_csv(path, dtype=str, keep_default_na=False).fillna("")
        # What follows is the same in every row.
        measured = table.loc[:, :"device"].drop(columns="device")
        parts += [f"## {path.stem}", markdown(measured)]
    return "\n\n".join(parts)


if __name__ == "__main__":
    raise SystemExit(main())
