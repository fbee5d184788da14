"""Where int4 stops helping: what is said of given times, and that the steps that are timed are the ones meant."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import ConfigError
from workbench import crossover
from workbench.crossover import Crossover, measure, step_seconds

ROOT = Path(__file__).resolve().parents[3]
CONFIG = EngineConfig(model="synthetic:tiny", device="cpu", memory_limit=60 * 10**6)


def given(**times):
    batches = (1, 8, 64)
    return Crossover("m", "d", {n: {b: tuple(t) for b, t in zip(batches, v, strict=True)} for n, v in times.items()})


def test_the_last_batch_that_wins_is_named():
    found = given(bf16=[(4.0, 4.4), (4.0, 4.0), (4.0, 4.0)], int4=[(1.0, 1.1), (3.0, 2.0), (4.4, 3.0)])
    assert found.speedup("int4", "bf16", 8) == (pytest.approx(5 / 3), pytest.approx(4 / 3), 2.0)
    assert found.last_win("int4", "bf16") == 8
    assert found.sentences() == [
        "int4 is faster than bf16 up to batch 8 (4.00x at batch 1), and at 64 not in every round (0.91x to 1.33x)"
    ]
    always = given(bf16=[(4.0,)] * 3, int8=[(2.0,)] * 3, int4=[(1.0,), (2.5,), (3.0,)])
    assert always.sentences() == [
        "int8 is faster than bf16 at every batch size measured: 2.00x at batch 1, 2.00x at 64",
        "int4 is faster than bf16 at every batch size measured: 4.00x at batch 1, 1.33x at 64",
        "int4 is faster than int8 up to batch 1 (2.00x at batch 1), and no longer at 8 (0.80x)",
    ]
    never = given(bf16=[(1.0,)] * 3, int4=[(1.0,), (0.5,), (0.5,)])
    assert never.sentences() == [
        "int4 is not faster than bf16 at batch 1 (1.00x at batch 1); in every round it is at batch 8, 64"
    ]
    slow = given(bf16=[(1.0,)] * 3, int4=[(2.0,)] * 3)
    assert slow.sentences() == ["int4 is not faster than bf16 even at batch 1 (0.50x at batch 1)"]
    dip = given(bf16=[(1.0,)] * 3, int4=[(0.5,), (2.0,), (0.5,)])
    assert dip.sentences()[0].endswith("and no longer at 8 (0.50x); in every round it is again at batch 64")
    torn = given(bf16=[(1.0, 1.0)] * 3, int4=[(1.25, 0.5)] * 3)
    assert torn.sentences() == ["int4 is not faster than bf16 in every round (0.80x to 2.00x at batch 1)"]
    assert "nothing was measured" in Crossover("m", "d", {"bf16": {}, "int4": {}}).sentence("int4", "bf16")


def test_it_is_shown_as_table_and_figure():
    found = given(bf16=[(4.0, 4.4), (4.0, 4.0), (4.0, 4.0)], int4=[(1.0, 1.1), (3.0, 2.0), (4.4, 3.0)])
    assert found.frame().loc[8, "int4"] == 2.5 and str(found).splitlines()[2].split()[-1] == "4.00x"
    (line,) = found.figure().data
    assert list(line.x) == [1, 8, 64] and line.y[1] == pytest.approx(5 / 3)
    assert line.error_y.arrayminus[1] == pytest.approx(1 / 3)


def test_the_steps_that_are_timed_decode_the_whole_batch():
    steps = []
    config = EngineConfig(**{**vars_of(CONFIG), "max_batched_tokens": 256, "max_batch_size": 8})
    with Engine(config) as engine:
        engine.observers.append(steps.append)
        assert step_seconds(engine, 8, 5) > 0
        assert not engine.has_unfinished()
    decoding = [step for step in steps if step.num_prefills == 0]
    assert len(decoding) >= 2 and all(step.num_decodes == 8 for step in decoding[:5])


def vars_of(config):
    return {name: getattr(config, name) for name in config.__dataclass_fields__}


def test_formats_are_measured_in_turns():
    found = measure(CONFIG, batches=(2, 1, 16), rounds=2, steps=2, progress=False)
    assert found.batches == [1, 2, 16] and set(found.seconds) == {"bf16", "int8", "int4"} and not found.skipped
    assert all(len(times) == 2 and min(times) > 0 for sizes in found.seconds.values() for times in sizes.values())
    fewer = measure(CONFIG, ("bf16", "int4"), batches=(1, 1200), rounds=1, steps=1, progress=False)
    assert fewer.batches == [1] and fewer.skipped == (1200,)


def test_an_interrupt_keeps_whole_rounds():
    asked = iter([False] * 5 + [True] * 10)
    part = measure(CONFIG, ("bf16", "int8"), (1,), rounds=3, steps=1, progress=False, stopped=lambda: next(asked))
    assert part.interrupted and [len(part.seconds[name][1]) for name in part.seconds] == [1, 1]


def test_an_interrupted_command_tells_how_many_rounds_there_are(monkeypatch, capsys):
    part = Crossover("m", "d", {"bf16": {1: (2.0, 2.0), 2: (2.0,)}, "int4": {1: (1.0, 1.0), 2: (1.0,)}}, (), True)
    monkeypatch.setattr(crossover, "measure", lambda *args, **options: part)
    assert crossover.main(["--quiet"]) == 130
    assert "median of 1 to 2 rounds, interrupted" in capsys.readouterr().out


def test_a_models_name_is_text_in_the_figures_title():
    found = Crossover("<a href='x'>m</a>", "d", {"bf16": {1: (2.0,)}, "int4": {1: (1.0,)}})
    assert "<a" not in found.figure().layout.title.text and "&lt;a" in found.figure().layout.title.text


def test_refusals():
    with pytest.raises(ConfigError, match="runner is 'simulated'"):
        measure(EngineConfig(runner="simulated"))
    with pytest.raises(ConfigError, match="1 formats, 3 rounds"):
        measure(CONFIG, ("bf16",))
    with pytest.raises(ConfigError, match="batch 1200 needs"):
        measure(CONFIG, batches=(1200,), progress=False)


def test_measuring_needs_no_plotly():
    """On a GPU server there may be none."""
    modules = "crossover", "quality.formats", "sensitivity.frontier", "lm_eval"
    code = f"import sys; sys.modules['plotly'] = None; import {', '.join(f'workbench.{name}' for name in modules)}"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_the_command_prints_and_writes(tmp_path, capsys):
    path = tmp_path / "out.json"
    arguments = ["--model", "synthetic:tiny", "--device", "cpu", "--batches", "1", "2", "--rounds", "1", "--steps", "1"]
    assert crossover.main([*arguments, "--quiet", "--json", str(path)]) == 0
    record = json.loads(path.read_text())
    assert set(record["seconds"]["int4"]) == {"1", "2"} and record["machine"]["versions"]["torch"]
    assert record["sentences"][0] in capsys.readouterr().out
    with pytest.raises(SystemExit):
        crossover.main(["--batches", "0"])
