"""Fixtures shared with the tests of training."""

from tests.training.conftest import cache as cache
from tests.training.conftest import runs as runs
from tests.training.conftest import tiny as tiny
from tests.training.conftest import trained as trained
