"""The reports of all scenarios, written once for all tests of the page; and a browser."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium.webdriver import Chrome, ChromeOptions, ChromeService

from steepest.lab.studies.report import write_report
from tests.lab.browser import BROWSER, FLAGS
from tests.lab.synthetic import SCENARIOS, SWEEPS, write_scenario


@pytest.fixture(scope="session")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    names = (*SCENARIOS, *SWEEPS)
    return {name: write_report(write_scenario(tmp_path_factory.mktemp(name), name)) for name in names}


@pytest.fixture(scope="session")
def chrome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    options = ChromeOptions()
    options.binary_location = BROWSER or ""
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = Chrome(options=options, service=ChromeService(shutil.which("chromedriver") or "chromedriver"))
    yield driver
    driver.quit()
