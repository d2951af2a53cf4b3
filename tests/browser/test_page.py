"""The page in headless Chromium, against the real process: by mouse and keyboard, on a phone, in the dark."""

import re

import pytest

sync_api = pytest.importorskip("playwright.sync_api")
WAIT_MS = 60_000
"""Long, for a machine that does other things too."""


def expect(locator):
    sync_api.expect.set_options(timeout=WAIT_MS)
    return sync_api.expect(locator)


@pytest.fixture
def open_page(browser, server):
    """Opens the page; at the end, nothing has gone wrong in it and nothing was asked of anybody else."""
    contexts, wrong, asked = [], [], []

    def open_(url=server.url, **settings):
        context = browser.new_context(**settings)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(WAIT_MS)
        page.wrong = wrong
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        page.on("request", lambda request: asked.append(request.url))
        page.goto(url)
        expect(page.locator("#model option")).not_to_have_count(0)
        return page

    yield open_
    for context in contexts:
        context.close()
    assert wrong == []
    assert all(address.startswith(server.url) for address in asked)


def set_to(page, **settings):
    page.click("#show-settings")
    for field, value in settings.items():
        page.fill(f"#{field}", str(value))
    page.click("#show-settings")


def say(page, text):
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")


def answered(page, answers=1):
    expect(page.locator("#messages .assistant")).to_have_count(answers)
    expect(page.locator(".busy")).to_have_count(0)
    return page.locator("#messages .assistant .said").last.text_content()


def test_a_conversation(open_page):
    page = open_page()
    set_to(page, temperature=1, max_tokens=20, seed=7)
    say(page, "hello <b>there</b>")
    first = answered(page)
    assert first
    assert page.locator("#messages .user .said").text_content() == "hello <b>there</b>"
    assert page.locator("#messages b").count() == 0
    speed = page.locator("#speed").text_content()
    assert re.search(r"[\d.]+ tokens/s · first after [\d.]+ s · ", speed)
    assert "MTP drafts" in speed
    page.click("#again")
    assert answered(page) == first  # the same seed
    assert page.locator("#messages li").count() == 2
    page.reload()
    assert answered(page) == first  # remembered
    page.click("#new")
    assert page.locator("#messages li").count() == 0
    page.click("#conversations .open")
    assert page.locator("#messages li").count() == 2
    page.locator("#conversations .drop").first.click()
    assert page.locator("#conversations li").count() == 0
    page.reload()
    assert page.locator("#conversations li").count() == 0
    assert page.input_value("#seed") == "7"


def test_stopping(open_page, server):
    page = open_page()
    set_to(page, max_tokens=400, temperature=2, seed=1)
    page.focus("#prompt")
    say(page, "hello")
    expect(page.locator("#messages .assistant .said")).not_to_be_empty()
    page.keyboard.press("Escape")
    answered(page)
    assert page.is_enabled("#send")
    with server.http() as http:
        page.wait_for_timeout(1000)
        assert http.get("/status").json()["models"][0]["running"] == 0


def test_errors_are_told(open_page):
    page = open_page()
    set_to(page, max_tokens=5)
    say(page, "x y " * 2000)
    expect(page.locator("#error")).to_contain_text("tokens")
    assert page.locator("#messages .assistant").count() == 0
    assert [text for text in page.wrong if "400" not in text] == []
    page.wrong.clear()  # Chromium itself tells of the 400


def test_the_status_view(open_page, server):
    page = open_page()
    page.click("#show-status")
    page.wait_for_selector("#status table")
    text = page.locator("#status table").text_content()
    for word in ("Running", "Waiting", "Cache in use", "Throughput", "tokens/s", "MTP drafts accepted"):
        assert word in text
    assert page.is_hidden("#chat")
    page.click("#show-chat")
    assert page.is_visible("#prompt")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_have_contrast(open_page, scheme):
    page = open_page(color_scheme=scheme)
    set_to(page, max_tokens=5)
    say(page, "hello")
    answered(page)
    for selector in (
        "body",
        "#messages .user .said",
        "#messages .assistant .said",
        ".who",
        "#send",
        "#keys",
        "#prompt",
    ):
        assert page.evaluate(CONTRAST, selector) >= 4.5, selector


CONTRAST = """selector => {
  const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = (colour) => {
    const [r, g, b] = numbers(colour).slice(0, 3).map((c) => c / 255)
      .map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const element = document.querySelector(selector);
  let ground = element;
  while (numbers(getComputedStyle(ground).backgroundColor)[3] === 0) ground = ground.parentElement;
  const pair = [light(getComputedStyle(element).color), light(getComputedStyle(ground).backgroundColor)];
  return (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
}"""


def test_on_a_phone(open_page):
    page = open_page(viewport={"width": 360, "height": 640}, has_touch=True, is_mobile=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.is_hidden("#history")
    page.tap("#menu")
    assert page.is_visible("#new")
    assert page.get_attribute("#menu", "aria-expanded") == "true"
    page.tap("#new")
    assert page.is_hidden("#history")
    box = page.locator("#send").bounding_box()
    assert box["y"] + box["height"] <= 640
    assert box["height"] >= 38


def test_by_keyboard_alone(open_page):
    page = open_page()
    reached = []
    for _ in range(16):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.className"))
    for control in ("skip", "model", "show-chat", "show-status", "show-settings", "new", "prompt", "send"):
        assert control in reached
    unnamed = page.evaluate("""[...document.querySelectorAll('button, input, select, textarea')].filter((one) =>
      !(one.labels?.length || one.textContent.trim() || one.getAttribute('aria-label'))).map((one) => one.id)""")
    assert unnamed == []


def test_with_a_key(browser, served_model):
    from serving import Server

    locked = Server(f"small={served_model}", "--api-key", "open sesame")
    page = browser.new_page()
    page.set_default_timeout(WAIT_MS)
    page.goto(locked.url)
    expect(page.locator("#error")).to_contain_text("API key")
    page.fill("#key", "open sesame")
    page.press("#key", "Tab")
    expect(page.locator("#model option")).to_have_count(1)
    page.close()
    assert locked.terminate() == 0
