"""A headless Chromium: one on the path, or named by BENTHIC_CHROMIUM; Playwright drives it."""

import os
import shutil

import pytest

CHROMIUM = os.environ.get("BENTHIC_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def browser():
    """For a module, no longer: while Playwright runs, its thread has a running event loop, and asyncio no other."""
    sync_api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()
