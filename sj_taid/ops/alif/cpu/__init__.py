"""Backend "numba": ``loops`` computes, ``threads`` distributes, ``operators`` takes tensors."""

from .operators import ENGINE as ENGINE
from .operators import multi_step as multi_step
from .operators import unsupported as unsupported
