"""Who draws when: one thread ticks, beside runs that block, follow each other, break off or outlive the panel."""

import threading

import pytest

from tests.unit.workbench.support import SIMULATED, finish
from workbench import Workbench
from workbench.panel import panel as panel_module
from workbench.panel import screen


def test_the_ticking_thread_lives_only_while_there_is_something_to_show(monkeypatch):
    monkeypatch.setattr(screen, "build_charts", lambda: (screen.StillCharts(), ""))
    monkeypatch.setattr(panel_module, "TICK", 0.01)
    with Workbench(**SIMULATED) as panel:
        panel.screen  # noqa: B018
        panel._join()
        run = panel.run()
        assert run.wait(30)
        panel._join()
        assert panel._ticker is None and "run 1 done" in panel.screen.progress.value
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("inferlab")]


def test_close_frees_and_may_be_called_twice(live):
    live.set(requests=20_000)
    live.run()
    live.close()
    live.close()
    assert live._run.is_over and "data:image/svg+xml" in live.screen._place.children[0].value
    assert live.screen.run.disabled and live.controls.widget("rate").disabled
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("inferlab")]
    with pytest.raises(RuntimeError, match="closed"):
        live.run()


def test_nobody_else_ticks_while_a_blocking_run_does(monkeypatch):
    monkeypatch.setattr(screen, "build_charts", lambda: (screen.StillCharts(), ""))
    with Workbench(**SIMULATED) as panel:
        panel.screen  # noqa: B018
        writers = set()
        show = panel.screen.charts.show
        monkeypatch.setattr(
            panel.screen.charts, "show", lambda *a, **k: (writers.add(threading.current_thread().name), show(*a, **k))
        )
        begin = panel._begin

        def begin_and_turn_a_knob():
            run = begin()
            panel.controls.widget("kv").value = "int8"  # as a person would during the run
            return run

        monkeypatch.setattr(panel, "_begin", begin_and_turn_a_knob)
        panel._join()
        writers.clear()
        panel.run(blocking=True)
        assert writers == {"MainThread"}


def test_a_snapshot_of_a_run_that_is_over_leaves_the_panel_ready(live):
    assert live.run().wait(30)
    live.snapshot()
    live.tick()
    assert not live.screen.run.disabled and live.screen.stop.disabled and not live.screen.keep.disabled
    assert "run 1 done: 24 of 24 requests" in live.screen.progress.value


def test_runs_that_follow_each_other_at_once_are_all_shown_and_the_latest_is_kept(live):
    for weights in ("bf16", "int8"):
        assert live.run(weights=weights).wait(30)
        live.keep_baseline()
        assert live._baseline.config.weights == weights
    live.tick()
    assert [point.number for point in live._view().points] == [1, 2]


def test_a_picture_that_fails_leaves_the_buttons_as_they_must_be(live, monkeypatch):
    def broken(*args, **options):
        raise ValueError("no room for the picture")

    run = live.run()
    assert run.wait(30)
    monkeypatch.setattr(live.screen, "show", broken)
    live.tick()
    assert live.screen.alert.text == "ValueError: no room for the picture"
    assert not live.screen.run.disabled and live.screen.stop.disabled


def test_a_run_begun_while_the_one_before_is_drawn_can_be_stopped(live, monkeypatch):
    show = live.screen.show
    starting = threading.Thread(target=lambda: live.run(requests=20_000), daemon=True)

    def slow(view, tiles, run, **options):
        if run is not None and run.is_over and run.id == 1:
            starting.start()
            starting.join(0.3)
        show(view, tiles, run, **options)

    assert live.run().wait(30)
    monkeypatch.setattr(live.screen, "show", slow)
    live.tick()
    starting.join(30)
    assert live._run.id == 2 and live.screen.run.disabled and not live.screen.stop.disabled
    live.stop()
    finish(live)


def test_nobody_ticks_beside_a_blocking_run_that_follows_another_at_once(monkeypatch):
    monkeypatch.setattr(screen, "build_charts", lambda: (screen.StillCharts(), ""))
    with Workbench(**SIMULATED) as panel:
        panel.screen  # noqa: B018
        writers = set()
        show, begin = panel.screen.charts.show, panel._begin
        monkeypatch.setattr(
            panel.screen.charts, "show", lambda *a, **k: (writers.add(threading.current_thread().name), show(*a, **k))
        )
        assert panel.run().wait(30)
        monkeypatch.setattr(panel, "_begin", lambda: (writers.clear(), begin())[1])
        panel.run(blocking=True, requests=3000)
        assert writers == {"MainThread"}


def test_a_second_interrupt_leaves_the_ticking_to_the_panel(live, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    live.set(requests=20_000)
    with monkeypatch.context() as patch:
        patch.setattr(live, "tick", interrupted)
        with pytest.raises(KeyboardInterrupt):
            live.run(blocking=True)
    assert not live._lent
    live.stop()
    finish(live)


def test_a_closed_panel_shows_how_its_run_ended(live):
    live.run(requests=20_000)
    live.tick()
    live.close()
    assert live._shown.status == "stopped" and "stopped" in live.snapshot().text
