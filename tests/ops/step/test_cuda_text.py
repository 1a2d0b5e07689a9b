"""Every operation of a step's text in CUDA C by itself, built for the host, against torch."""

import ctypes
import subprocess
from functools import cache, partial

import numpy as np
import pytest
import torch

from sj_taid.ops.step import cuda_text, kernels
from tests.ops.step.as_on_cuda import AsOnCuda
from tests.ops.step.host import FLAGS, GXX, PRELUDE, needs_gxx
from tests.ops.step.test_text import CASES, COMPOSED, check, read

pytestmark = needs_gxx

FUNCTIONS = [function for found in (*CASES.values(), *COMPOSED.values()) for function in found]
#: a step of one state in a namespace of its own, and what runs it on rows of numbers
_STEP = """\
namespace step_{k} {{
using namespace frame;
constexpr int STATES = 1, OPERANDS = 0, TOTALS = 0;
{text}
PUBLIC void run_{k}(int size, const float* c, const float* x, const float* s, const float* g,
                    const float* g0, float* output, float* state, float* grad_x, float* grad_s) {{
  for (int i = 0; i < size; ++i) {{
    const float none[1][1] = {{}};
    float v[1][1] = {{{{s[i]}}}}, grad[1][1] = {{{{g0[i]}}}}, total[1][1];
    grad_x[i] = step_backward<0>(x[i], v, none, c, g[i], grad, total, 0, 0);
    grad_s[i] = grad[0][0];
    output[i] = step_forward(x[i], v, none, c, 0, 0);
    state[i] = v[0][0];
  }}
}}
}}
"""


@cache
def programs():
    """Those of all cases."""
    return [*dict.fromkeys(read(function).program for function in FUNCTIONS)]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """All of them, compiled together."""
    unit = tmp_path_factory.mktemp("operations") / "steps.cpp"
    texts = map(cuda_text.step_text, programs())
    steps = "".join(_STEP.format(k=k, text=text) for k, text in enumerate(texts))
    frame = kernels.source().partition("// A batch norm, ")[0]
    unit.write_text(
        f'#include "{PRELUDE}"\nnamespace frame {{\nusing ::load_word;\n{frame}}}\n{steps}'
    )
    subprocess.run([GXX, *FLAGS, unit, "-o", unit.with_suffix(".so")], check=True)
    return ctypes.CDLL(str(unit.with_suffix(".so")))


def run(library, reading, given, shape):
    """The outputs and gradients of input and state, by a step's text."""
    rows = [np.ascontiguousarray(given[n], np.float32) for n in ("x", "s0", "g", "g0")]
    found = [np.full_like(rows[0], np.nan) for _ in range(4)]
    constants = np.array(reading.constants, np.float32)
    pointer = ctypes.POINTER(ctypes.c_float)
    arrays = (a.ctypes.data_as(pointer) for a in (constants, *rows, *found))
    getattr(library, f"run_{programs().index(reading.program)}")(rows[0].size, *arrays)
    return [torch.from_numpy(values).view(shape) for values in found]


@pytest.mark.parametrize("op", cuda_text._EXPRESSIONS)
def test_an_operation_equals_torchs(library, op):
    with AsOnCuda():
        found = [check(f, partial(run, library), rounds=True) for f in CASES[op]]
    assert op in set().union(*found)


@pytest.mark.parametrize("name", COMPOSED)
def test_what_becomes_several_lines_equals_torchs(library, name):
    with AsOnCuda():
        for function in COMPOSED[name]:
            check(function, partial(run, library), rounds=True)
