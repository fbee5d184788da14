"""KL divergence, agreement of greedy text, formats side by side: by hand, against plain sums, and end to end."""

import json
import math

import numpy as np
import pytest
import torch

from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import ConfigError
from engine.loading.loader import load_model
from engine.quantize import quantize
from engine.scoring import prompt_logits
from tests.unit.engine.checkpoints import random_model, save, tiny_config
from workbench.quality import Perplexity, perplexity
from workbench.quality import formats as quality_formats
from workbench.quality.agreement import Agreement, greedy_answers, prompts_from
from workbench.quality.divergence import Baseline, Divergence, Estimate, divergence
from workbench.quality.formats import BASELINE, Comparison, FormatQuality, candidates, compare

SMALL = {"max_tokens": 480, "window": 160}  # longer than one chunk
CONFIG = EngineConfig(device="cpu", memory_limit=200 * 10**6)


@pytest.fixture(scope="module")
def model():
    with load_model(CONFIG) as model:
        yield model


def opened(model, **changes):
    from dataclasses import replace

    return Engine(replace(CONFIG, **changes), model=model)


@pytest.fixture(scope="module")
def baseline(model):
    with opened(model) as engine:
        yield Baseline.record(engine, **SMALL)


# --- divergence -----------------------------------------------------------------------------------------------------


def test_divergence_by_hand():
    p, q = torch.tensor([[0.5, 0.25, 0.25], [1 / 3] * 3]).log(), torch.tensor([[0.25, 0.25, 0.5], [1 / 3] * 3]).log()
    assert divergence(p, q).tolist() == pytest.approx([0.25 * math.log(2), 0.0], abs=1e-6)
    assert divergence(p, p).tolist() == [0.0, 0.0]


def test_estimates_come_with_the_spread_between_windows():
    alike = [np.array([1.0, 3.0])] * 5
    assert Estimate.over(alike, np.mean) == Estimate(2.0, 2.0, 2.0)
    assert Estimate.over([np.array([1.0, 3.0])], np.mean) == Estimate(2.0, None, None)
    rng = np.random.default_rng(1)
    windows = [rng.normal(i % 3, 1.0, 50) for i in range(12)]
    found = Estimate.over(windows, np.mean)
    assert found == Estimate.over(windows, np.mean)
    expected = np.std([w.mean() for w in windows]) / math.sqrt(12)
    assert found.low < found.value < found.high
    assert (found.high - found.low) / (2 * 1.96) == pytest.approx(expected, rel=0.15)


def test_an_engine_does_not_diverge_from_itself(model, baseline):
    with opened(model) as engine:
        same = baseline.compare(engine)
        assert (same.kl_mean, same.kl_p99) == (Estimate(0.0, 0.0, 0.0),) * 2 and same.top1 == Estimate(1.0, 1.0, 1.0)
        assert same.perplexity == baseline.perplexity
        own = perplexity(engine, **SMALL)
        assert own.value == pytest.approx(same.perplexity.value, rel=1e-3) and own.tokens == same.tokens == 3 * 159


def test_figures_are_those_of_plain_sums(model, baseline):
    """Against every probability of every token in float64, without chunks of rows."""
    found = []
    for changes in ({}, {"weights": "int4"}):
        with opened(model, **changes) as engine:
            parts = [[] for _ in baseline.windows]
            for i, _, logits in prompt_logits(engine, baseline.windows):
                parts[i].append(logits.double())
            found.append([torch.cat(rows)[:-1].softmax(-1).numpy() for rows in parts])
            if changes:
                measured = baseline.compare(engine)
    p, q = (np.concatenate(windows) for windows in found)
    kl = (p * np.log(p / q)).sum(-1)
    assert measured.kl_mean.value == pytest.approx(kl.mean(), rel=1e-3)
    assert measured.kl_p99.value == pytest.approx(np.quantile(kl, 0.99), rel=1e-3)
    assert measured.top1.value == pytest.approx((p.argmax(-1) == q.argmax(-1)).mean())
    targets = np.concatenate([window[1:] for window in baseline.windows])
    nll = -np.log(q[np.arange(len(targets)), targets])
    assert measured.perplexity.value == pytest.approx(math.exp(nll.mean()), rel=1e-4)


def test_fewer_bits_diverge_more(model, baseline):
    found = {}
    for changes in ({"weights": "int8"}, {"weights": "int4"}, {"kv": "int8"}, {"kv": "int4"}):
        with opened(model, **changes) as engine:
            found[next(iter(changes.items()))] = baseline.compare(engine)
    for kind in ("weights", "kv"):
        wide, narrow = found[kind, "int8"], found[kind, "int4"]
        assert 0 < wide.kl_mean.value < narrow.kl_mean.value / 4
        assert wide.kl_p99.value < narrow.kl_p99.value and wide.top1.value > narrow.top1.value
        assert narrow.kl_mean.value < narrow.kl_p99.value


def test_large_vocabularies_bound_the_text_not_the_memory(model, monkeypatch):
    monkeypatch.setattr("workbench.quality.divergence.BASELINE_BYTES", 100 * 2 * model.spec.vocab_size)
    with opened(model) as engine:
        few = Baseline.record(engine, **SMALL)
        assert few.nbytes <= 100 * 2 * model.spec.vocab_size and few.perplexity.tokens == 99


def test_random_weights_have_no_quality(model, baseline):
    with Engine(EngineConfig(model="synthetic:tiny", memory_limit=30 * 10**6)) as engine:
        for refused in (Baseline.record, prompts_from):
            with pytest.raises(ConfigError, match="'synthetic:tiny' has no perplexity here"):
                refused(engine)
    with pytest.raises(ConfigError, match="'synthetic:tiny' has no perplexity here"):
        compare({"bf16": EngineConfig(model="synthetic:tiny", memory_limit=30 * 10**6)}, progress=False)


def test_measurements_stop_when_asked(model, baseline):
    with opened(model) as engine:
        with pytest.raises(InterruptedError):
            baseline.compare(engine, stopped=lambda: True)
        with pytest.raises(InterruptedError):
            Baseline.record(engine, **SMALL, stopped=lambda: True)
        with pytest.raises(InterruptedError):
            greedy_answers(engine, [[1, 2]], 4, stopped=lambda: True)


# --- agreement ------------------------------------------------------------------------------------------------------


def test_agreement_by_hand():
    found = Agreement.of([[1, 2, 3], [1, 9, 3], [1, 2, 9], [7, 2, 3]], [[1, 2, 3]] * 4)
    assert found.identical == (0.75, 0.5, 0.25)
    assert found.equal == (0.75, 0.75, 0.75)
    assert found.half_life == 2 and found.prompts == 4
    assert Agreement.of([[1, 2]], [[1, 2]]).half_life is None
    low, high = found.interval(2)  # half of four, by the formula
    assert (low, high) == pytest.approx((0.15, 0.85), abs=0.002)
    with pytest.raises(ValueError, match=r"1 and 1 answers of \[1, 2\] tokens"):
        Agreement.of([[1]], [[1, 2]])


def test_greedy_text_agrees_with_itself_and_less_with_int4(model):
    with opened(model) as engine:
        prompts = prompts_from(engine, count=6, prompt=32, answer=24)
        first, second = (greedy_answers(engine, prompts, 24) for _ in range(2))
        assert Agreement.of(first, second).identical == (1.0,) * 24
        with pytest.raises(ConfigError, match="prompts of 8 tokens"):
            prompts_from(engine, prompt=8)
    with opened(model, weights="int4") as engine:
        other = Agreement.of(greedy_answers(engine, prompts, 24), first)
    assert other.identical[-1] < 1.0 and list(other.identical) == sorted(other.identical, reverse=True)


# --- formats side by side -------------------------------------------------------------------------------------------


def test_every_format_is_a_candidate_once():
    found = candidates(EngineConfig())
    assert next(iter(found)) == BASELINE and len(set(found.values())) == len(found)
    assert {config.weights for config in found.values()} == set(quality_formats.WEIGHT_FORMATS)
    assert {str(config.kv) for config in found.values()} == set(quality_formats.KV_FORMATS)
    assert {config.group_size for config in found.values() if config.weights == "int4"} == {64, 128}
    assert all(config.weights == "bf16" or config.kv == "bf16" for config in found.values())


@pytest.fixture(scope="module")
def comparison():
    configs = candidates(EngineConfig(device="cpu", memory_limit=200 * 10**6), ["int8", "int4"], ["int8"])
    configs["cannot be"] = EngineConfig(device="cpu", impl="triton")
    return compare(configs, **SMALL, prompts=3, answer=8, progress=False)


def test_formats_are_compared_and_recorded(comparison):
    records = {record["name"]: record for record in json.loads(json.dumps(comparison.records()))}
    base, int8, int4 = (records[name] for name in ("bf16", "int8 weights", "int4 weights, group 128"))
    assert base["kl_mean"] is None and base["perplexity_percent"] is None and base["perplexity"] > 1
    assert 0 < int8["kl_mean"] < int4["kl_mean"] and int4["kl_mean_low"] < int4["kl_mean"] < int4["kl_mean_high"]
    assert base["weight_bytes"] > int8["weight_bytes"] > int4["weight_bytes"]
    assert records["KV int8"]["kv_bytes_per_token"] < base["kv_bytes_per_token"]
    assert len(int4["identical"]) == len(int4["equal"]) == 8
    failed = records["cannot be"]
    assert failed["kl_mean"] is failed["perplexity"] is None and "triton" in failed["error"]
    bars = comparison.bars()
    assert set(bars) == {"int8 weights", "KV int8"} and all(bar["met"] for bar in bars.values())
    assert bars["int8 weights"]["percent"] == int8["perplexity_percent"]


def test_quantized_copies_are_compared_with_what_they_were_made_from(tmp_path):
    folder = tmp_path / "copy"
    quantize("bundled", "rtn", out=folder, bar=None).close()
    configs = candidates(CONFIG, ["int4"], [], [str(folder)])
    configs["another"] = EngineConfig(model=str(save(random_model(tiny_config("llama")), tmp_path / "another")))
    del configs["bf16, float32 arithmetic"], configs["int4 weights, group 64"]
    found = {row.name: row for row in compare(configs, **SMALL, prompts=0, progress=False).rows}
    copy, plain = (found[name].divergence.kl_mean.value for name in ("checkpoint copy", "int4 weights, group 128"))
    assert copy == pytest.approx(plain, rel=0.05)  # the same codes, beside an lm_head in bf16 instead of int8
    assert "has a vocabulary of 320, the baseline one of 4,096" in found["another"].error


def of_loss(name, nats):
    return FormatQuality(name, CONFIG, 1, 1, Perplexity.of([[-nats] * 159] * 3))


def test_a_bar_can_be_missed(comparison):
    rows = [of_loss("KV int8", 4.0) if row.name == "KV int8" else row for row in comparison.rows]
    assert not quality_formats.Comparison(tuple(rows), 64).bars()["KV int8"]["met"]


@pytest.mark.parametrize("nats, met", [(0.01, True), (0.02, False)])
def test_the_bar_of_w4a8_is_what_it_loses_beyond_int4(nats, met):
    bf16, int4 = of_loss("bf16", 3.0), of_loss("int4 weights, group 128", 3.1)
    w4a8 = of_loss("w4a8 weights, group 128", 3.1 + nats)
    (bar,) = quality_formats.Comparison((bf16, int4, w4a8), 64).bars().values()
    assert bar["met"] == met and bar["against"] == int4.name
    assert bar["percent"] == pytest.approx(100 * (math.exp(nats) - 1))
    assert not quality_formats.Comparison((bf16, w4a8), 64).bars()


def test_it_is_shown_as_text_table_and_figure(comparison):
    printed = str(comparison).splitlines()
    assert len(printed) == 2 + len(comparison.rows) and "–" in printed[2]
    assert comparison.frame().loc["int4 weights, group 64", "kl_p99"] > 0
    curves = comparison.agreement_frame()
    assert curves.index.name == "tokens" and list(curves.columns) == [t.name for t in comparison.figure().data]
    assert list(comparison.figure().data[0].y) == list(curves.iloc[:, 0])


def test_an_interrupt_keeps_what_was_measured():
    asked = iter([False] * 8 + [True] * 100)
    configs = candidates(CONFIG, ["int8"], [])
    found = compare(configs, **SMALL, prompts=0, progress=False, stopped=lambda: next(asked))
    assert found.interrupted and [row.name for row in found.rows] == ["bf16"]
    with pytest.raises(InterruptedError):
        compare(configs, **SMALL, progress=False, stopped=lambda: True)


def test_the_command_prints_and_writes(tmp_path, capsys):
    text = tmp_path / "text.py"
    text.write_text("def f(x):\n    return x + 1\n\n" * 40)
    arguments = ["--text", str(text), "--tokens", "128", "--window", "64", "--prompts", "2", "--answer", "4"]
    path = tmp_path / "out.json"
    code = quality_formats.main([*arguments, "--weights", "int8", "--kv", "--quiet", "--json", str(path)])
    record = json.loads(path.read_text())
    assert code == int(not record["bars"]["int8 weights"]["met"])
    assert {"machine", "seed", "predictions", "formats"} <= set(record) and record["predictions"] == 126
    assert record["machine"]["versions"]["torch"] and "int8 weights" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        quality_formats.main(["--tokens", "8"])


def test_nearly_all_is_not_said_to_be_all():
    near, exact = Estimate(0.99996, None, None), Estimate(0.001, None, None)
    found = Divergence(exact, exact, near, Perplexity.of([[-1.0]]))
    answers = Agreement(400, (399 / 400,) * 32, (1.0,) * 32)
    rows = [FormatQuality(BASELINE, CONFIG, 1, 1, None), FormatQuality("x", CONFIG, 1, 1, None, found, answers)]
    cells = Comparison(tuple(rows), 160)._cells(rows[1])
    assert (cells["top-1"], cells["identical at 32"], cells["at the end"]) == (">99.9 %", "99.8 %", "99.8 % of 32")
    assert "top-1 agreement >99.9 %" in str(found)


def test_an_interrupt_before_anything_was_measured_is_no_traceback(monkeypatch, capsys):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(quality_formats, "compare", interrupted)
    assert quality_formats.main(["--quiet"]) == 130
    assert "interrupted before anything was measured" in capsys.readouterr().err
