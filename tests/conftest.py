"""Shared fixtures."""

import gc
import multiprocessing

import pytest
import torch
import yaml

# Looking for garbage among so many new modules takes a quarter of the time that collecting does.
gc.disable()

# Configs are composed hundreds of times; libyaml needs two thirds of the time for the same.
yaml.SafeLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

# Tests start processes by "forkserver", from one that has imported these once: seconds less each.
# It keeps the environment of its start, and what does not import is left out.
multiprocessing.set_forkserver_preload(["lightning", "sj_taid.training.train"])


@pytest.fixture(autouse=True)
def _reproducible():
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    # Files with slow tests first: none of them is then the last that one process alone runs.
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU: torch.cuda.is_available() is False")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


def pytest_collection_finish():
    gc.freeze()  # the modules and tests, which stay
    gc.enable()
