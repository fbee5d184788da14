"""The live figure with a DummyComm: what is sent, how much, and that nothing is lost."""

import threading
import warnings

import numpy as np
import pytest

from workbench import figure
from workbench.panel.blank_figure import blank_figure
from workbench.panel.charts import MAX_POINTS, LiveCharts, thin, updates
from workbench.panel.view import PARTS, Curve, MemoryBar, RunPoint, Trend, View
from workbench.runs.verdict import LIKELY, MET, MISSED


def view(n=250, scale=1.0):
    t = np.linspace(0.1, 10.0, n)
    bar = MemoryBar("this run", {part.key: 1e6 * scale for part in PARTS}, 1234)
    curve = Curve(t, np.linspace(0.4, 100.0, n))
    points = [RunPoint(1, 0.4, 900.0, MISSED, "run 1", is_baseline=True), RunPoint(2, 0.2, 950.0, LIKELY, "run 2"),
              RunPoint(3, 0.1, 990.0 * scale, MET, "run 3", is_latest=True)]  # fmt: skip
    trend = Trend(t, 100.0 * t * scale, np.floor(t), np.zeros(n))
    return View([bar], trend, curve, curve, slo_ttft=1.0, slo_tpot=0.1, points=points)


@pytest.fixture
def charts():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # anywidget reads plotly's bundle without closing the file
        charts = LiveCharts()
    yield charts
    charts.close()


@pytest.fixture
def sent(charts, monkeypatch):
    """Contents of every update message."""
    messages = []
    monkeypatch.setattr(charts.figure.comm, "send", lambda data=None, **_: messages.append(data["state"]))
    return messages


def updates_in(messages):
    return [state["_py2js_update"] for state in messages if state.get("_py2js_update")]


def test_a_change_is_one_update(charts, sent):
    charts.show(view())
    assert len(updates_in(sent)) == 1 and len(sent) <= 4


def test_every_axis_with_numbers_says_of_what():
    layout = blank_figure()["layout"]
    named = {name for name, axis in layout.items() if "axis" in name and axis["title"]["text"]}
    assert {name for name in layout if "axis" in name} - named == {"yaxis"}, "whose rows have names of their own"


def test_what_stands_already_is_not_sent_again(charts, sent):
    charts.show(view())
    sent.clear()
    charts.show(view())
    assert not sent
    charts.forget()
    sent.clear()
    charts.show(view())
    filled = [index for index, trace in enumerate(charts.figure.data) if len(trace.x)]
    assert updates_in(sent)[0]["style_traces"] == filled, "a figure built anew gets everything"


def test_between_slow_ticks_only_the_upper_charts_move(charts, sent):
    charts.show(view())
    sent.clear()
    charts.show(view(scale=2.0), slow=False)
    touched = {
        charts.figure.data[index].uid.split("-")[0] for update in updates_in(sent) for index in update["style_traces"]
    }
    assert touched == {"memory", "trend"}


def test_an_answer_of_the_browser_does_not_swallow_an_update(charts, sent):
    inside, leave = threading.Event(), threading.Event()

    def answer():
        with charts.figure._writing, charts.figure.hold_trait_notifications():  # what set_state does, held open
            inside.set()
            leave.wait(5)

    browser = threading.Thread(target=answer)
    browser.start()
    inside.wait(5)
    drawing = threading.Thread(target=charts.show, args=(view(),))
    drawing.start()
    drawing.join(0.1)
    leave.set()
    drawing.join(5)
    browser.join(5)
    assert len(updates_in(sent)) == 1


def test_the_browsers_answers_wait_for_the_writer(charts):
    done = threading.Event()
    with charts.figure._writing:
        browser = threading.Thread(target=lambda: (charts.figure.set_state({"_view_count": 2}), done.set()))
        browser.start()
        assert not done.wait(0.1)
    browser.join(5)
    assert done.is_set() and charts.figure._view_count == 2


def test_lines_are_thin():
    traces, _ = updates(view(n=5000))
    assert max(len(change["x"]) for change in traces.values()) == MAX_POINTS
    values = np.arange(5000.0)
    assert thin(values)[0] == 0 and thin(values)[-1] == 4999 and thin(values[:10]) is not None


def test_an_empty_view_draws_nothing():
    traces, _ = updates(View())
    assert all(len(change["x"]) == 0 for change in traces.values())


def test_updates_fill_exactly_the_traces_there_are():
    uids = [trace["uid"] for trace in blank_figure()["data"]]
    assert len(set(uids)) == len(uids) and set(updates(view())[0]) == set(uids)


def test_series_differ_by_more_than_colour():
    looks = {}
    for trace in blank_figure()["data"]:
        kind = trace["uid"].split("-")
        axes = trace.get("yaxis", "bars") if kind[0] != "trend" else "trend"
        marker, line = trace.get("marker", {}), trace.get("line", {})
        pattern = marker.get("pattern", {}).get("shape")
        filled = marker.get("color") if trace["uid"] in ("memory-free",) else None
        looks.setdefault(axes, []).append((line.get("dash"), line.get("width"), marker.get("symbol"), pattern, filled))
    assert len(set(looks["y4"])) == len(looks["y4"])
    assert len(set(looks["trend"])) == len(looks["trend"])


def test_the_upload_button_is_gone_and_zoom_stays(charts):
    for layout in (charts.figure.layout, figure.blank("title", "x", "y").layout):
        assert "sendChartToCloud" in layout.modebar.remove and "zoom2d" not in layout.modebar.remove
        assert layout.modebar.bgcolor == "rgba(0,0,0,0)"  # plotly's own is half black on a clear page
    assert charts.figure._config["displaylogo"] is False
    assert charts.figure.layout.uirevision == "keep"


def test_a_line_that_stands_alone_is_named_too():
    assert figure.blank("title", "x", "y").layout.showlegend is True, "plotly names lines from the second on"


def test_the_numbers_of_runs_that_are_nearly_the_same_stand_apart():
    points = [RunPoint(number, 0.1, 900.0, MET, "") for number in range(1, 10)]
    places = updates(View(points=points))[0]["run-met"]["textposition"]
    assert all(one != other for one, other in zip(places, places[1:], strict=False))


def test_uids_are_fixed(charts):
    assert [trace.uid for trace in charts.figure.data] == [trace["uid"] for trace in blank_figure()["data"]]


def test_log_axis_follows_the_data():
    _, layout = updates(view())
    low, high = layout["xaxis3.range"]
    assert 10**low <= 0.1 and 10**high >= 10.0
    assert "100 ms" in layout["xaxis3.ticktext"]
