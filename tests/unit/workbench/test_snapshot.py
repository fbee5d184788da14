"""The static picture: well-formed, complete, honest about what is absent."""

import base64
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from workbench import Workbench
from workbench.drawing import log_ticks, ticks
from workbench.panel.frontend import STYLE
from workbench.panel.headline import Tile, progress_html, sample_html, sentence, tiles, tiles_html
from workbench.panel.snapshot import draw, image, snapshot
from workbench.panel.view import MemoryBar, Trend, View
from workbench.runs.distribution import Distribution
from workbench.runs.metrics import SLO, Metrics, MetricsCollector
from workbench.runs.verdict import LIKELY, MET, MISSED, UNKNOWN, verdict

SVG = "{http://www.w3.org/2000/svg}"


def words(svg):
    return [element.text for element in ET.fromstring(svg).iter(f"{SVG}text")]


@pytest.fixture(scope="module")
def still():
    with Workbench(threaded=False, model="synthetic:0.5b", device="l4", requests=30, rate=20.0) as panel:
        panel.run(blocking=True)
        panel.keep_baseline()
        panel.run(blocking=True, kv="int8")
        return panel.snapshot()


def test_an_empty_view_is_a_picture_too():
    assert "Where the memory goes" in words(draw(View()))


def test_no_two_marks_of_an_axis_have_the_same_name():
    labels = re.findall(r'<text x="([\d.]+)" y="([\d.]+)" text-anchor="end"[^>]*>([\d.,]+)<', draw(View()))
    by_axis = [(x, float(y) > 300, name) for x, y, name in labels]
    assert len(by_axis) > 8 and len(set(by_axis)) == len(by_axis)


def test_a_run_is_drawn_whole(still):
    assert {"Where the memory goes", "this run", "baseline", "TTFT", "SLO", "1", "2"} <= set(words(still.svg))
    assert len(list(ET.fromstring(still.svg).iter(f"{SVG}path"))) > 20
    assert words(still.svg).count("requests") == 2, "on the axis of those that wait and on that of the latencies"


def test_the_same_run_gives_the_same_picture(still):
    with Workbench(threaded=False, model="synthetic:0.5b", device="l4", requests=30, rate=20.0) as panel:
        panel.run(blocking=True)
        panel.keep_baseline()
        panel.run(blocking=True, kv="int8")
        assert panel.snapshot() == still


def test_html_holds_the_picture_as_data_and_no_script(still):
    data = re.search(r'src="data:image/svg\+xml;base64,([^"]+)"', still.html)
    assert data and base64.b64decode(data[1]).decode() == still.svg
    assert "<script" not in still.html and "http" not in still.html
    assert len(still.html) < 100_000
    assert still._repr_mimebundle_()["text/plain"] == str(still)


def test_the_image_has_words_for_those_who_cannot_see_it(still):
    alt = re.search(r'alt="([^"]+)"', still.html)
    assert alt and "TTFT p99" in alt[1] and "tokens" in alt[1]


def test_hostile_words_are_escaped():
    evil = '"><script>alert(1)</script>'
    parts = dict.fromkeys(("weights", "workspace", "kv_used", "kv_empty", "free"), 1.0)
    still = snapshot(View([MemoryBar(evil, parts, 1)]),
                     [Tile(evil, evil, evil, evil)], evil, evil, evil)  # fmt: skip
    assert "<script" not in still.html + still.svg + tiles_html([Tile(evil, evil, evil, evil)]) + image("<svg/>", evil)
    ET.fromstring(still.svg)


def test_a_unit_stays_with_its_figure():
    html = tiles_html([Tile("TTFT p99", "389 ms", "95 %: ≥ 75.1 ms", "baseline 1.2 GB"), Tile("SLO", "", "5 of 300")])
    assert ">95\u00a0%: ≥\u00a075.1\u00a0ms<" in html and ">baseline 1.2\u00a0GB<" in html and ">5 of 300<" in html


def test_a_prompt_that_turns_the_direction_does_not_turn_the_answer():
    html = sample_html(("<script>\u202e\x1b[31m", "answer"), "")
    assert "<bdi>&lt;script&gt;\u202e\x1b[31m</bdi><b>answer</b>" in html
    assert "unicode-bidi: isolate" in STYLE


def test_gaps_do_not_break_lines():
    t = np.array([0.1, 0.2, 0.3])
    hole = np.array([1.0, np.nan, 2.0])
    assert "nan" not in draw(View(trend=Trend(t, hole, hole, hole)))


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 1e9), (0, 3e-7), (0, 88.0)])
def test_ticks_are_round_and_few(low, high):
    marks = ticks(low, high)
    assert 2 <= len(marks) <= 7 and low <= min(marks) and max(marks) <= high * (1 + 1e-9)


def test_log_ticks_lie_within():
    assert log_ticks(0.015, 2.5) == [0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0]


def measured(ttft, tpot, slo):
    metrics = MetricsCollector(0.0, slo).metrics()
    fields = {name: getattr(metrics, name) for name in Metrics.__dataclass_fields__}
    one, other = Distribution.of(ttft), Distribution.of(tpot)
    return Metrics(**(fields | {"ttft": one, "tpot": other, "slo_met": slo.met_by(one.p99, other.p99)}))


def test_a_verdict_is_certain_only_with_enough_requests():
    slo = SLO(ttft=0.5, tpot=0.05)
    assert verdict(None, slo) == UNKNOWN
    assert verdict(measured([0.1] * 50, [0.01] * 50, slo), slo) == LIKELY
    assert verdict(measured([0.1] * 400, [0.01] * 400, slo), slo) == MET
    assert verdict(measured([0.9] * 50, [0.01] * 50, slo), slo) == MISSED


def test_a_missed_target_does_not_say_that_the_good_requests_missed_it():
    with Workbench(threaded=False, model="synthetic:0.5b", device="l4", requests=30, rate=20.0) as panel:
        details = []
        for bound in (0.1, 60_000):
            panel.run(blocking=True, slo_ttft_ms=1000, slo_tpot_ms=bound)
            details.append(tiles(panel._shown, None, None)[0].detail)
    assert details == ["0 % met it", "so far; 30 of 300 to be sure"]


def test_what_was_not_measured_is_a_dash_not_a_zero():
    values = {tile.name: tile.value for tile in tiles(None, None, None)}
    assert set(values.values()) == {"–"}
    assert sentence(tiles(None, None, None)) == ""


@pytest.mark.parametrize(("share", "percent"), [(0.0, 0), (299 / 300, 99), (0.29, 29), (1.0, 100), (1.5, 100)])
def test_the_bar_is_full_when_the_last_request_has_ended(share, percent):
    assert f'aria-valuenow="{percent}"' in progress_html(share, "")
