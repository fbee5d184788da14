"""What other programs took of the processor, and when it is worth a word."""

from __future__ import annotations

import subprocess
import sys
import time
from collections import namedtuple

import psutil
import pytest

from engine.config import EngineConfig
from tests.unit.workbench.support import TINY, tiny_load
from workbench import Session, Workbench
from workbench.runs.neighbours import ProcessorTimes, words

BUSY = "import time\nend = time.perf_counter() + 30\nwhile time.perf_counter() < end: pass"


@pytest.mark.parametrize(
    ("total", "idle", "own", "share"),
    [(20.0, 12.0, 8.0, 0.0), (20.0, 0.0, 12.0, 0.4), (20.0, 5.0, 5.0, 0.5), (20.0, 12.0, 9.0, 0.0), (0, 0, 0, None)],
)
def test_share_of_others(total: float, idle: float, own: float, share: float | None) -> None:
    begin = ProcessorTimes(1000.0, 300.0, 40.0)
    end = ProcessorTimes(1000.0 + total, 300.0 + idle, 40.0 + own)
    assert end.others_since(begin) == share


def test_a_guest_is_counted_once_and_waiting_for_a_disk_is_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    times = namedtuple("times", "user nice system idle iowait irq softirq steal guest guest_nice")
    monkeypatch.setattr(psutil, "cpu_times", lambda: times(10, 1, 2, 30, 4, 1, 1, 5, 9, 1))
    now = ProcessorTimes.now()
    assert (now.total, now.idle) == (54, 34) and now.own > 0


def test_a_busy_neighbour_is_seen() -> None:
    with subprocess.Popen([sys.executable, "-c", BUSY]) as neighbour:
        begin = ProcessorTimes.now()
        time.sleep(1.0)
        share = ProcessorTimes.now().others_since(begin)
        neighbour.kill()
    assert share is not None and share > 0.25 / (psutil.cpu_count() or 1)


def test_words() -> None:
    assert words(None) == words(0.04) == ""
    assert words(0.31) == "others took 31 % of the CPU"


def test_runs_on_a_processor_know_it_and_simulated_ones_do_not() -> None:
    with Session() as session:
        run = session.run(TINY, tiny_load(8), progress=False)
        assert run.others is not None and 0 <= run.others <= 1
        run.others = 0.5
        assert "others took 50 % of the CPU meanwhile; alone, the engine is faster" in run.summary()
        assert session.run(EngineConfig(model="synthetic:7b", runner="simulated"), tiny_load(8)).others is None


def test_the_panel_says_it_where_it_says_how_long_a_run_took(live: Workbench) -> None:
    run = live.run(blocking=True)
    for others, said in ((0.5, True), (0.0, False), (None, False)):
        run.others = others
        live.screen.show(live._view(), live._tiles(), run.snapshot(), slow=False)
        assert ("; others took 50 % of the CPU" in live.screen.progress.value) is said
