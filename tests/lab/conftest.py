"""The reports of all scenarios, written once for all tests of the page."""

from pathlib import Path

import pytest

from steepest.lab.studies.report import write_report
from tests.lab.synthetic import SCENARIOS, SWEEPS, write_scenario


@pytest.fixture(scope="session")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    names = (*SCENARIOS, *SWEEPS)
    return {name: write_report(write_scenario(tmp_path_factory.mktemp(name), name)) for name in names}
