"""The page without a browser: its figures are the records', it loads nothing, and every picture has words."""

import json
import re
from html.parser import HTMLParser

import pytest
from typer.testing import CliRunner

from microglia.cli.main import app
from microglia.errors import MicrogliaError
from microglia.report import gather, page, words, write_report
from microglia.report.charts import WIDTH, Change, Point, Speed, best, ceilings, changes, front
from microglia.report.svg import Scale, round_step
from microglia.results import BenchmarkResult
from tests.report import made


class Elements(HTMLParser):
    """Every element with its attributes, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str]]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def having(self, *names: str) -> list[dict[str, str]]:
        return [attributes for _, attributes in self.found if all(name in attributes for name in names)]


@pytest.fixture
def demo(tmp_path) -> str:
    return page(gather([made.demo_folder(tmp_path)]))


def test_marks_carry_the_figures_of_the_records(demo):
    found, record = Elements(demo), made.demo()
    marks = [(m["data-name"], float(m["data-x"]), float(m["data-y"])) for m in found.having("data-x", "data-y")]
    named = {"dense": "dense", "pruned": "pruned (agents)", "static_baseline": "static baseline"}
    expected = [(label, record[name].sparsity, record[name].accuracy) for name, label in named.items()]
    expected += [(f"random {i}", m.sparsity, m.accuracy) for i, m in enumerate(record.random.masks, 1)]
    fewer = [
        (label, getattr(record.low_budget, name).sparsity, getattr(record.low_budget, name).accuracy)
        for name, label in named.items()
        if name != "dense"
    ]
    expected += fewer
    expected += [*expected[:3], *fewer]  # once more, near the dense model, without the random masks
    expected += [("dense", 1.0, record.dense.accuracy), ("pruned (agents)", 1.1, record.pruned.accuracy)]
    assert marks == expected

    cells = found.having("data-site", "data-head")
    for name, third in zip(("kept", "entropy", "norm"), range(3), strict=True):
        part = cells[third * 48 : (third + 1) * 48]
        shown = [[float(c["data-value"]) for c in part if c["data-site"] == str(s)] for s in range(made.SITES)]
        assert shown == record.pruned.heads[name]

    bars = {(b["data-name"], b["data-group"]): float(b["data-value"]) for b in found.having("data-group")}
    for group, value in record.pruned.sparsity_by_family.items():
        assert bars["pruned (agents)", group] == value
    parts = {(p["data-name"], p["data-part"]): float(p["data-value"]) for p in found.having("data-part")}
    assert parts["compact", "KV cache"] == record.latency[2].kv_bytes / 2**20
    ceilings = {c["data-name"]: float(c["data-ceiling"]) for c in found.having("data-ceiling")}
    assert ceilings["compact"] == record.latency[2].ceiling


def test_curves_are_the_history(demo):
    curves = {c["data-name"]: c for c in Elements(demo).having("data-steps")}
    last = made.history()[-1]
    assert float(curves["task loss"]["data-last"]) == last["task"]
    assert float(curves["sparsity"]["data-last"]) == pytest.approx(1 - last["keep_ratio"])
    assert {"target", "multiplier λ", "temperature", "noise"} <= curves.keys()
    assert {c["data-steps"] for c in curves.values()} == {str(len(made.history()))}


def test_an_ablation_and_a_promise_are_those_of_the_records(tmp_path):
    runs = [made.ablation_folder(tmp_path / "ablation"), made.calibrated_folder(tmp_path / "calibrated")]
    text = page(gather(runs))
    marks = {m["data-name"]: float(m["data-x"]) for m in Elements(text).having("data-name", "data-x")}
    assert marks == {row.variant: row.to_base.diff for row in made.ablation().rows[1:]}
    assert (
        "500 prompts, 3 seeds, every variant with 75% of the heads kept. The base recipe answers 86.0% right." in text
    )
    assert f"calibrated: {made.promise().sentence}." in text
    for tried in made.promise().tried:
        cells = [f"{tried.keep_ratio:.1%}", f"{tried.accuracy:.1%}", str(tried.lost), str(tried.won)]
        cells += [f"−{100 * tried.drop:.1f}", f"{100 * tried.drop_bound:.1f}"]
        assert "".join(f"<td>{cell}</td>" for cell in cells) in text


def test_what_calibrate_printed_is_a_promise_too(tmp_path):
    text = page(gather([made.calibration_file(tmp_path / "results" / "calibration.json")]))
    assert f"results: {made.promise().sentence}." in text


def test_adapting_is_judged_again_at_a_low_budget(demo):
    lede = re.search(r'class="lede">(.*?)</p>', demo).group(1)
    assert "+4.1 points, 95 % interval +2.0 to +6.2; this run supports a gain" in lede
    assert "With 40% of the heads pruned: +5.4 points, 95 % interval +2.4 to +8.4; this run supports a gain" in lede


def test_labels_of_ticks_are_not_cut_off_at_the_edge():
    row = Speed("a", 1.23, (0.855, 1.276), 1.18, 0.5)
    whole = [Point(name, x, 0.9, (x - 0.1, x + 0.04)) for name, x in (("a", 1.0), ("b", 1.02))]
    drawn = [ceilings([row], "alt"), changes([Change("a", 0.1, (-0.3, 0.31))], "alt")]
    drawn.append(front(whole, "alt", "speed-up", "{:.2f}×"))
    for svg in drawn:
        ticks = re.findall(r'<text x="([\d.]+)" [^>]*class="tick middle"[^>]*>([^<]+)<', svg)
        assert len(ticks) >= 3
        for place, label in ticks:
            half = 3.4 * len(label)  # a letter is about 6.8 wide
            assert half <= float(place) <= WIDTH - half, label


def test_a_loss_of_time_is_no_share_of_what_could_be_saved():
    told = words.speed(made.row("compact", 0.98))
    assert told == "A decode step is 0.98× as fast as dense; its ceiling is 1.18×, of which nothing is realised."
    assert words.percent(-0.118, 0) == "−12%"


def test_measurements_that_differ_in_their_numbers_format_have_charts_of_their_own(tmp_path):
    folder = tmp_path / "runs"
    folder.mkdir()
    for name, dtype in (("a", "bfloat16"), ("b", "bfloat16, weights int8")):
        rows = (made.row("dense", 1.0), made.row("compact", 1.1))
        subject = {"model": "phi3-mini", "dtype": dtype}
        value = BenchmarkResult(rows=rows, subject=subject, circumstances=made.around("microglia benchmark"))
        (folder / f"{name}.json").write_text(json.dumps(value.to_json()))
    text = page(gather([folder]))
    for what in ("Speed-up beside its ceiling", "Bytes of a decode step", "Peak memory of a request"):
        for dtype in ("bfloat16", "bfloat16, weights int8"):
            assert f"{what} · phi3-mini, {dtype}<" in text
    assert len(Elements(text).having("data-ceiling")) == 2


def test_every_picture_has_an_alternative_text_and_a_table(demo):
    found = Elements(demo).found
    pictures = [attributes for tag, attributes in found if tag == "svg" and "aria-hidden" not in attributes]
    assert len(pictures) == 16
    assert all(p["role"] == "img" and len(p["aria-label"]) > 30 for p in pictures)
    assert sum(tag == "details" for tag, _ in found) == len(pictures)


def test_nothing_is_loaded_from_elsewhere(demo):
    assert not re.search(r"https?:|//[a-z]|@import|url\(|<script|<img|<iframe", demo)
    assert "default-src 'none'" in demo


def test_what_records_say_is_text_and_not_markup(tmp_path):
    folder = made.demo_folder(tmp_path)
    record = made.demo().to_json()
    record["circumstances"]["command"] = "microglia demo <script>alert(1)</script> & more"
    record["pruned"]["sparsity_by_family"] = {'<b onload="x">': 0.2}
    (folder / "summary.json").write_text(json.dumps(record))
    text = page(gather([folder]), title="<i>")
    tags = {tag for tag, _ in Elements(text).found}
    assert not {"script", "b", "i"} & tags
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; more" in text


def test_what_is_not_recorded_is_left_out(tmp_path):
    sections = write_report([made.evaluation_folder(tmp_path, details=False)], tmp_path / "page.html").sections
    assert sections == ("compared", "fronts", "origin")


def test_the_verb_writes_the_page_and_says_so(tmp_path):
    folder, output = made.demo_folder(tmp_path / "demo"), tmp_path / "out" / "report.html"
    done = CliRunner().invoke(app, ["report", str(folder), "--output", str(output), "--json"])
    assert done.exit_code == 0, done.stderr
    data = json.loads(done.stdout)
    assert data["sections"] == ["compared", "fronts", "groups", "heads", "training", "cost", "origin"]
    assert data["bytes"] == output.stat().st_size
    wrong = CliRunner().invoke(app, ["report", str(folder), "--output", str(tmp_path / "report.pdf")])
    assert wrong.exit_code == 2
    assert "it must end in .html" in wrong.stderr


def test_a_page_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MicrogliaError, match=r"cannot be written .* give another --output"):
        write_report([made.demo_folder(tmp_path / "demo")], tmp_path / "file" / "report.html")


def test_a_front_holds_what_no_other_mark_beats():
    marks = [
        Point(n, x, y)
        for n, x, y in (("a", 0, 0.9), ("b", 0.2, 0.8), ("c", 0.2, 0.7), ("d", 0.1, 0.7), ("e", 0.1, 0.8))
    ]
    assert [p.name for p in best(marks)] == ["a", "b"]


@pytest.mark.parametrize(("raw", "step"), [(0.19, 0.2), (0.21, 0.25), (3, 5), (0, 1), (1000, 1000)])
def test_ticks_are_round(raw, step):
    assert round_step(raw) == pytest.approx(step)
    scale = Scale(0, 10 * step, 0, 100)
    assert all(0 <= tick <= 10 * step for tick in scale.ticks())
