"""Backend "numba": ``loops`` is the arithmetic, ``threads`` who runs it, ``operators`` its use."""

from .operators import multi_step as multi_step
from .operators import unsupported as unsupported
