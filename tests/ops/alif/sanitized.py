"""Run the kernels under the address and undefined-behaviour sanitizers.

    LD_PRELOAD="libasan.so libubsan.so" python -m tests.ops.alif.sanitized DIRECTORY [--broken]

Tensors come from malloc, whose blocks the sanitizer guards at their exact size. The cases cover
every pair of the options that decide which memory a kernel accesses. ``--broken`` lets one thread
too many work, to show that it would be found.
"""

import sys
from pathlib import Path

from sj_taid.ops.alif import kernels
from tests.helpers import results
from tests.ops.alif.conformance import OPTIONS, make_case, pairwise, tensors_off_threshold
from tests.ops.alif.host import Host

MEMORY = ("T", "dtype", "layout", "per_channel", "v_init", "through", "frozen", "norm", "pack")


def main(directory, broken=None):
    source = kernels.source()
    if broken:
        source = source.replace("thread >= threads", "thread > threads").replace(
            "at < size", "at <= size"
        )
    flags = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    host = Host(Path(directory), source, flags)
    options = {name: OPTIONS[name] if name in MEMORY else OPTIONS[name][:1] for name in OPTIONS}
    cases = [make_case(row) for row in pairwise(options)][: 1 if broken else None]
    with host.patched():
        host.build({name for case in cases for name in host.kernels(case)})
        for case in cases:
            results(host.cuda.multi_step, case, tensors_off_threshold(case))
    print(len(cases), "cases,", len(host.launches), "launches")


if __name__ == "__main__":
    main(*sys.argv[1:])
