"""The page in a real browser: drawn, silent, offline, inert, readable on a phone, printable."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import pytest
from selenium.webdriver import ActionChains, Chrome
from selenium.webdriver.support.ui import WebDriverWait

from tests.browser import BROWSER, requests, show

pytestmark = [pytest.mark.browser, pytest.mark.skipif(BROWSER is None, reason="no chromium on the PATH")]

SCENARIOS = ("clear", "diverged", "hostile", "many")


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_figure_is_drawn_and_nothing_is_fetched_or_complained_of(
    chrome: Chrome, pages: dict[str, Path], name: str
) -> None:
    show(chrome, pages[name])
    figures = chrome.execute_script("return document.querySelectorAll('figure').length")
    marks = "f.querySelector('.plot .mark-symbol path, .plot .mark-line path')"
    with_marks = f"return [...document.querySelectorAll('figure')].filter(f => {marks}).length"
    assert chrome.execute_script(with_marks) == figures == 4
    asked = requests(chrome)
    assert pages[name].as_uri() in asked
    assert [url for url in asked if url.split(":")[0] not in ("file", "data", "blob")] == []
    assert chrome.get_log("browser") == []


def test_hostile_names_do_nothing(chrome: Chrome, pages: dict[str, Path]) -> None:
    show(chrome, pages["hostile"])  # an alert would make every later command fail
    assert chrome.execute_script("return document.querySelectorAll('img[src=x], b').length") == 0
    assert chrome.execute_script("return document.scripts.length") == 2
    texts = "return [...document.querySelectorAll('.plot .mark-text text')].map(text => text.textContent)"
    assert "</script><script>al…" in chrome.execute_script(texts)
    chrome.execute_script(
        "const s = document.createElement('script'); s.text = 'window.intruded = 1'; document.body.append(s)"
    )
    assert chrome.execute_script("return window.intruded") is None  # the policy holds for what gets in all the same


def test_hovering_tells_of_the_nearest_point_as_text(chrome: Chrome, pages: dict[str, Path]) -> None:
    show(chrome, pages["hostile"])
    drawing = chrome.find_element("css selector", "#loss-steps .plot svg")
    chrome.execute_script("arguments[0].scrollIntoView()", drawing)
    ActionChains(chrome).move_to_element_with_offset(drawing, 0, 60).perform()
    tip = "document.querySelector('.vg-tooltip.visible')"
    shown = f"return {tip} && [{tip}.textContent, {tip}.children.length]"
    text, children = WebDriverWait(chrome, 20).until(lambda driver: driver.execute_script(shown))
    assert re.fullmatch(r".+ at \d+: \d\.\d{3} \(\d\.\d{3}–\d\.\d{3}\)", text)
    assert children == 0


def test_figures_and_their_points_can_be_read_aloud(chrome: Chrome, pages: dict[str, Path]) -> None:
    show(chrome, pages["clear"])
    told = "return [...document.querySelectorAll('#loss-steps [aria-label]')].map(e => e.getAttribute('aria-label'))"
    whole, *parts = chrome.execute_script(told)
    assert whole.startswith("Loss by steps. Loss on held-out data")
    axes, points = parts[:2], parts[2:]
    assert [text.split("'")[1] for text in axes] == ["optimizer steps", "evaluation loss"]
    assert {text.split(" at ")[0] for text in points} == {"adamw", "muon", "muonadam"}


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_phone_never_scrolls_sideways(chrome: Chrome, pages: dict[str, Path], name: str) -> None:
    show(chrome, pages[name], width=375, height=812)
    width, shown = chrome.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    assert width <= shown == 375
    outside = (
        "return [...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right > 376).length"
    )
    assert chrome.execute_script(outside) == 0


@pytest.mark.parametrize("name", ["clear", "many", "hostile"])  # "many" has the column of accuracies
def test_the_table_fits_the_page_on_a_desktop(chrome: Chrome, pages: dict[str, Path], name: str) -> None:
    show(chrome, pages[name])
    box = "const box = document.querySelector('.scroll'); return [box.scrollWidth, box.clientWidth]"
    needed, there = chrome.execute_script(box)
    assert needed <= there


def test_names_too_long_to_stand_beside_a_curve_are_in_a_key(chrome: Chrome, pages: dict[str, Path]) -> None:
    show(chrome, pages["hostile"], width=375, height=812)
    assert (
        chrome.execute_script("return getComputedStyle(document.querySelector('#loss-steps .key')).display") == "flex"
    )
    show(chrome, pages["clear"], width=375, height=812)
    assert (
        chrome.execute_script("return getComputedStyle(document.querySelector('#loss-steps .key')).display") == "none"
    )


def test_a_dark_page_has_light_text_and_dark_figures(chrome: Chrome, pages: dict[str, Path]) -> None:
    show(chrome, pages["clear"], theme="dark")
    paper = "return getComputedStyle(document.body).backgroundColor"
    texts = "[...document.querySelectorAll('#loss-steps .plot text')]"
    label = f"return {texts}.find(text => text.textContent == 'muonadam').getAttribute('fill')"
    assert chrome.execute_script(paper) == "rgb(20, 23, 27)"
    dark = chrome.execute_script(label)
    show(chrome, pages["clear"])
    assert chrome.execute_script(label) != dark


def test_print_shows_the_static_figures(chrome: Chrome, pages: dict[str, Path]) -> None:
    show(chrome, pages["clear"])
    pdf = base64.b64decode(chrome.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})["data"])
    assert pdf.startswith(b"%PDF")
    assert pdf.count(b"/Subtype /Image") >= 4
    chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    displays = "return ['img', '.plot'].map(s => getComputedStyle(document.querySelector('figure ' + s)).display)"
    assert chrome.execute_script(displays) == ["block", "none"]


def test_without_scripts_the_static_figures_stay(chrome: Chrome, pages: dict[str, Path]) -> None:
    chrome.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        chrome.get(pages["clear"].as_uri())
        shot = base64.b64decode(
            chrome.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})["data"]
        )
        assert len(shot) > 50_000
        assert chrome.find_element("css selector", "figure img").is_displayed()
        assert not chrome.find_element("css selector", "figure .plot").is_displayed()
    finally:
        chrome.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
