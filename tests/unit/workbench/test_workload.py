"""Workloads: determined by their seed, exact in total time, and strict about their values."""

import math

import pytest

from engine.errors import ConfigError
from workbench.runs.workload import PRESETS, Workload

VOCAB, ROOM = 1000, 512


def requests(workload, **changes):
    return workload.requests(**{"vocab_size": VOCAB, "session_len": ROOM, **changes})


def words(text):
    return [ord(letter) for letter in text]


def test_the_seed_determines_everything():
    workload = Workload.preset("dialogue service", seed=7)
    assert requests(workload) == requests(workload)
    assert requests(workload) != requests(Workload.preset("dialogue service", seed=8))


def test_arrivals_ascend_and_end_at_exactly_requests_over_rate():
    moments = Workload(rate=4.0, num_requests=100, seed=3).arrivals()
    assert moments == sorted(moments) and moments[0] > 0
    assert moments[-1] == pytest.approx(25.0, rel=1e-12)


def test_requests_in_bursts_without_end_come_together():
    assert Workload(rate=2.0, num_requests=2, burstiness=1e-9).arrivals() == [1.0, 1.0]


def test_burstiness_steadies_the_gaps():
    def spread(burstiness):
        moments = Workload(rate=1.0, num_requests=2000, burstiness=burstiness).arrivals()
        gaps = [b - a for a, b in zip(moments, moments[1:], strict=False)]
        return math.sqrt(sum((gap - 1.0) ** 2 for gap in gaps) / len(gaps))

    assert spread(1.0) == pytest.approx(1.0, abs=0.1)  # Poisson: the deviation equals the mean
    assert spread(100.0) == pytest.approx(0.1, abs=0.02)  # gamma: 1 / sqrt(shape)


def test_rate_inf_sends_all_at_once_and_a_closed_loop_has_no_times():
    assert set(Workload(rate=math.inf).arrivals()) == {0.0}
    assert set(Workload(concurrency=4).arrivals()) == {None}


def test_prompts_share_what_the_workload_says_and_nothing_else():
    workload = Workload(rate=1.0, num_requests=8, shared_len=20, groups=2, group_len=30, input_len=(5, 9))
    prompts = [item.prompt_token_ids for item in requests(workload)]
    assert len({prompt[:20] for prompt in prompts}) == 1
    assert len({prompt[:50] for prompt in prompts}) == 2
    assert prompts[0][:50] == prompts[2][:50] != prompts[1][:50]
    assert len({prompt[50:] for prompt in prompts}) == 8
    assert all(55 <= len(prompt) <= 59 for prompt in prompts)


def test_lengths_cover_their_range_and_answers_run_to_their_length():
    items = requests(Workload(rate=1.0, num_requests=500, input_len=(2, 4), output_len=(3, 5)))
    assert {len(item.prompt_token_ids) for item in items} == {2, 3, 4}
    assert {item.params.max_tokens for item in items} == {3, 4, 5}
    assert all(item.params.ignore_eos for item in items)


def test_random_ids_avoid_the_end_of_text():
    items = requests(Workload(rate=1.0), vocab_size=4, avoid=(0, 3))
    assert {token for item in items for token in item.prompt_token_ids} == {1, 2}


def test_prompts_are_cut_from_the_text():
    text = "the quick brown fox jumps over the lazy dog " * 20
    for item in requests(Workload(rate=1.0), encode=words, text=text):
        assert "".join(map(chr, item.prompt_token_ids)) in text


def test_a_text_shorter_than_a_prompt_is_repeated():
    item = requests(Workload(rate=1.0, num_requests=1, input_len=(10, 10)), encode=words, text="abc")[0]
    assert "".join(map(chr, item.prompt_token_ids)) == "abcabcabca"


def test_own_prompts_are_used_in_turn_and_end_where_the_model_does():
    items = requests(Workload(rate=1.0, num_requests=3, prompts=["ab", "c"]), encode=words)
    assert [item.prompt_token_ids for item in items] == [(97, 98), (99,), (97, 98)]
    assert not items[0].params.ignore_eos


def test_presets_fit_into_384_tokens_and_take_changes():
    for name, preset in PRESETS.items():
        assert preset.name == name and preset.max_total <= 384
        assert max(len(i.prompt_token_ids) + i.params.max_tokens for i in requests(preset)) <= preset.max_total
    closed = Workload.preset("dialogue service", concurrency=4)
    assert (closed.rate, closed.concurrency) == (None, 4)
    open_ = Workload.preset("batch processing", rate=2.0)
    assert (open_.rate, open_.concurrency, open_.arrivals_text) == (2.0, None, "2 requests/s")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, "exactly one"),
        ({"rate": 1.0, "concurrency": 1}, "exactly one"),
        ({"rate": 0.0}, "rate is 0.0"),
        ({"rate": math.nan}, "rate is nan"),
        ({"rate": -1.0}, "greater than 0"),
        ({"concurrency": 0}, "concurrency is 0"),
        ({"rate": 1.0, "num_requests": 0}, "num_requests is 0; it must be a whole number from 1"),
        ({"rate": 1.0, "num_requests": True}, "num_requests is True"),
        ({"rate": 1.0, "burstiness": math.inf}, "burstiness is inf"),
        ({"rate": 1.0, "input_len": (5, 4)}, "input_len is (5, 4)"),
        ({"rate": 1.0, "output_len": (0, 4)}, "output_len is (0, 4)"),
        ({"rate": 1.0, "shared_len": -1}, "shared_len is -1"),
        ({"rate": 1.0, "prompts": "abc"}, "a list of texts"),
        ({"rate": 1.0, "prompts": ("a", "")}, "empty text"),
        ({"rate": 1.0, "seed": -1}, "seed is -1"),
    ],
)
def test_bad_values_are_named_with_their_range(values, said):
    with pytest.raises(ConfigError) as error:
        Workload(**values)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_bad_temperature_and_an_unknown_name_are_refused():
    with pytest.raises(ValueError, match="temperature is 3"):
        Workload(rate=1.0, temperature=3.0)
    with pytest.raises(TypeError, match="ratee"):
        Workload(ratee=1.0)
    with pytest.raises(ConfigError, match="'chat'; it must be one of dialogue service, batch processing"):
        Workload.preset("chat")


def test_a_request_longer_than_the_session_is_refused_before_the_run():
    with pytest.raises(ConfigError, match=r"longest request .* 256 tokens; .* at most session_len \(200\)"):
        requests(Workload(rate=1.0, input_len=(128, 128), output_len=(128, 128)), session_len=200)
    with pytest.raises(ConfigError, match="no tokenizer"):
        requests(Workload(rate=1.0, prompts=("a",)))
