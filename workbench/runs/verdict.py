"""Whether a run met its target, and whether it had requests enough to be sure."""

from __future__ import annotations

from workbench.runs.metrics import SLO, Metrics

MET, LIKELY, MISSED, UNKNOWN = "met", "met so far", "missed", "not measured"


def verdict(metrics: Metrics | None, slo: SLO) -> str:
    """MET only where every request was answered and the whole interval of each p99 lies inside the bound; LIKELY where
    only the estimate does."""
    if metrics is None or metrics.slo_met is None:
        return UNKNOWN
    if not metrics.slo_met:
        return MISSED
    if metrics.num_lost:  # the intervals are of the answered ones alone
        return LIKELY
    bounds = [(metrics.ttft, slo.ttft), (metrics.tpot, slo.tpot)]
    certain = all(d is None or (d.p99_high is not None and d.p99_high <= bound) for d, bound in bounds)
    return MET if certain else LIKELY
