"""The report in a browser: figures, explorer, keyboard, contrast, printing, no network use."""

import base64
import itertools
import shutil
import statistics
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import yaml
from html_page import Page
from make_run import HOSTILE, LANGUAGES, make_run
from report_run import report_with_everything

from tracmod.analysis import analyze
from tracmod.analysis.sweeps import sweep_rows
from tracmod.report import write_report
from tracmod.report.html.sweeps import write_sweep_page

pytestmark = pytest.mark.slow
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
if CHROMIUM is None:
    pytest.skip("no chromium on the PATH", allow_module_level=True)

FIRST_PAINT = 1500  # milliseconds
FILTERED = 100
CONTRAST = 4.5  # WCAG AA
SCROLL = """async () => {
  for (let y = 0; y < document.body.scrollHeight; y += 500) {
    scrollTo({ top: y, behavior: "instant" });
    await new Promise((done) => setTimeout(done, 30));
  }
}"""
VISIBLE_DRAWN = """() => [...document.querySelectorAll(".plot")]
  .filter((one) => one.offsetWidth).every((one) => one.dataset.drawn)"""
# For each figure its number and the number of marks inside its axes; -1 if it is hidden.
MARKS = """() => [...document.querySelectorAll(".plot")].map((one, number) => [number,
  one.offsetWidth ? one.querySelectorAll(
    ".heatmaplayer image, .barlayer path, .scatterlayer :is(path, text)").length : -1])"""


class Visit:
    """An open page, with its messages, errors and dialogs, and the addresses it requested."""

    def __init__(self, page: playwright.Page, path: Path) -> None:
        self.page, self.messages, self.requested = page, [], []
        page.on("console", lambda message: self.messages.append(message.text))
        page.on("pageerror", lambda error: self.messages.append(str(error)))
        page.on("dialog", lambda dialog: (self.messages.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: self.requested.append(request.url))
        page.goto(path.as_uri())

    def scroll(self) -> None:
        """Scroll through the whole page, and wait until every visible figure is drawn."""
        self.page.evaluate(SCROLL)
        self.page.wait_for_function(VISIBLE_DRAWN)

    def explorer(self) -> None:
        """Scroll to the explorer, and wait until it is ready."""
        self.page.locator("#examples").scroll_into_view_if_needed()
        self.page.wait_for_selector("#examples[data-ready]", state="attached")


@pytest.fixture(scope="module")
def browser() -> Iterator[playwright.Browser]:
    with playwright.sync_playwright() as api:
        chromium = api.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report_with_everything(tmp_path_factory.mktemp("browser") / "run")


@pytest.fixture(scope="module")
def data(path: Path) -> dict:
    return Page(path.read_text(encoding="utf-8")).json("explorer-data")


@pytest.fixture
def visit(browser: playwright.Browser, path: Path) -> Iterator[Visit]:
    context = browser.new_context(viewport={"width": 1280, "height": 900}, color_scheme="light")
    visit = Visit(context.new_page(), path)
    yield visit
    assert visit.messages == []
    assert {url.partition(":")[0] for url in visit.requested} == {"file"}
    context.close()


def test_every_figure_of_every_panel_is_drawn(visit: Visit) -> None:
    page = visit.page
    drawn = set()
    most = max(page.locator(f"[name={name}]").count() for name in _switches(page))
    for choice in range(most):
        for name in _switches(page):
            radios = page.locator(f"[name={name}]")
            if choice < radios.count():
                page.locator(f"label:has([name={name}])").nth(choice).click()
                assert radios.nth(choice).is_checked()
        visit.scroll()
        marks = page.evaluate(MARKS)
        assert all(count != 0 for _, count in marks)
        drawn |= {number for number, count in marks if count > 0}
    assert len(drawn) == page.locator(".plot").count() > 60
    assert page.locator("svg.heads rect.kept").count() > 50


def _switches(page: playwright.Page) -> list[str]:
    names = page.eval_on_selector_all(".switch input", "all => all.map((one) => one.name)")
    return list(dict.fromkeys(names))


def test_figures_are_drawn_only_when_the_reader_comes_near(visit: Visit) -> None:
    visit.page.wait_for_function("() => window.Plotly")
    visit.page.wait_for_timeout(200)
    assert visit.page.locator(".plot[data-drawn]").count() == 0
    assert "relies on" in visit.page.locator("#summary").inner_text()
    visit.page.locator("#influence h2").scroll_into_view_if_needed()
    visit.page.wait_for_selector("#influence .plot[data-drawn]")
    assert visit.page.locator("#similarity .plot[data-drawn]").count() == 0


def test_the_first_paint_is_quick(browser: playwright.Browser, path: Path) -> None:
    times = []
    for _ in range(2):  # a second try, because the machine may be busy
        page = browser.new_page()
        page.goto(path.as_uri())
        page.wait_for_function("() => performance.getEntriesByType('paint').length > 0")
        entries = "performance.getEntriesByType('paint').map((one) => one.startTime)"
        times.append(max(page.evaluate(entries)))
        page.close()
        if times[-1] < FIRST_PAINT:
            return
    pytest.fail(f"first paint after {times} ms")


@pytest.mark.parametrize("panel", [0, 2])
def test_two_views_are_compared_by_their_difference(visit: Visit, path: Path, panel: int) -> None:
    figures = Page(path.read_text(encoding="utf-8")).json("figure-data")
    page = visit.page
    page.locator("#influence .switch label").nth(panel).click()
    compare = page.locator("#influence .panel").nth(panel).locator(".compare")
    compare.scroll_into_view_if_needed()
    shown, base = compare.locator("select").all()
    shown.select_option(label="Sparse fine-tuning, own subnetwork")
    base.select_option(label="Full fine-tuning, random masks")
    caption = "Sparse fine-tuning, own subnetwork \N{MINUS SIGN} Full fine-tuning, random masks"
    assert compare.locator("figcaption").inner_text() == caption
    plot = compare.locator(".plot[data-drawn]")
    trace = plot.evaluate("(one) => one.data[0]")
    a, b = (figures[int(view.input_value())]["data"][0]["z"] for view in (shown, base))
    expected = [[x - y for x, y in zip(*rows, strict=True)] for rows in zip(a, b, strict=True)]
    assert trace["z"] == [pytest.approx(row) for row in expected]
    assert trace["zmax"] == pytest.approx(max(abs(x) for row in expected for x in row))
    base.select_option(label="nothing")
    assert plot.evaluate("(one) => one.data[0].z") == a
    assert compare.locator("figcaption").inner_text() == "Sparse fine-tuning, own subnetwork"


def _counted(page: playwright.Page) -> int:
    text = page.locator("#choose-count").inner_text().split(", chosen")[0]
    return 0 if text == "No example matches." else int(text.rpartition(" of ")[2].replace(",", ""))


def _predictions(data: dict, view: int) -> list[int]:
    return np.frombuffer(base64.b64decode(data["views"][view]["prediction"]), "<i2").tolist()


def test_filters_and_search_agree_with_the_data(visit: Visit, data: dict) -> None:
    visit.explorer()
    page, test = visit.page, data["test"]
    rows = list(zip(test["language"], test["label"], _predictions(data, 0), strict=True))
    assert _counted(page) == len(rows) == 9 * len(LANGUAGES)
    assert page.locator("#choose-example button").count() == 8
    for language in ("ar", "zh"):
        for label, name in enumerate(data["labels"]):
            for outcome in ("", "right", "wrong"):
                page.select_option("#choose-language", language)
                page.select_option("#choose-label", label=name)
                page.select_option("#choose-outcome", outcome)
                right = [p == gold for la, gold, p in rows if (la, gold) == (language, label)]
                expected = {"": len(right), "right": sum(right), "wrong": right.count(False)}
                assert _counted(page) == expected[outcome]
    for name in ("language", "label", "outcome"):
        page.select_option(f"#choose-{name}", "")
    for words in ("учитель", "老师 在", "ÄRZTIN", "alert('x')", "no such words"):
        page.fill("#choose-text", words)
        texts = zip(test["text_a"], test["text_b"], strict=True)
        expected = sum(words.lower() in f"{a}\n{b}".lower() for a, b in texts)
        assert _counted(page) == expected
        assert page.locator("#explorer").is_visible() == (expected > 0)


def test_an_example_is_shown_with_its_strongest_training_examples_and_shares(
    visit: Visit, data: dict
) -> None:
    visit.explorer()
    page = visit.page
    page.select_option("#choose-language", "ar")
    page.locator("#choose-example button").first.click()
    text = page.locator("#explorer-text .text").first
    first = data["test"]["language"].index("ar")
    assert text.inner_text() == data["test"]["text_a"][first]
    assert HOSTILE in text.inner_text()
    assert text.get_attribute("lang") == "ar"
    assert text.evaluate("(one) => getComputedStyle(one).direction") == "rtl"
    start = page.locator("#choose-example .start").first
    assert start.evaluate("(one) => getComputedStyle(one).direction") == "rtl"
    strips = page.locator("#explorer-views .strip")
    assert strips.count() == 2 * len(data["views"]) == 12
    assert strips.first.get_attribute("aria-label").startswith("ar ")
    before = page.locator("#listed").inner_text()
    assert page.locator("#listed tbody tr").count() == 10
    page.click("#list-all")
    assert page.locator("#listed tbody tr").count() == 20  # k = 10 of each sign
    page.locator("#explorer-views input").nth(4).check()
    assert page.locator("#listed").inner_text() != before
    page.select_option("#train-language", "own")
    tags = page.locator("#listed tbody .tag").all_inner_texts()
    assert set(tags) == {"ar"}
    page.select_option("#train-language", "=zh")
    page.select_option("#train-label", "same")
    listed = page.locator("#listed tbody tr").all_inner_texts()
    label = data["labels"][data["test"]["label"][first]]
    assert all("zh" in row and label in row and "item train-" in row for row in listed)
    chinese = page.locator("#listed .listed-text").first
    if listed:
        assert chinese.get_attribute("lang") == "zh"


def test_an_old_browser_shows_a_message_and_the_summary(
    browser: playwright.Browser, path: Path
) -> None:
    page = browser.new_page()
    page.add_init_script("delete window.DecompressionStream")
    visit = Visit(page, path)
    assert "need a browser of May 2023" in page.locator("main > p").first.inner_text()
    assert page.locator("#summary .findings li").count() > 3
    page.evaluate(SCROLL)
    assert visit.messages == []
    page.close()


def test_the_list_has_pages(visit: Visit) -> None:
    visit.explorer()
    page = visit.page
    assert page.locator("#previous-page").is_disabled()
    seen = []
    while True:
        seen += page.locator("#choose-example .start").all_inner_texts()
        if page.locator("#next-page").is_disabled():
            break
        page.click("#next-page")
    assert len(seen) == 9 * len(LANGUAGES)
    page.click("#previous-page")
    page.locator("#choose-example button").nth(3).click()
    start = page.locator("#choose-example [aria-pressed=true] .start").inner_text()
    assert page.locator("#explorer-text .text").first.inner_text().startswith(start)


def test_ten_thousand_examples_are_filtered_without_delay(
    browser: playwright.Browser, tmp_path: Path
) -> None:
    run = make_run(
        tmp_path / "run", num_train=20, num_test=2000, k=5, models=("full",), views=("full",)
    )
    analyze(run, bootstrap=5, permutations=5)
    visit = Visit(browser.new_page(), write_report(run))
    visit.explorer()
    page = visit.page
    assert _counted(page) == 10_000
    times = {}
    for name, value in (("language", "zh"), ("language", ""), ("text", "учитель"), ("text", "q")):
        change = f"""() => {{
          const control = document.getElementById("choose-{name}"), start = performance.now();
          control.value = "{value}";
          control.dispatchEvent(new Event("{"input" if name == "text" else "change"}"));
          document.body.offsetHeight;
          return performance.now() - start;
        }}"""
        times[name, value] = statistics.median(page.evaluate(change) for _ in range(3))
    assert all(time < FILTERED for time in times.values()), times
    assert visit.messages == []
    page.close()


def test_the_keyboard_reaches_every_control_and_the_focus_is_visible(visit: Visit) -> None:
    visit.explorer()
    page = visit.page
    page.evaluate("() => { scrollTo(0, 0); document.activeElement.blur(); }")
    reached, links = [], 0
    for _ in range(200):
        page.keyboard.press("Tab")
        focused = page.evaluate("""() => {
          const focused = document.activeElement;
          const ring = focused.closest(".switch") ? focused.nextElementSibling : focused;
          const style = getComputedStyle(ring);
          const visible = style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2;
          const id = focused.id || focused.name || focused.dataset.copy || focused.hash || "";
          return { tag: focused.tagName, id, visible };
        }""")
        if focused["tag"] == "BODY":
            break
        assert focused["visible"], focused
        reached.append(focused["id"])
        links += focused["tag"] == "A"
    assert reached[0] == "#summary"  # the skip link
    assert links == 1 + page.locator("nav a").count()
    assert set(_switches(page)) <= set(reached)
    wanted = {"choose-language", "choose-label", "choose-outcome", "choose-text", "next-page"}
    wanted |= {"explorer-view", "train-language", "train-label", "list-all"}
    assert wanted | {"commands", "configuration"} <= set(reached)
    page.locator("[name=influence]").first.focus()
    page.keyboard.press("ArrowRight")
    shown = page.locator("#influence .panel").evaluate_all("all => all.map((one) => one.hidden)")
    assert shown == [True, False, True]
    page.locator("#choose-example button").nth(2).focus()
    page.keyboard.press("Enter")
    chosen = page.locator("#choose-example button").nth(2)
    assert chosen.get_attribute("aria-pressed") == "true"


def test_controls_figures_and_headings_are_named_and_in_order(visit: Visit) -> None:
    visit.explorer()
    visit.scroll()
    page = visit.page
    tree = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]
    roles = ("button", "combobox", "link", "radio", "searchbox", "DisclosureTriangle", "image")
    named = [
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in tree
        if not node["ignored"] and node["role"]["value"] in roles
    ]
    assert {role for role, _ in named} == set(roles)
    assert [role for role, name in named if not name.strip()] == []
    levels = page.eval_on_selector_all(
        "h1, h2, h3, h4", "all => all.map((one) => Number(one.tagName[1]))"
    )
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))
    assert page.get_attribute("html", "lang") == "en"


# Every visible text with its color, and the first color behind it that is not transparent.
TEXTS = """() => {
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), texts = [];
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    const text = walker.currentNode.data.trim();
    if (!text || !element.getClientRects().length) continue;
    if (element.closest(".heads, .textpoint")) continue;
    const style = getComputedStyle(element);
    let behind = element, back = "rgba(0, 0, 0, 0)";
    while (behind && back.endsWith(", 0)")) {
      back = getComputedStyle(behind).backgroundColor;
      behind = behind.parentElement;
    }
    texts.push([text, element.namespaceURI.endsWith("svg") ? style.fill : style.color, back]);
  }
  return texts;
}"""


# For each number on a half transparent square: its color, color and opacity of the square, and
# the color of the page.
COUNTS = """() => [...document.querySelectorAll(".heads .count")].map((one) => {
  const square = getComputedStyle(one.previousElementSibling);
  return [getComputedStyle(one).fill, square.fill, Number(square.fillOpacity),
    getComputedStyle(document.body).backgroundColor];
})"""


def _luminance(color: list[float]) -> float:
    parts = [c / 255 for c in color[:3]]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def _contrast(a: list[float], b: list[float]) -> float:
    low, high = sorted((_luminance(a), _luminance(b)))
    return (high + 0.05) / (low + 0.05)


def _channels(color: str) -> list[float]:
    if color.startswith("#"):
        return [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return [float(part) for part in color[color.index("(") + 1 : -1].split(",")]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_have_enough_contrast(visit: Visit, scheme: str) -> None:
    page = visit.page
    page.emulate_media(color_scheme=scheme)
    visit.explorer()
    visit.scroll()
    texts = page.evaluate(TEXTS)
    assert len(texts) > 500
    paper = _luminance(_channels(page.evaluate("getComputedStyle(document.body).backgroundColor")))
    assert (paper > 0.9) == (scheme == "light")
    faint = [text for text in texts if _contrast(*map(_channels, text[1:])) < CONTRAST]
    assert faint == []
    counts = page.evaluate(COUNTS)
    assert len(counts) > 10
    for ink, fill, opacity, behind in counts:
        pairs = zip(_channels(fill), _channels(behind), strict=True)
        square = [opacity * a + (1 - opacity) * b for a, b in pairs]
        assert _contrast(_channels(ink), square) >= CONTRAST


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_numbers_in_heat_maps_have_enough_contrast(visit: Visit, scheme: str) -> None:
    visit.page.emulate_media(color_scheme=scheme)
    visit.scroll()
    heatmaps = visit.page.eval_on_selector_all(
        ".plot[data-drawn]", "all => all.map((one) => one.data).filter((one) => one[1] && one[0].z)"
    )
    assert len(heatmaps) > 10
    for heatmap, numbers in (data[:2] for data in heatmaps):
        values = [v for row in heatmap["z"] for v in row if v is not None]
        assert len(values) == len(numbers["textfont"]["color"])
        for value, ink in zip(values, numbers["textfont"]["color"], strict=True):
            position = (value - heatmap["zmin"]) / (heatmap["zmax"] - heatmap["zmin"])
            cell = _on_scale(heatmap["colorscale"], min(1.0, max(0.0, position)))
            assert _contrast(_channels(ink), cell) >= CONTRAST


def _on_scale(steps: list, position: float) -> list[float]:
    for (start, a), (end, b) in itertools.pairwise(steps):
        if position <= end:
            share = (position - start) / (end - start)
            pairs = zip(_channels(a), _channels(b), strict=True)
            return [x + share * (y - x) for x, y in pairs]
    raise AssertionError(position)


def test_figures_follow_the_color_scheme(visit: Visit) -> None:
    visit.page.locator("#reliance").scroll_into_view_if_needed()
    plot = visit.page.locator("#reliance .plot[data-drawn]").first
    light = plot.evaluate("(one) => one.layout.font.color")
    visit.page.emulate_media(color_scheme="dark")
    assert plot.evaluate("(one) => one.layout.font.color") != light


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_printed_page_is_light_and_has_every_panel(
    visit: Visit, scheme: str, tmp_path: Path
) -> None:
    page = visit.page
    page.emulate_media(color_scheme=scheme)
    page.wait_for_function("() => window.Plotly")
    before = page.locator("details[open]").count()
    page.pdf(path=tmp_path / "report.pdf", format="A4")
    assert (tmp_path / "report.pdf").stat().st_size > 100_000
    assert page.get_attribute("html", "data-paper") is None  # as before
    assert page.locator("details[open]").count() == before
    page.set_viewport_size({"width": 703, "height": 1000})  # A4 less its margins
    page.evaluate("dispatchEvent(new Event('beforeprint'))")  # while it is still a screen
    page.emulate_media(media="print", color_scheme=scheme)
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(27, 31, 36)"
    plots = page.eval_on_selector_all(
        ".panel .plots .plot",
        """all => all.map((one) => {
          const right = one.querySelector(".main-svg").getBoundingClientRect().right;
          return [one.dataset.drawn, one.clientWidth, right, one.layout.font.color];
        })""",
    )
    assert len(plots) > 50
    for drawn, width, right, ink in plots:
        assert drawn == "yes"
        assert width >= 200
        assert right <= 703
        assert ink == "#1b1f24"
    assert page.evaluate("document.documentElement.scrollWidth") <= 703
    assert not page.locator("nav").is_visible()


@pytest.mark.parametrize("width", [390, 800, 1600])
def test_nothing_overflows_at_any_width(visit: Visit, width: int) -> None:
    visit.page.set_viewport_size({"width": width, "height": 800})
    visit.explorer()
    visit.scroll()
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= width
    box = visit.page.locator("nav").bounding_box()
    assert (box["width"] < width / 2) == (width >= 1200)  # contents at the side where there is room


def test_the_page_of_a_sweep_draws_its_figures(
    browser: playwright.Browser, path: Path, tmp_path: Path
) -> None:
    rows = sweep_rows(path.parent.parent)
    rows = [{"point": str(k), "k": k, **row} for k in (5, 10) for row in rows]
    write_sweep_page(tmp_path / "sweep.html", "sizes", ["k"], pa.Table.from_pylist(rows))
    visit = Visit(browser.new_page(), tmp_path / "sweep.html")
    visit.scroll()
    marks = visit.page.evaluate(MARKS)
    assert len(marks) >= 6
    assert all(count > 0 for _, count in marks)
    assert visit.messages == []
    visit.page.close()


def test_commands_and_configuration_are_copied(visit: Visit) -> None:
    visit.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    for name in ("commands", "configuration"):
        button = visit.page.locator(f"[data-copy={name}]")
        button.click()
        playwright.expect(button).to_have_text("Copied")
        copied = visit.page.evaluate("navigator.clipboard.readText()")
        assert copied == visit.page.locator(f"#{name}").text_content()
    assert "tracmod run config.yaml" in visit.page.locator("#commands").text_content()
    assert yaml.safe_load(copied)["name"] == "synthetic"
