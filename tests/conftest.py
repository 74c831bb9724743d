"""Fixtures shared by all tests: a seeded generator and one thread, so that a failure repeats; signals; a browser."""

import signal

import pytest
import torch


@pytest.fixture(autouse=True)
def _deterministic():
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(20260101)


@pytest.fixture(scope="session")
def chrome(tmp_path_factory):
    """A real browser, for tests that are marked so."""
    from tests.browser import started

    driver = started(tmp_path_factory.mktemp("profile"))
    yield driver
    driver.quit()


@pytest.fixture(autouse=True, scope="session")
def _signals_as_from_a_terminal():
    """Under nohup, or in the background of a script, a test's processes would inherit that these are ignored."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGHUP)}
    for number, handler in before.items():
        if handler is signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number is signal.SIGINT else signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
