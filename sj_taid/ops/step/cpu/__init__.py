"""Backend "numba": ``loops`` computes, ``threads`` distributes, ``operators`` takes tensors."""

from numba import config

if config.DISABLE_JIT:  # type: ignore[attr-defined]
    raise ImportError("NUMBA_DISABLE_JIT is set, so numba compiles nothing")

from .operators import ENGINE as ENGINE
from .operators import multi_step as multi_step
from .operators import unsupported as unsupported
