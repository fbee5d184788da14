"""The demo's table and record, on a simulated GPU in place of the bundled model's arithmetic."""

import importlib
import json
from dataclasses import replace

import pytest

from workbench import demo, text


@pytest.fixture(autouse=True)
def simulated(monkeypatch):
    monkeypatch.setattr(demo, "CONFIG", replace(demo.CONFIG, runner="simulated", gpu="l4"))


def test_it_measures_every_pair_and_prints_an_aligned_table(capsys, tmp_path):
    path = tmp_path / "demo.json"
    assert demo.main(["--requests", "40", "--rate", "inf", "--quiet", "--json", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("weights  batching"))
    rows = lines[head + 2 : head + 8]
    assert [row.split()[:2] for row in rows] == [[w, b] for w in demo.WEIGHTS for b in demo.BATCHING]
    assert len({len(row) for row in rows}) == 1  # columns end together
    assert all(row.endswith(text.ABSENT) for row in rows)  # a simulated model has no perplexity, and no zero for it
    assert sum("batching" in line and line.startswith("  ") for line in lines) >= 3
    record = json.loads(path.read_text())
    assert len(record["runs"]) == 6 and record["workload"]["rate"] == "inf" and record["workload"]["seed"] == 0
    assert record["machine"]["versions"]["torch"] and "--requests 40" in record["machine"]["command"]
    assert all(run["num_finished"] == 40 and run["perplexity"] is None for run in record["runs"])


def test_a_model_that_is_not_there_is_told_once(capsys):
    with pytest.raises(SystemExit) as left:
        demo.main(["--model", "nowhere", "--quiet"])
    said = capsys.readouterr()
    assert left.value.code == 2 and not said.out and said.err.count("nowhere") == 1


def test_a_run_that_fails_is_a_row_of_dashes_and_an_exit_code(capsys, monkeypatch):
    plain = demo.Session.run

    def tight(self, config, *args, **options):
        limit = 1 << 20 if config.weights == "bf16" else config.memory_limit
        return plain(self, replace(config, memory_limit=limit), *args, **options)

    monkeypatch.setattr(demo.Session, "run", tight)
    assert demo.main(["--requests", "4", "--rate", "inf", "--quiet"]) == 1
    out = capsys.readouterr().out
    assert "  bf16, static: memory_limit is " in out
    dashes = [line.split()[2:] for line in out.splitlines() if line.startswith("bf16 ")]
    assert len(dashes) == 2 and {cell for row in dashes for cell in row} == {text.ABSENT}


def test_bad_options_are_refused_in_one_sentence(capsys):
    with pytest.raises(SystemExit):
        demo.main(["--rate", "-1"])
    assert "rate is -1.0; it must be greater than 0" in capsys.readouterr().err


def test_an_interrupt_shows_what_was_measured(capsys, monkeypatch):
    plain, calls = demo.Session.run, []

    def interrupted(self, *args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(demo.Session, "run", interrupted)
    assert demo.main(["--requests", "4", "--quiet"]) == 130
    assert "bf16     static" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["demo", "crossover", "overhead", "quantizers", "quality.formats", "lm_eval",
                                     "sensitivity.frontier"])  # fmt: skip
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(command, capsys, tmp_path):
    main = importlib.import_module(f"workbench.{command}").main
    for path, words in ((tmp_path / "none" / "x.json", "there is no folder"), (tmp_path, "it is a folder")):
        with pytest.raises(SystemExit) as left:
            main(["--json", str(path)])
        assert left.value.code == 2
        assert f"argument --json: '{path}' cannot be written: {words}" in capsys.readouterr().err
