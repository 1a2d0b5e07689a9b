"""Run the kernels under the address and undefined-behaviour sanitizers.

    LD_PRELOAD="libasan.so libubsan.so" python -m tests.ops.step.sanitized DIRECTORY

Tensors come from malloc, whose blocks the sanitizer guards at their exact size. The cases cover
every pair of the options that decide which memory a kernel accesses. At the end one thread too many
works, which the sanitizer must find.
"""

import os
import sys
from pathlib import Path

import torch

from tests.helpers import results
from tests.ops.step.conformance import OPTIONS, make_case, pairwise, tensors_off_threshold
from tests.ops.step.host import Host

MEMORY = {name: OPTIONS[name] for name in ("layout", "per_channel", "v_init", "norm", "pack")}
# One sweep, and segments of which the last is cut short; bfloat16 is as wide as float16.
MEMORY |= {"T": (1, 7, 29), "dtype": (torch.float32, torch.float16), "frozen": ((), ("x",))}


def run_alone(engine, x, packed):
    """The kernels that no neuron's call launches."""
    spikes = torch.empty(len(x), x[0].numel(), dtype=x.dtype)
    if packed is not None:
        engine.unpack_into(packed, spikes)
        assert torch.equal(engine.pack(spikes), packed)
    counts = torch.randint(0, 15, (1, x.numel())).to(x.dtype)
    back = torch.empty_like(counts)
    engine.unpack_into(engine.pack(counts, 14), back)
    assert torch.equal(back, counts)


def main(directory):
    del os.environ["LD_PRELOAD"]  # for the compiler, which it would slow down
    flags = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")

    def overrun(source):
        broken = source.replace("thread >= c.threads", "thread > c.threads")
        return broken.replace("at < size", "at <= size")

    fixed = {name: values[:1] for name, values in OPTIONS.items()}
    cases = [make_case(row) for row in pairwise(fixed | MEMORY)]
    for edit, chosen in ((str, cases), (overrun, cases[:1])):
        host = Host(Path(directory), edit, flags)
        with host.patched():
            host.build({name for case in chosen for name in host.kernels(case)})
            for case in chosen:
                leaves = tensors_off_threshold(case)
                got = results(host.cuda.multi_step, case, leaves)
                run_alone(host.cuda.ENGINE, leaves["x"].detach(), got.get("bits"))
        print(len(host.launches), "clean launches", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
