"""The panel without a browser: traits are set as the browser would, and `tick` is called by hand."""

import base64
import io
import re

import numpy as np
import pandas
import pytest

from engine.errors import ConfigError
from kernels import KV_FORMATS, WEIGHT_FORMATS
from tests.unit.workbench.support import SIMULATED, finish
from workbench import Workbench
from workbench.panel import panel as panel_module
from workbench.panel import screen
from workbench.panel.forecast import predicted_plan
from workbench.panel.knobs import KNOBS, config_from, slo_from, start_values, workload_from
from workbench.runs.run import Run
from workbench.runs.workload import PRESETS


def test_knobs_become_a_config_a_workload_and_an_slo():
    values = start_values({"weights": "int4", "device": "h200", "concurrency": 4, "slo_ttft_ms": 200})
    config, workload = config_from(values), workload_from(values)
    assert (config.weights, config.runner, config.gpu, config.memory_limit) == ("int4", "simulated", "h200", None)
    assert (workload.concurrency, workload.rate) == (4, None)
    assert slo_from(values).ttft == 0.2


def test_numbers_out_of_an_array_are_numbers():
    values = start_values({"max_batch_size": np.arange(9)[8], "cache_ratio": np.float32(0.5), "requests": np.int64(4)})
    assert (values["max_batch_size"], values["cache_ratio"], values["requests"]) == (8, 0.5, 4)
    assert {type(values[name]) for name in ("max_batch_size", "requests")} == {int}


def test_infinite_rate_sends_all_at_once():
    assert workload_from(start_values({"rate": float("inf")})).arrivals_text == "all at once"


def test_options_are_the_dicts_of_the_engine():
    assert list(KNOBS["weights"].options) == list(WEIGHT_FORMATS)
    assert list(KNOBS["kv"].options) == list(KV_FORMATS)
    assert list(KNOBS["workload"].options) == list(PRESETS)


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"wieghts": "int4"}, "unknown knob 'wieghts'; the knobs are model, device"),
        ({"weights": "int3"}, "weights is 'int3'; it must be one of bf16, int8, int4"),
        ({"cache_ratio": -0.1}, "cache_ratio is -0.1; it must be a number from 0.05 to 0.95"),
        ({"cache_ratio": float("nan")}, "cache_ratio is nan"),
        ({"max_batch_size": 0}, "max_batch_size is 0; it must be a whole number from 1 to"),
        ({"requests": 2.5}, "requests is 2.5; it must be a whole number"),
        ({"prefix_caching": 1}, "prefix_caching is 1; it must be True or False"),
        ({"weights": ["int4"]}, "weights is ['int4']; it must be one of bf16, int8, int4"),
        ({"model": ""}, "model is ''; it must be one of bundled"),
    ],
)
def test_bad_knobs_are_one_sentence(knobs, words):
    with pytest.raises(ConfigError) as error:
        Workbench(threaded=False, **knobs)
    assert str(error.value).startswith(words) and "\n" not in str(error.value)


def test_blocking_run_measures_without_a_screen(panel):
    run = panel.run(blocking=True)
    assert run.status == "done" and panel._screen is None
    assert panel.summary().startswith("run 1 · synthetic:0.5b on a simulated l4")
    assert len(panel.runs) == 1 and panel.runs.loc[1, "tokens_per_s"] > 0


def test_a_snapshot_that_says_done_holds_the_final_figures(monkeypatch):
    run = Run(
        1, config_from(start_values(SIMULATED)), workload_from(start_values(SIMULATED)), slo_from(start_values({}))
    )
    run.begin(0.0)
    measured = run._measured

    def ends_meanwhile():
        before = measured()
        run.end("done")
        return before

    monkeypatch.setattr(run, "_measured", ends_meanwhile)
    assert run.snapshot().status == "running"


def test_run_button_only_asks_and_the_tick_starts(live):
    live.screen.run.click()
    assert live.session.active is None and not live.session.runs, "the callback must not do the work itself"
    live.tick()
    assert len(live.session.runs) == 1 and live.screen.run.disabled
    finish(live)
    assert not live.screen.run.disabled and live.screen.stop.disabled and not live.screen.keep.disabled
    assert "run 1 done: 24 of 24 requests" in live.screen.progress.value
    assert live.screen.status.text == live._run.snapshot().sentence


def test_what_would_fit_stays_in_sight_when_a_baseline_is_kept_or_the_page_drawn_again(live):
    live.run(blocking=True)
    live.controls.widget("kv").value = "int8"
    for act in (live.tick, live.screen.keep.click, lambda: live._ask(live._redraw)):
        act()
        live.tick()
        assert "Next run: about" in live.screen.progress.value
    live.run(blocking=True)
    assert "run 2 done" in live.screen.progress.value


def test_the_sentence_follows_a_run_from_loading_to_serving_at_once(live, monkeypatch):
    monkeypatch.setattr(panel_module, "SPOKEN", 1e9)
    values = start_values(SIMULATED)
    live._run = Run(1, config_from(values), workload_from(values), slo_from(values))
    live.tick()
    assert live.screen.status.text == "Loading the model …"
    live._run.begin(0.0)
    live.tick()
    assert live.screen.status.text == "Serving …"
    live._run.end("stopped")
    live.tick()
    assert live.screen.status.text == "No step was computed."


def test_stop_button_ends_a_run_midway(live):
    live.set(requests=20_000)
    live.screen.run.click()
    live.tick()
    while not live._run.snapshot().finished:
        pass
    live.tick()
    assert not live.screen.stop.disabled
    live.screen.stop.click()
    live.tick()
    finish(live)
    assert live._run.status == "stopped" and 0 < live._run.snapshot().finished < 20_000
    assert not live.screen.run.disabled


def test_a_second_run_while_one_goes_on_is_refused_in_words(live):
    live.set(requests=20_000)
    live.run()
    live.screen.run.click()
    live.tick()
    assert "still going on" in live.screen.alert.text
    live.stop()
    finish(live)


def test_baseline_is_compared(live):
    live.run(blocking=True)
    live.screen.keep.click()
    live.tick()
    live.run(blocking=True, weights="int4")
    assert "baseline" in live.screen.tiles.value
    assert "weights bf16 -> int4" in live.screen.status.text and "Against run 1" in live.summary()
    bars = live._view().memory
    assert [bar.label for bar in bars] == ["this run", "baseline"]
    assert bars[0].parts["weights"] < bars[1].parts["weights"] and bars[0].tokens > bars[1].tokens


def test_baseline_before_a_run_is_refused_in_words(live):
    live._ask(live.keep_baseline)
    live.tick()
    assert "no finished run" in live.screen.alert.text


def test_a_run_that_failed_is_no_baseline_and_hides_none(live):
    live.run(blocking=True)
    live.run(blocking=True, model="no-such-folder", device="cpu")
    assert not live.screen.keep.disabled
    live.screen.keep.click()
    live.tick()
    assert live._baseline.id == 1


def test_a_knob_shows_what_would_fit_before_a_run(live):
    before = live._plan.tokens_that_fit
    live.controls.widget("kv").value = "int4"
    assert live._plan.tokens_that_fit == before, "the callback must not do the work itself"
    live.tick()
    assert live._plan.tokens_that_fit > 3 * before
    assert f"{live._plan.tokens_that_fit:,} tokens fit" in live.screen.progress.value


def test_an_impossible_memory_is_one_sentence_and_passes(live):
    live.controls.widget("memory_limit_mb").value = 100
    live.tick()
    assert live.screen.alert.text.startswith("memory_limit is 100.0 MB; weights take")
    assert "tokens fit" not in live.screen.progress.value, "what the knobs before would have had is not true any more"
    live.controls.widget("memory_limit_mb").value = 0
    live.tick()
    assert not live.screen.alert.text


def test_a_model_that_is_not_there_fails_in_one_sentence(live):
    live.run(blocking=True, model="no-such-folder", device="cpu")
    assert live._run.status == "failed"
    assert live.screen.alert.text.startswith("model is 'no-such-folder'") and "\n" not in live.screen.alert.text
    live.run(blocking=True, **SIMULATED)
    assert live._run.status == "done" and not live.screen.alert.text


def test_a_preset_brings_its_load(live):
    live.controls.widget("workload").value = "batch processing"
    values = live.controls.values()
    assert values["load"] == "burst" and live.controls.widget("rate").disabled
    live.controls.widget("workload").value = "dialogue service"
    assert live.controls.values()["rate"] == PRESETS["dialogue service"].rate
    assert not live.controls.widget("rate").disabled and live.controls.widget("concurrency").disabled


def test_a_device_brings_its_memory():
    assert start_values({})["memory_limit_mb"] > 0
    assert start_values({"device": "h200"})["memory_limit_mb"] == 0
    assert start_values({"device": "h200", "memory_limit_mb": 50})["memory_limit_mb"] == 50


def test_slider_and_field_move_together(live):
    field, slider = live.controls._fields["max_batch_size"].inputs
    slider.value = 17.3
    assert field.value == 17
    field.value = 2000
    assert slider.value == 512 and field.value == 2000, "a field may exceed its slider's reach"


def test_every_input_has_a_name_and_help(live):
    for name, field in live.controls._fields.items():
        assert field.inputs[0].description and len(field.inputs[0].tooltip) > 20, name


def test_a_field_for_a_number_tells_its_range(live):
    tips = {name: field.inputs[0].tooltip for name, field in live.controls._fields.items()}
    assert tips["cache_ratio"].endswith(" (a number from 0.05 to 0.95)")
    assert tips["seed"].endswith(" (a whole number from 0 to 2,147,483,647)")


@pytest.mark.parametrize("hostile", ["<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "</pre><b>", "&lt;"])
def test_model_text_is_shown_escaped(live, hostile, monkeypatch):
    run = live.run(blocking=True)
    monkeypatch.setattr(run, "sample", lambda: (hostile, hostile))
    live.screen.show_sample(run)
    shown = live.screen.sample.value
    assert (hostile not in shown.removeprefix("<h4>") and "&lt;" in shown) or "&amp;lt;" in shown
    for tag in ("<script", "<img"):
        assert tag not in shown


def test_a_hostile_model_name_is_shown_escaped(live):
    live.run(blocking=True, model="<img src=x onerror=alert(1)>", device="cpu")
    assert live._run.status == "failed"
    still = live.snapshot()
    assert "<img src=x" not in still.html and "&lt;img src=x" in still.html
    assert "<img src=x" not in still.svg + live.screen.tiles.value + live.screen.progress.value


def test_an_unexpected_error_in_a_callback_is_shown(live):
    def fail():
        raise KeyError("surprise")

    live._ask(fail)
    live.tick()
    assert live.screen.alert.text == "KeyError: 'surprise'"


def test_without_live_charts_the_panel_says_so(panel, monkeypatch):
    def missing(_):
        raise ImportError("Please install anywidget to use the FigureWidget class")

    monkeypatch.setattr("workbench.panel.charts._Figure", missing)
    live = panel.screen
    assert isinstance(live.charts, screen.StillCharts)
    assert "anywidget" in live.status.text
    panel.run(blocking=True)
    assert "data:image/svg+xml" in live.charts.figure.value


def test_a_notebook_gets_the_widget_and_a_picture(live):
    bundle = live._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert bundle["text/plain"].startswith("no run yet · ") and "Tokens that fit" in bundle["text/html"]


@pytest.mark.parametrize("weights", WEIGHT_FORMATS)
@pytest.mark.parametrize(("model", "device"), [("synthetic:tiny", "cpu"), ("synthetic:tiny", "l4"), ("bundled", "cpu")])
def test_the_forecast_is_the_plan_of_the_engine(weights, model, device):
    from engine.engine import Engine

    given = {"model": model, "device": device, "weights": weights, "memory_limit_mb": 80}
    config = config_from(start_values(given))
    with Engine(config) as engine:
        assert predicted_plan(config) == engine.memory


def test_the_runs_can_be_saved_as_a_table(live):
    assert "aria-disabled" in live.screen.save.value and "href" not in live.screen.save.value
    live.run(blocking=True)
    hostile = '"><img src=x onerror=alert(1)>,\n'
    live.run(blocking=True, model=hostile, device="cpu")
    data = re.search(r'href="data:text/csv;charset=utf-8;base64,([A-Za-z0-9+/=]+)"', live.screen.save.value)[1]
    saved = pandas.read_csv(io.BytesIO(base64.b64decode(data)), index_col="run")
    assert list(saved.columns) == list(live.runs.columns) and saved.loc[2, "model"] == hostile.strip()
    assert saved.loc[1, "tokens_per_s"] == live.runs.loc[1, "tokens_per_s"] and saved.loc[2].isna()["tokens_per_s"]
    assert "<img" not in live.screen.save.value


def test_a_run_that_broke_off_in_the_middle_is_no_baseline_and_says_what_it_is(live, monkeypatch):
    live.run(blocking=True)
    plain = Run.on_step

    def broken(run, event):
        plain(run, event)
        if run._collector.num_finished:
            raise MemoryError

    monkeypatch.setattr(Run, "on_step", broken)
    live.run(blocking=True)
    assert live._run.status == "failed" and live._run.metrics.num_finished
    live.keep_baseline()
    assert live._baseline.id == 1
    assert live._view().points[1].text.startswith("run 2, failed: ")


def test_a_panel_whose_knobs_cannot_be_had_is_shown_all_the_same():
    with Workbench(threaded=False, **SIMULATED, memory_limit_mb=100) as panel:
        assert "memory_limit is 100.0 MB" in panel.snapshot().html
        assert "application/vnd.jupyter.widget-view+json" in panel._repr_mimebundle_()
