"""Backend "numba": ``loops`` computes, ``threads`` distributes, ``operators`` takes tensors."""

from .operators import multi_step as multi_step
from .operators import unsupported as unsupported
