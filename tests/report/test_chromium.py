"""The page in a real browser: silent, offline, as the records say; legible on a phone, in the dark and on paper."""

import re

import pytest

from microglia.report import write_report
from tests.report import made
from tests.report.chromium import find_chromium

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

CENTRE = (
    "e => { const b = e.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2, b.width, b.height] }"
)
# Relative luminance as WCAG defines it, of the colour that the browser really uses.
CONTRAST = """(e) => {
  const light = c => { const [r, g, b] = c.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
    .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b };
  const style = getComputedStyle(e), ink = e.closest('svg') ? style.fill : style.color;
  let holder = e; while (getComputedStyle(holder).backgroundColor === 'rgba(0, 0, 0, 0)') holder = holder.parentElement;
  const [a, b] = [light(ink), light(getComputedStyle(holder).backgroundColor)].sort();
  return (Math.max(a, b) + .05) / (Math.min(a, b) + .05) }"""


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        chromium = find_chromium(playwright)
        if chromium is None:
            pytest.skip("no Chromium was found; install one, or name it in MICROGLIA_CHROMIUM")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    runs = [made.demo_folder(folder / "demo"), made.benchmark_file(folder / "cpu.jsonl")]
    runs += [made.ablation_folder(folder / "ablation"), made.calibrated_folder(folder / "calibrated")]
    write_report(runs, folder / "report.html")
    return folder / "report.html"


@pytest.fixture
def opened(browser, file):
    """A function that opens the page in a browser window of its own; what the browser complains of must stay empty."""
    said: list[str] = []
    contexts = []

    def open_page(**how):
        context = browser.new_context(offline=True, **{"viewport": {"width": 1200, "height": 900}, **how})
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on(
            "request",
            lambda request: said.append(request.url) if not request.url.startswith(("file:", "data:")) else None,
        )
        page.goto(file.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert said == []


def value_at(page, figure: str, axis: str, place: float) -> float:
    """What a place on the screen means, read off the ticks of an axis as a reader would."""
    ticks = page.locator(f"{figure} [data-axis={axis}]")
    first, last = ticks.nth(0), ticks.nth(ticks.count() - 1)
    side = {"x": 0, "y": 1}[axis]
    places = [tick.evaluate(CENTRE)[side] for tick in (first, last)]
    values = [float(tick.get_attribute("data-tick")) for tick in (first, last)]
    return values[0] + (place - places[0]) / (places[1] - places[0]) * (values[1] - values[0])


def test_marks_stand_where_the_records_say(opened):
    page, record = opened(), made.demo()
    labels = {"dense": "dense", "pruned": "pruned (agents)", "static_baseline": "static baseline"}
    for name, label in labels.items():
        x, y, *_ = page.locator(f'#fronts-1 [data-name="{label}"]').first.evaluate(CENTRE)
        assert value_at(page, "#fronts-1", "x", x) == pytest.approx(record[name].sparsity, abs=0.004)
        assert value_at(page, "#fronts-1", "y", y) == pytest.approx(record[name].accuracy, abs=0.01)
    _, y, _, tall = page.locator("#fronts-1 .whisker.s1").first.evaluate(CENTRE)
    ends = [value_at(page, "#fronts-1", "y", place) for place in (y + tall / 2, y - tall / 2)]
    assert ends == pytest.approx(record.pruned.accuracy_ci95, abs=0.01)
    x, *_ = page.locator('#fronts-3 [data-name="pruned (agents)"]').evaluate(CENTRE)
    assert value_at(page, "#fronts-3", "x", x) == pytest.approx(record.latency[3].ratio_to_dense, abs=0.002)


def test_bars_cells_and_texts_are_those_of_the_records(opened):
    page, record = opened(), made.demo().pruned
    heights = {
        bar.get_attribute("data-group"): bar.evaluate(CENTRE)[3] for bar in page.locator("#groups-1 [data-group]").all()
    }
    per_share = {group: heights[group] / value for group, value in record.sparsity_by_difficulty.items()}
    assert max(per_share.values()) == pytest.approx(min(per_share.values()), rel=0.01)
    for site, head in ((0, 0), (2, 3), (5, 7)):
        cell = page.locator(f'#heads-1 [data-site="{site}"][data-head="{head}"]')
        shown = float(cell.evaluate("e => getComputedStyle(e).fillOpacity"))
        assert shown == pytest.approx(record.heads["kept"][site][head], abs=0.001)
    assert page.locator("#compared tbody tr").nth(1).locator("td").first.inner_text() == f"{record.accuracy:.1%}"
    assert page.locator(".tiles dd").first.inner_text() == f"{record.accuracy:.1%}"
    assert page.locator("#origin pre").first.inner_text().splitlines()[0] == "microglia demo"


def test_a_ceiling_is_a_hollow_bar_as_long_as_it_says(opened):
    page = opened()
    for bar in page.locator("#cost-1 [data-ceiling]").all():
        x, _, width, _ = bar.evaluate(CENTRE)
        end = value_at(page, "#cost-1", "x", x + width / 2)
        assert end == pytest.approx(float(bar.get_attribute("data-ceiling")), abs=0.004)


def test_a_change_stands_where_the_ablation_says(opened):
    page = opened()
    for row in made.ablation().rows[1:]:
        x, *_ = page.locator(f'#ablation-1 [data-name="{row.variant}"]').evaluate(CENTRE)
        assert value_at(page, "#ablation-1", "x", x) == pytest.approx(100 * row.to_base.diff, abs=0.2)


def test_a_phone_shows_it_without_scrolling_sideways_and_large_enough(opened):
    page = opened(viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True, device_scale_factor=2)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    sizes = page.locator("figure > svg").evaluate_all(
        "all => all.map(s => s.getBoundingClientRect().width / s.viewBox.baseVal.width "
        "* parseFloat(getComputedStyle(s.querySelector('text')).fontSize))"
    )
    assert min(sizes) > 9.5
    cut = page.locator("figure > svg").evaluate_all(
        "all => all.flatMap(s => [...s.querySelectorAll('text')].filter(t => { const a = t.getBoundingClientRect(), "
        "b = s.getBoundingClientRect(); return a.left < b.left - 1 || a.right > b.right + 1 }).map(t => t.textContent))"
    )
    assert cut == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_can_be_read_in_light_and_in_the_dark(scheme, opened):
    page = opened(color_scheme=scheme)
    for selector in (".lede", "section > p", "nav a", ".note", "#fronts-1 .tick", "td", "thead th", "pre", "summary"):
        assert page.locator(selector).first.evaluate(CONTRAST) >= 4.5, selector
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", paper)[:3])) < 150) == (scheme == "dark")


def test_paper_is_white_even_for_those_who_live_in_the_dark(opened):
    page = opened(color_scheme="dark")
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.locator("nav").is_hidden()
    assert page.locator("#fronts-1 svg").last.is_visible()
    assert page.pdf()[:5] == b"%PDF-"


def test_the_numbers_under_a_picture_open(opened):
    page = opened()
    table = page.locator("#fronts-1 table")
    assert not table.is_visible()
    page.locator("#fronts-1 summary").click()
    assert table.is_visible()
    assert table.locator("tbody tr").count() == 7
