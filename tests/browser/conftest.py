"""A real browser: the Chromium of the system, driven by Playwright."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Page

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
IS_REQUIRED = "BRAINTUMOR_TEST_BROWSER"
# As root in a container; and nothing asks for servers outside of this machine.
OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
SIZE = {"width": 1280, "height": 1000}


@pytest.fixture(scope="session")
def chromium() -> str:
    """The browser's program; without one the test is skipped, or fails where BRAINTUMOR_TEST_BROWSER asks for it."""
    program = next((found for name in CHROMIUM if (found := shutil.which(name))), None)
    if program is None and os.environ.get(IS_REQUIRED):
        pytest.fail(f"{IS_REQUIRED} is set, and there is no Chromium; apt install chromium")
    if program is None:
        pytest.skip("there is no Chromium on this machine; apt install chromium")
    return program


@pytest.fixture
def log_in(chromium: str) -> Iterator[Callable[[str, str], "Page"]]:
    """Ask for a page of somebody who is logged in, by name and password."""
    from playwright.sync_api import sync_playwright

    with ExitStack() as stack:
        browser = stack.enter_context(sync_playwright()).chromium.launch(executable_path=chromium, args=OPTIONS)
        stack.callback(browser.close)

        def open_page(name: str, password: str) -> "Page":
            who = {"username": name, "password": password}
            context = browser.new_context(http_credentials=who, viewport=SIZE, locale="en-GB")  # type: ignore[arg-type]
            context.set_default_timeout(60_000)
            return context.new_page()

        yield open_page
