"""Ranks for hosts that train on several; and hosts that ask no network."""

import os

import pytest

from tests.processes import World

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}


@pytest.fixture(scope="session")
def pair():
    """Two ranks."""
    world = World(2)
    yield world
    world.end()
