"""The page in a real browser: headless Chromium, from the system's packages."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rstar.manifest import RunDir
from rstar.report.html import write_report
from rstar.store import TreeWriter
from tests.report_run import HOSTILE, make_hostile, make_run, small_tree

playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: bash tests/run.sh --browser installs it")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: bash tests/run.sh --browser installs it"),
]

DRAWN = """(selector) => new Promise((done) => {
  const begun = performance.now();
  document.querySelector(selector).click();
  requestAnimationFrame(() => setTimeout(() => done(performance.now() - begun)));  // behind the frame that shows it
})"""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(make_run(tmp_path_factory.mktemp("runs") / "demo"))


class Visit:
    """A page of a report, and everything that went wrong on it."""

    def __init__(self, chromium: Any, report: Path, fragment: str = "", **context: Any) -> None:
        self.page = chromium.new_page(**context)
        self.trouble: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.trouble.append(message.text))
        self.page.on("pageerror", lambda error: self.trouble.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.trouble.append(dialog.message), dialog.dismiss()))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(report.as_uri() + fragment)

    def step(self, number: int) -> Any:
        """The line of step `number` in the tree shown."""
        return self.page.locator("#tree .head", has=self.page.locator(f".id:text-matches('#{number}$')"))

    def listed(self) -> list[str]:
        """Problems of the list, from its top."""
        return list(self.page.locator("#entries .name").all_inner_texts())

    @property
    def title(self) -> str:
        return str(self.page.locator("#tree h3").inner_text())


@pytest.fixture
def visit(chromium: Any, report: Path) -> Iterator[Visit]:
    here = Visit(chromium, report, viewport={"width": 1280, "height": 900})
    here.page.locator("#viewer").evaluate("(viewer) => viewer.scrollIntoView()")  # what is off the screen has no text
    yield here
    assert here.trouble == []
    here.page.close()


def test_the_page_opens_without_an_error_and_asks_for_nothing(visit: Visit, report: Path) -> None:
    visit.page.wait_for_load_state("networkidle")
    assert visit.requests == [report.as_uri()]
    assert visit.title == "✓ solved p-2#0"  # what is newly solved comes first
    assert visit.page.locator("section h2").all_inner_texts()[-1] == "Settings"


def test_steps_open_and_close(visit: Visit) -> None:
    head = visit.step(2)
    code = visit.page.get_by_text("NameError: y", exact=True)
    assert head.get_attribute("aria-expanded") == "false" and not code.count()
    head.click()
    assert head.get_attribute("aria-expanded") == "true" and code.is_visible()
    head.focus()
    visit.page.keyboard.press("Enter")
    assert head.get_attribute("aria-expanded") == "false" and not code.count()
    visit.page.get_by_role("button", name="Close all").click()
    assert visit.page.locator("#tree .head").count() == 2  # the first steps alone
    visit.page.get_by_role("button", name="Open all").click()
    assert visit.page.locator("#tree .head").count() == 4
    assert visit.page.locator("#tree .head[aria-expanded=false]").count() == 0


def test_a_step_shows_its_figures_code_output_and_the_best_path(visit: Visit) -> None:
    first = visit.step(1)
    assert first.inner_text().split() == ["▾", "★#1", "#", "add", "N", "2", "Q", "+0.00", "PPM", "+0.25", "2", "▾"]
    body = first.locator("xpath=..").locator("> .body")
    assert body.locator("pre").first.inner_text() == "# add\nx = 3 + 4"
    assert body.locator("pre .number").all_inner_texts() == ["3", "4"] and body.locator("pre .remark").count() == 1
    assert body.locator("pre.out").inner_text() == "noise\n"
    assert "✓ correct (+1): 7" in visit.step(3).inner_text() and "✗ wrong (−1): 5" in visit.step(4).inner_text()
    assert visit.page.locator("#tree .best > .head .id").all_inner_texts() == ["★#1", "★#3"]


def test_search_and_filters_narrow_the_list(visit: Visit) -> None:
    page = visit.page
    assert visit.listed() == ["p-1", "p-1", "p-2", "p-2", "p-3", "p-3"]
    page.fill("#find", "P-2")
    assert visit.listed() == ["p-2", "p-2"] and "2 of 6" in page.locator("#matches").inner_text()
    page.fill("#find", "what is 3 + 4? p-3")  # words of the question
    assert visit.listed() == ["p-3", "p-3"]
    page.fill("#find", "")
    page.select_option("#outcome", "unsolved")
    assert visit.listed() == ["p-2", "p-3", "p-3"]
    page.select_option("#round", "2")
    assert visit.listed() == ["p-3"]
    page.select_option("#outcome", "new")
    assert visit.listed() == ["p-2"]
    page.select_option("#round", "")
    page.select_option("#outcome", "off")  # PPM +0.25: 1.25 off where all is wrong, 0.58 where one of three is right
    assert visit.listed() == ["p-2", "p-3", "p-3", "p-1", "p-1", "p-2"]
    page.locator("#entries button").first.click()
    assert visit.title == "✗ not solved p-2#0" and "1.25 from the mean reward" in page.locator("#tree").inner_text()


def test_a_link_of_the_page_or_an_address_opens_its_tree(visit: Visit, chromium: Any, report: Path) -> None:
    visit.page.locator("#problems a", has_text="p-3").click()
    assert (
        visit.title == "✗ not solved p-3#0"
        and visit.page.locator("#viewer").evaluate("e => e.getBoundingClientRect().top") < 300
    )
    visit.page.get_by_role("link", name="round 1 ✗").click()  # the same problem in another round
    assert "round 1" in visit.page.locator("#tree .note").first.inner_text() and visit.title.endswith("p-3#0")
    again = Visit(chromium, report, "#tree=1/p-1%230")
    assert again.title == "✓ solved p-1#0" and not again.trouble
    again.page.close()


def test_preference_pairs_are_drawn_from_the_chosen_sibling_to_the_rejected_one(visit: Visit) -> None:
    visit.page.goto(visit.page.url.partition("#")[0] + "#tree=1/p-1%230")  # pairs are known of round 1 alone

    def middle(of: Any) -> float:
        box = of.bounding_box()
        return float(box["y"] + box["height"] / 2)

    for _ in range(2):
        drawn = visit.page.locator("#tree svg.pairs")
        drawn.wait_for(state="attached")  # a page hears of its new address after it has it
        assert drawn.count() == 1
        assert middle(drawn.locator("circle.over")) == pytest.approx(middle(visit.step(3)), abs=1)
        assert middle(drawn.locator("path.under")) == pytest.approx(middle(visit.step(4)), abs=1)
        visit.step(3).click()  # its height changes, and its sibling's place
        visit.page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def test_hostile_text_is_shown_and_does_nothing(chromium: Any, tmp_path: Path) -> None:
    run = make_run(tmp_path / "demo")
    make_hostile(run)
    here = Visit(chromium, write_report(run))
    here.page.locator("#entries button", has_text="<script>").first.click()
    here.page.get_by_role("button", name="Open all").click()
    here.page.wait_for_timeout(200)  # for what a broken page would load
    assert here.page.locator("img").count() == 0 and here.page.locator("body script:not([type])").count() == 1
    shown = here.page.locator("#tree pre").first.inner_text()
    assert shown.replace("\u2028", " ") == HOSTILE.replace("\u2028", " ")
    assert here.trouble == [] and len(here.requests) == 1


def test_a_tree_of_three_thousand_steps_opens_within_a_second(chromium: Any, tmp_path: Path) -> None:
    """From the click to the frame behind the one that shows it, in the page's own clock; and all steps at once."""
    rng, run = random.Random(0), RunDir(tmp_path / "demo")
    big = small_tree("big", solved=True)
    while len(big.nodes) < 3001:
        parent = rng.choice([big.root, *big.nodes[-150:]])
        big.add_child(
            parent, text=f"# add\nx = {len(big.nodes)} + 4\nprint(x)\n<end_of_step>", code="x", stdout="9\n" * 3
        )
    run.round(1).path.mkdir(parents=True)
    with TreeWriter(run.round(1).trees / "trees-a.jsonl.zst") as writer:
        writer.append(big)
        writer.append(small_tree("small", solved=True))
    here = Visit(chromium, write_report(run.path), "#tree=1/small%230")
    milliseconds = here.page.evaluate(DRAWN, "#entries li:first-child button")
    assert "big" in here.title and "3,000 steps" in here.page.locator("#tree .note").first.inner_text()
    assert milliseconds < 1000
    here.page.evaluate(DRAWN, "#tree .tools button:nth-child(2)")
    assert here.page.locator("#tree .head").count() == 3000
    here.page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_lines_can_be_read_on_light_and_dark(chromium: Any, report: Path, scheme: str) -> None:
    """Contrast of WCAG 2.1: 4.5 for text, 3 for the lines of a chart."""
    here = Visit(chromium, report, color_scheme=scheme)
    text = ("front", "dim", "link", "good", "bad", "word", "string", "remark", "number")
    lines = [f"c{i}" for i in range(8)]
    names = ["back", "panel", "mark", *text, *lines]
    style = "getComputedStyle(document.documentElement)"
    values = here.page.evaluate(f"(names) => names.map((name) => {style}.getPropertyValue(`--${{name}}`))", names)
    light = dict(zip(names, map(_luminance, values), strict=True))
    assert (light["back"] > 0.5) == (scheme == "light")
    for name, back, least in [(n, b, 4.5) for n in text for b in names[:3]] + [(n, "back", 3.0) for n in lines]:
        low, high = sorted((light[name], light[back]))
        assert (high + 0.05) / (low + 0.05) >= least, f"{name} on {back}"
    here.page.close()


def _luminance(colour: str) -> float:
    parts = (int(colour.strip()[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_nothing_is_wider_than_a_phone(chromium: Any, report: Path) -> None:
    here = Visit(chromium, report, viewport={"width": 390, "height": 800}, is_mobile=True, has_touch=True)
    here.page.get_by_role("button", name="Open all").click()
    assert here.page.evaluate("document.documentElement.scrollWidth") <= 390
    here.page.close()


def test_print_is_dark_on_white_without_the_controls(chromium: Any, report: Path) -> None:
    here = Visit(chromium, report, color_scheme="dark")
    here.page.emulate_media(media="print", color_scheme="dark")
    assert not here.page.locator(".pick").is_visible() and here.page.locator("#tree .head").first.is_visible()
    body = here.page.locator("body")
    assert [body.evaluate(f"(one) => getComputedStyle(one).{name}") for name in ("backgroundColor", "color")] == [
        "rgb(255, 255, 255)", "rgb(0, 0, 0)"
    ]  # fmt: skip
    shades = here.page.locator("#tree .good").first.evaluate("(one) => getComputedStyle(one).color")
    assert shades == "rgb(0, 103, 168)"  # the blue of the light scheme
    here.page.close()
