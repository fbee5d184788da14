"""Perplexity: the arithmetic by hand, the figure against transformers, and refusals."""

import math
import statistics

import pytest

from engine.bundled import MODEL_DIR, heldout_text
from engine.config import EngineConfig
from engine.errors import ConfigError
from workbench.quality import Perplexity, cut_windows, perplexity


def test_the_arithmetic_by_hand():
    p = Perplexity.of([[-1.0, -3.0], [-2.0, -2.0, -2.0]])
    assert p.value == pytest.approx(math.exp(2.0)) and (p.tokens, p.windows) == (5, 2)
    assert p.window_nll == (2.0, 2.0) and p.low == p.high == p.value
    assert Perplexity.of([[-1.0]]).low is None
    wide = Perplexity.of([[-1.0], [-3.0]])
    assert wide.low < wide.value < wide.high
    assert str(p) == "perplexity 7.389 (95 %: 7.389 to 7.389) over 5 tokens"


def test_formats_are_compared_window_by_window():
    base, other = Perplexity.of([[-1.0], [-3.0]]), Perplexity.of([[-1.1], [-3.1]])
    ratio, margin = other.ratio(base)
    assert ratio == pytest.approx(math.exp(0.1)) and margin == pytest.approx(0.0, abs=1e-12)
    assert Perplexity.of([[-1.0]]).ratio(Perplexity.of([[-1.0]])) == (1.0, None)
    with pytest.raises(ValueError, match="cannot be compared"):
        base.ratio(Perplexity.of([[-1.0]]))


def test_windows_are_spread_and_do_not_overlap():
    windows = cut_windows(range(1000), 100, 350)
    assert [(w[0], len(w)) for w in windows] == [(0, 100), (450, 100), (900, 100)]
    assert len(cut_windows(range(1000), 100, 10**6)) == 10
    assert cut_windows(range(50), 100, 350) == [range(50)]
    with pytest.raises(ConfigError, match="the text has 3 tokens; perplexity needs at least 16"):
        cut_windows(range(3), 100, 350)


@pytest.fixture(scope="module")
def engine():
    from engine.engine import Engine

    with Engine(EngineConfig(impl="torch", device="cpu", memory_limit=200 * 10**6)) as engine:
        yield engine


def test_the_figure_agrees_with_transformers(engine):
    import torch
    from transformers import LlamaForCausalLM

    windows = cut_windows(engine.tokenizer.encode(heldout_text()), 64, 256)
    model = LlamaForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()
    with torch.inference_mode():
        losses = [model(ids, labels=ids).loss.item() for ids in (torch.tensor([list(w)]) for w in windows)]
    measured = perplexity(engine, max_tokens=256, window=64)
    assert measured.window_nll == pytest.approx(losses, rel=2e-3)  # keys and values are kept in bf16
    assert (measured.tokens, measured.windows) == (4 * 63, 4)
    assert not engine.has_unfinished()


def test_int8_weights_stay_within_one_per_cent_of_bf16():
    from engine.engine import Engine

    measured = []
    for weights in ("bf16", "int8"):
        with Engine(EngineConfig(weights=weights, device="cpu", memory_limit=200 * 10**6)) as engine:
            measured.append(perplexity(engine, max_tokens=1024, window=256))
    assert measured[0].value < 50.0  # the model has learnt something: a guess among its 4,096 tokens would be 4,096
    assert measured[1].ratio(measured[0])[0] == pytest.approx(1.0, abs=0.01)


def test_bad_values_and_stops(engine):
    with pytest.raises(ConfigError, match="window is 8"):
        perplexity(engine, window=8)
    with pytest.raises(ConfigError, match="max_tokens 10"):
        perplexity(engine, max_tokens=10)
    with pytest.raises(InterruptedError):
        perplexity(engine, max_tokens=64, window=32, stopped=lambda: True)


@pytest.mark.parametrize("values", [{"model": "synthetic:0.5b", "runner": "simulated"}, {"runner": "simulated"}])
def test_a_model_without_meaning_has_no_perplexity(values):
    from engine.engine import Engine

    with Engine(EngineConfig(**values)) as engine, pytest.raises(ConfigError, match="has no perplexity here"):
        perplexity(engine)


@pytest.mark.parametrize(
    ("windows", "quantile"), [(2, 12.706), (3, 4.303), (4, 3.182), (6, 2.571), (8, 2.365), (16, 2.131), (10_000, 1.960)]
)
def test_few_windows_make_a_wide_interval(windows, quantile):
    """Student's t, whose 97.5 % quantiles stand in any table."""
    gaps = [0.1 if i % 2 else -0.1 for i in range(windows)]
    base = Perplexity.of([[-1.0]] * windows)
    found = Perplexity.of([[-1.0 + gap] for gap in gaps])
    spread = statistics.stdev(gaps) / math.sqrt(windows)
    assert found.ratio(base)[1] == pytest.approx(found.ratio(base)[0] * quantile * spread, rel=2e-3)
    assert math.log(found.high / found.value) == pytest.approx(quantile * spread, rel=2e-3)
