"""Metrics against figures worked out by hand, and the p99 interval against the binomial law."""

import json
import math
import random

import numpy as np
import pytest

from engine.errors import ConfigError
from engine.request import Request, RequestOutput, RequestStatus
from engine.sampling_params import SamplingParams
from engine.scheduling.batch import StepEvent
from workbench.runs.distribution import Distribution, p99_bounds
from workbench.runs.metrics import SLO, MetricsCollector
from workbench.runs.timeseries import MAX_SAMPLES, TimeSeries


def event(start, end, *, new=0, **values):
    plain = dict.fromkeys(
        "num_decodes num_prefills num_prefill_tokens num_running num_waiting num_slots padding_tokens num_finished "
        "num_preempted num_recomputed query_tokens hit_tokens blocks_used blocks_shared blocks_cached".split(),
        0,
    )
    return StepEvent(
        **{
            **plain, "step": 0, "start": start, "end": end, "device_seconds": None, "num_new_tokens": new,
            "blocks_total": 10, "blocked_by": None, **values,
        }
    )  # fmt: skip


def finished(arrival, *token_times, status=RequestStatus.LENGTH):
    request = Request("r", [1], SamplingParams(), arrival, arrival)
    request.output_token_ids = [0] * len(token_times)
    request.token_times = list(token_times)
    request.finish_time = token_times[-1] if token_times else arrival
    request.status = status
    return RequestOutput(True, request, None, 0, 0)


def test_a_run_of_two_requests_by_hand():
    collector = MetricsCollector(10.0, SLO(ttft=1.0, tpot=0.3))
    collector.on_step(
        event(10.5, 11.0, new=2, num_prefills=2, num_prefill_tokens=30, num_slots=2, num_running=2, num_waiting=3,
              query_tokens=40, hit_tokens=10, blocks_used=4, blocked_by="blocks")
    )  # fmt: skip
    collector.on_step(
        event(11.0, 11.5, new=2, num_decodes=2, num_slots=4, padding_tokens=2, num_running=2, blocks_used=8,
              num_preempted=1, num_recomputed=7)
    )  # fmt: skip
    collector.on_step(event(11.5, 12.0, new=1, num_decodes=1, num_slots=4, padding_tokens=3, blocks_used=2))
    collector.on_finish(finished(10.0, 11.0, 11.5, 12.0))
    collector.on_finish(finished(10.5, 11.0, 11.5))
    m = collector.metrics()
    assert m.duration == 2.0 and m.num_steps == 3 and m.step_s == 1.5 and m.busy == 0.75
    assert (m.output_tokens, m.tokens_per_s, m.requests_per_s) == (5, 2.5, 1.0)
    assert (m.ttft.mean, m.ttft.p50) == (0.75, 0.75)
    assert (m.tpot.mean, m.itl.count, m.itl.p99) == (0.5, 3, 0.5)
    assert (m.latency.mean, m.latency.p50) == (1.5, 1.5)
    assert m.goodput == m.good_tokens_per_s == m.good_fraction == 0.0 and m.slo_met is False
    assert (m.hit_rate, m.prompt_tokens) == (0.25, 30)
    assert (m.mean_batch, m.peak_batch, m.occupancy) == (5 / 3, 2, 0.5)
    assert m.padding_waste == 5 / (5 + 33)
    assert (m.num_preemptions, m.recomputed_tokens) == (1, 7)
    assert (m.kv_peak, m.kv_mean, m.kv_blocks) == (0.8, pytest.approx(1.4 / 3), 10)
    assert (m.peak_running, m.peak_waiting, m.blocked_steps) == (2, 3, {"blocks": 1})
    assert m.device_s is None and m.host_s is None


def test_goodput_counts_requests_and_their_tokens():
    collector = MetricsCollector(0.0, SLO(ttft=1.0, tpot=0.5))
    collector.on_finish(finished(0.0, 1.0, 1.5, 2.0))  # at the bounds: good
    collector.on_finish(finished(0.0, 1.1))  # late first token
    collector.on_finish(finished(1.0, 2.0))  # one token has no TPOT to miss
    m = collector.metrics()
    assert (m.goodput, m.good_tokens_per_s, m.good_fraction) == (1.0, 2.0, 2 / 3)
    assert (m.tpot.count, m.ttft.count) == (1, 3)


def test_what_was_not_measured_is_none():
    m = MetricsCollector(5.0, SLO()).metrics()
    for name in (
        "ttft tpot itl latency tokens_per_s requests_per_s goodput good_tokens_per_s good_fraction slo_met hit_rate "
        "device_s host_s busy mean_batch occupancy padding_waste kv_blocks kv_peak kv_mean"
    ).split():
        assert getattr(m, name) is None, name
    assert m.duration == 0.0


def test_the_hit_rate_is_absent_without_a_prefix_cache():
    collector = MetricsCollector(0.0, SLO(), prefix_caching=False)
    collector.on_step(event(0.0, 1.0, query_tokens=10))
    assert collector.metrics().hit_rate is None


def test_device_time_counts_only_when_every_step_knows_it():
    collector = MetricsCollector(0.0, SLO())
    collector.on_step(event(0.0, 1.0, device_seconds=0.75))
    assert (collector.metrics().device_s, collector.metrics().host_s) == (0.75, 0.25)
    collector.on_step(event(1.0, 2.0))
    assert collector.metrics().device_s is None


def test_aborted_requests_leave_no_latency():
    collector = MetricsCollector(0.0, SLO())
    collector.on_finish(finished(0.0, 1.0, status=RequestStatus.ABORTED))
    assert collector.metrics().ttft is None and collector.num_finished == 0


def test_a_request_that_was_late_when_it_was_aborted_did_not_meet_the_slo():
    collector = MetricsCollector(0.0, SLO(ttft=1.0))
    for arrival, times, end in ((0.0, (), 1.5), (0.0, (1.2,), 1.3), (1.0, (), 1.5), (0.0, (0.5,), 1.5)):
        output = finished(arrival, *times, status=RequestStatus.ABORTED)
        output._request.finish_time = end
        collector.on_finish(output)
    m = collector.metrics()
    assert (m.num_overdue, m.num_finished, m.slo_met, m.ttft) == (2, 0, False, None)


def test_a_copy_stands_still():
    collector = MetricsCollector(0.0, SLO())
    collector.on_step(event(0.0, 1.0, new=1, blocked_by="blocks"))
    collector.on_finish(finished(0.0, 1.0))
    copy = collector.copy()
    before, points = copy.metrics(), copy.samples()
    collector.on_step(event(1.0, 1.05, new=5, blocked_by="blocks"))
    collector.on_finish(finished(0.0, 1.0))
    assert copy.metrics() == before and copy.samples() == points


@pytest.mark.parametrize("n", [1, 50, 299, 300, 367, 368, 1000, 20_000])
def test_p99_bounds_hold_their_promise(n):
    low, high = p99_bounds(n)
    pmf = [math.exp(math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) + k * math.log(0.99)
                    + (n - k) * math.log(0.01)) for k in range(n + 1)]  # fmt: skip
    below = np.cumsum(pmf)  # P(at most k of n values lie below the p99)
    covered = (below[high] if high is not None else 1.0) - (below[low] if low is not None else 0.0)
    assert covered >= 0.95 - 1e-9
    assert (high is None) == (0.99**n > 0.05)


def test_p99_bounds_cover_the_true_value_in_simulation():
    rng = random.Random(1)
    low, high = p99_bounds(500)
    inside = 0
    for _ in range(1000):
        values = sorted(rng.expovariate(1.0) for _ in range(500))
        inside += values[low] <= -math.log(0.01) <= values[high]
    assert inside >= 930


def test_p99_bounds_of_a_million_are_finite_and_tight():
    low, high = p99_bounds(1_000_000)
    assert 989_500 < low < 990_000 < high < 990_500


def test_few_values_leave_the_interval_open():
    few, many = Distribution.of(range(1, 299)), Distribution.of(range(1, 301))
    assert few.p99_high is None and few.p99_low is not None and not few.enough_for_p99
    assert many.p99_high == 300.0 and many.enough_for_p99
    assert Distribution.of(range(1000), independent=False).p99_low is None
    assert Distribution.of([]) is None


def test_percentiles_agree_with_numpy_and_the_curve_is_short():
    values = np.random.default_rng(0).lognormal(size=5000)
    d = Distribution.of(values.tolist())
    assert (d.p50, d.p95) == tuple(np.quantile(values, [0.5, 0.95]))
    assert d.p99 == np.quantile(values, 0.99, method="inverted_cdf")
    assert d.p99 == pytest.approx(np.quantile(values, 0.99), rel=0.01)
    assert len(d.values) == len(d.fractions) <= 200
    assert d.values[-1] == values.max() and d.fractions[-1] == 1.0
    assert np.mean(values <= d.values[100]) == pytest.approx(d.fractions[100])
    json.dumps([d.values, d.p99])  # plain numbers


def test_a_p99_lies_within_its_interval_and_99_of_100_values_within_it():
    for n in (*range(1, 420), 999, 1000, 1001):
        d = Distribution.of([float(i * i) for i in range(n)])
        assert d.p50 <= d.p95 <= d.p99 and d.p99_low <= d.p99 <= (d.p99_high or math.inf), n
        assert sum(i * i <= d.p99 for i in range(n)) * 100 >= 99 * n, n
        assert sum(i * i < d.p99 for i in range(n)) * 100 < 99 * n, n
        assert d.p99 == np.quantile([i * i for i in range(n)], 0.99, method="inverted_cdf"), n


def test_one_slow_request_of_fifty_misses_a_bound_that_99_of_100_must_meet():
    collector = MetricsCollector(0.0, SLO(ttft=1.0, tpot=1.0))
    for i in range(50):
        collector.on_finish(finished(0.0, 0.1 if i else 1.5))
    m = collector.metrics()
    assert m.good_fraction == 0.98 and m.slo_met is False


def lost(*, good, failed=0, refused=0):
    collector = MetricsCollector(0.0, SLO())
    for _ in range(good):
        collector.on_finish(finished(0.0, 0.1))
    for _ in range(failed):
        collector.on_finish(finished(0.0, status=RequestStatus.FAILED))
    for _ in range(refused):
        collector.on_reject()
    return collector.metrics()


def test_a_request_without_an_answer_did_not_meet_the_slo():
    assert lost(good=50).slo_met is True and lost(good=0).slo_met is None
    assert (lost(good=49, failed=1).good_fraction, lost(good=49, failed=1).slo_met) == (0.98, False)
    assert (lost(good=49, refused=1).good_fraction, lost(good=49, refused=1).slo_met) == (0.98, False)
    assert lost(good=399, failed=1).slo_met is True
    assert (lost(good=0, refused=3).good_fraction, lost(good=0, refused=3).slo_met) == (0.0, False)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_an_slo_must_be_positive_and_finite(bad):
    with pytest.raises(ConfigError, match="SLO ttft is"):
        SLO(ttft=bad)


def test_the_series_keeps_tokens_however_often_it_merges():
    series, tokens = TimeSeries(100.0), 0
    for i in range(5000):
        start = 100.0 + 0.05 * i
        series.add(event(start, start + 0.05, new=i % 7))
        tokens += i % 7
    samples = series.samples()
    assert len(samples) <= MAX_SAMPLES
    edges = [0.0, *(sample.t for sample in samples)]
    total = sum(s.tokens_per_s * (b - a) for s, a, b in zip(samples, edges, edges[1:], strict=False))
    assert total == pytest.approx(tokens) and samples[-1].t == pytest.approx(250.0)


def test_the_series_spreads_a_long_step_and_leaves_idle_windows_absent():
    series = TimeSeries(0.0, width=1.0)
    series.add(event(0.5, 2.5, new=4, num_running=3, blocks_used=5, query_tokens=8, hit_tokens=2))
    series.add(event(4.0, 4.5, new=1, num_waiting=2))
    points = series.samples()
    assert [p.tokens_per_s for p in points] == [1.0, 2.0, 1.0, 0.0, 2.0]
    assert [p.running for p in points] == [3, 3, 3, None, 0]
    assert [p.waiting for p in points] == [0, 0, 0, None, 2]
    assert [p.kv_used for p in points] == [0.5, 0.5, 0.5, None, 0.0]
    assert [p.hit_rate for p in points] == [None, None, 0.25, None, None]
    assert [p.t for p in points] == [1.0, 2.0, 3.0, 4.0, 4.5]


def test_one_event_far_away_does_not_fill_the_memory():
    series = TimeSeries(0.0)
    series.add(event(1e6, 1e6 + 1.0, new=1))
    assert len(series.samples()) <= MAX_SAMPLES
