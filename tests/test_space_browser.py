"""The Space in a real browser, at a desktop's and a phone's width; screenshots go to out/screenshots."""

import re
import shutil
from pathlib import Path

import answers
import app
import memory
import pytest
from playwright.sync_api import expect, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SCREENSHOTS = Path(__file__).parents[1] / "out" / "screenshots"
MODEL = app.MODEL

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no browser. Fix: apt-get install chromium")


@pytest.fixture(scope="module")
def address(smollm2_folder):
    answers.load()
    demo = app.build()
    _, url, _ = app.launch(demo, prevent_thread_lock=True, quiet=True)
    yield url
    demo.close()


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=[1280, 390], ids=["desktop", "phone"])
def page(request, browser, address):
    """The page, loaded; afterwards: it asked no other server, and nothing failed in it."""
    context = browser.new_context(viewport={"width": request.param, "height": 900})
    page, asked, failed = context.new_page(), [], []
    page.set_default_timeout(60_000)
    expect.set_options(timeout=60_000)
    page.on("request", lambda r: asked.append(r.url))
    page.on("pageerror", lambda error: failed.append(str(error)))
    page.goto(address)
    page.wait_for_selector("#memory-plot svg text, #memory-plot svg path")
    yield page
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []
    assert failed == []
    context.close()


def look(page, name):
    """Keep a picture, and hold that nothing is wider than the window and no two controls lie on each other."""
    width = page.viewport_size["width"]
    page.screenshot(path=SCREENSHOTS / f"{name}-{width}.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    boxes = page.evaluate(
        """() => [...document.querySelectorAll('button, input, textarea, .drawing, .numbers, .answer')]
            .filter(e => e.offsetParent && e.checkVisibility({opacityProperty: true, visibilityProperty: true}))
            .map(e => [e, e.getBoundingClientRect()]).filter(([e, r]) => r.width > 1 && r.height > 1)
            .flatMap(([a, p], i, all) => all.slice(i + 1)
                .filter(([b, q]) => !a.contains(b) && !b.contains(a) && !a.parentElement.contains(b)
                    && Math.min(p.right, q.right) - Math.max(p.left, q.left) > 2
                    && Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top) > 2)
                .map(([b]) => [a.outerHTML.slice(0, 120), b.outerHTML.slice(0, 120)]))"""
    )
    assert boxes == []


def cells(page, selector):
    """The rows of a table, headings first."""
    return [row.locator("th, td").all_inner_texts() for row in page.locator(f"{selector} tr").all()]


def test_memory(page):
    look(page, "memory")
    plot = page.locator("#memory-plot")
    before = plot.inner_html()
    page.locator("#power input[type=range]").fill("15")
    expect(page.locator("#context input")).to_have_value("32768")
    expect(page.locator("#cache-table")).to_contain_text("At 32,768 tokens")
    assert plot.inner_html() != before
    made = memory.report(MODEL, "", 32768, gpus=app.CARDS)
    for selector, rows in (("#cache-table", memory.cache_table(made)), ("#gpu-table", memory.gpu_table(made))):
        assert cells(page, selector) == [list(rows[0]), *(list(row.values()) for row in rows)]
    expect(page.locator("#command textarea")).to_have_value(re.compile("--context 32768 --bits 2 1"))

    page.get_by_label("2", exact=True).first.uncheck()  # a cache that is gone is gone everywhere
    expect(page.locator("#cache-table")).not_to_contain_text("CommVQ 2-bit")
    expect(page.locator("#gpu-table")).not_to_contain_text("CommVQ 2-bit")
    page.locator("#context input").fill("0")
    expect(page.get_by_text("expected 1 to 1,048,576")).to_be_visible()


def test_answers(page):
    open_tab(page, "Try it")
    page.locator("#prompt textarea").fill("Count from one to ten, then say what a heap is. " * 30)
    page.locator("#go").click()
    expect(page.locator("#status")).to_contain_text("once for both")
    for side in answers.SIDES:
        expect(page.locator(f"#{side}-answer .answer")).to_have_text(re.compile(r"\w+"))
    expect(page.locator("#numbers")).to_contain_text("tokens/s")
    page.locator("#stop").click()
    expect(page.locator("#status")).to_contain_text("Stopped")
    head, held, *_ = cells(page, "#numbers")
    assert head == ["", f"plain, {answers.load().dtype}", "CommVQ 2-bit"]
    plain, ours = (float(cell.removesuffix(" MiB")) for cell in held[1:])
    assert 0 < ours < plain
    look(page, "try-it")


def open_tab(page, name):
    """Click a tab, or its entry in the menu that holds those for which a narrow page has no room."""
    tab, more = page.get_by_role("tab", name=name), page.locator(".overflow-menu > button")
    for _ in range(200):
        if tab.count() and tab.first.is_visible():
            return tab.first.click()
        if more.count() and more.first.is_visible():
            more.first.click()
            return page.locator(".overflow-dropdown button", has_text=name).first.click()
        page.wait_for_timeout(250)
    raise AssertionError(f"no tab {name!r}")


def test_quality_and_how_it_works(page):
    open_tab(page, "Quality")
    expect(page.locator("#recorded img").first).to_be_visible()
    look(page, "quality")
    open_tab(page, "How it works")
    expect(page.locator("#picture svg").first).to_be_visible()
    before = page.locator("#picture").inner_html()
    look(page, "how-it-works")
    page.get_by_label("1", exact=True).last.check()
    expect(page.locator("#caption")).to_contain_text("signs")
    page.wait_for_function("before => document.querySelector('#picture').innerHTML != before", arg=before)
