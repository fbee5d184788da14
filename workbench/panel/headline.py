"""The first line a person reads: is the target met, how fast, how many tokens fit. As tiles, and as one sentence."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from workbench import text
from workbench.runs.distribution import ENOUGH_FOR_P99, Distribution
from workbench.runs.metrics import SLO, Metrics
from workbench.runs.verdict import LIKELY, MET, MISSED, UNKNOWN, verdict

if TYPE_CHECKING:
    from engine.running.memory import MemoryPlan
    from workbench.runs.run_snapshot import RunSnapshot

_WORDS = {MET: "✓ met", LIKELY: "✓ met", MISSED: "✗ missed", UNKNOWN: text.ABSENT}


@dataclass(frozen=True, slots=True)
class Tile:
    """One figure: what, how much, and what it is worth. kind colours the edge; the words say the same."""

    name: str
    value: str
    detail: str = ""
    before: str = ""
    kind: str = ""


def tiles(run: RunSnapshot | None, plan: MemoryPlan | None, baseline: RunSnapshot | None) -> list[Tile]:
    """The tiles of a run; before the first one only what the plan knows."""
    m = run.metrics if run else None
    old = baseline.metrics if baseline else None
    old_plan = baseline.memory if baseline else None
    slo = run.slo if run else SLO()
    state = verdict(m, slo)

    def before(value: str, there: bool) -> str:
        return f"baseline {value}" if there else ""

    memory, memory_detail = _memory(plan)
    return [
        Tile(
            "SLO",
            _WORDS[state],
            _slo_detail(m, state),
            before(verdict(old, baseline.slo), True) if baseline else "",
            {MET: "met", LIKELY: "met", MISSED: "missed"}.get(state, ""),
        ),
        Tile(
            "TTFT p99",
            _p99(m.ttft if m else None),
            _interval(m.ttft if m else None),
            before(_p99(old.ttft if old else None), old is not None),
        ),
        Tile(
            "TPOT p99",
            _p99(m.tpot if m else None),
            _interval(m.tpot if m else None),
            before(_p99(old.tpot if old else None), old is not None),
        ),
        Tile(
            "Tokens/s",
            text.number(m.tokens_per_s if m else None),
            f"{text.number(m.requests_per_s)} requests/s" if m else "",
            before(text.number(old.tokens_per_s if old else None), old is not None),
        ),
        Tile(
            "Hit rate",
            text.percent(m.hit_rate if m else None),
            "of prompt tokens" if m and m.hit_rate is not None else "",
            before(text.percent(old.hit_rate if old else None), old is not None),
        ),
        Tile(
            "Tokens that fit",
            f"{plan.tokens_that_fit:,}" if plan else text.ABSENT,
            f"in {text.size(plan.kv)} of KV" if plan else "",
            before(f"{old_plan.tokens_that_fit:,}" if old_plan else text.ABSENT, old_plan is not None),
        ),
        Tile("Memory", memory, memory_detail, before(_memory(old_plan)[0], old_plan is not None)),
    ]


def _together(words: str) -> str:
    """For HTML: a figure and its unit stay on one line of a narrow tile."""
    return escape(re.sub(r"(?<=\d) (?=(?:[µm]?s|%|[kMGT]B)(?:\W|$))|(?<=≥) ", "\u00a0", words))


def tiles_html(parts: Sequence[Tile]) -> str:
    """One block each: name, figure, what it is worth, what it was before."""
    cells = "".join(
        f'<div class="{part.kind}"><span>{escape(part.name)}</span> '
        f'<strong title="{escape(part.value)}">{escape(part.value)}</strong> '
        f'<small title="{escape(part.detail)}">{_together(part.detail) or "&nbsp;"}</small> '
        f"<small>{_together(part.before) or '&nbsp;'}</small></div>"
        for part in parts
    )
    return f'<div class="inferlab-tiles">{cells}</div>'


def sentence(parts: Sequence[Tile]) -> str:
    """The tiles that hold something, in one line."""
    known = [part for part in parts if part.value != text.ABSENT]
    return "; ".join(f"{part.name} {part.value}" + (f" ({part.detail})" if part.detail else "") for part in known)


def progress_html(share: float, words: str) -> str:
    """A bar with words under it; the words carry the message."""
    percent = int(100 * min(max(share, 0.0), 1.0) + 1e-9)  # full at the end and not before
    return (
        '<div class="inferlab-bar" role="progressbar" aria-label="progress of the run" aria-valuemin="0" '
        f'aria-valuemax="100" aria-valuenow="{percent}" aria-valuetext="{escape(words)}">'
        f'<div style="width:{percent}%"></div></div>'
        f'<small title="{escape(words)}">{escape(words) or "&nbsp;"}</small>'
    )


def download_html(table: str) -> str:
    """A link that saves `table` (CSV) through the browser alone: it is in the link, and no server has it. "" for none:
    the words then stand there without effect."""
    words = "Save runs (CSV)"
    if not table:
        return f'<a role="link" aria-disabled="true">{words}</a>'
    data = base64.b64encode(table.encode()).decode()
    return f'<a download="inferlab-runs.csv" href="data:text/csv;charset=utf-8;base64,{data}">{words}</a>'


def sample_html(sample: tuple[str, str] | None, note: str) -> str:
    """Prompt and answer as text, whatever they hold: escaped, and cut where nobody reads on."""
    if sample is None:
        body = "The last prompt and its answer show here after a run."
    else:
        prompt, answer = sample
        body = f"<bdi>{escape(_end(prompt))}</bdi><b>{escape(answer[:1200])}</b>"
    return f"<h4>Sample text <small>{escape(note)}</small></h4><pre tabindex='0' aria-label='sample text'>{body}</pre>"


def _end(prompt: str, most: int = 160, lines: int = 3) -> str:
    """The last lines of a prompt: the answer below them must be in sight."""
    end = "\n".join(prompt[-most:].split("\n")[-lines:])
    return prompt if end == prompt else "…" + end


def _p99(d: Distribution | None) -> str:
    return text.seconds(d.p99 if d else None)


def _interval(d: Distribution | None) -> str:
    """What the p99 is worth, short enough for a tile."""
    if d is None:
        return ""
    if d.p99_high is None:
        return f"95 %: ≥ {text.seconds(d.p99_low)}"
    low, high = text.seconds(d.p99_low), text.seconds(d.p99_high)
    unit = high.rpartition(" ")[2]
    return f"95 %: {low.removesuffix(' ' + unit)}–{high}"


def _slo_detail(m: Metrics | None, state: str) -> str:
    if m is None or m.good_fraction is None:
        return ""
    if state == LIKELY and m.ttft is not None and m.ttft.count < ENOUGH_FOR_P99:
        return f"so far; {m.ttft.count:,} of {ENOUGH_FOR_P99} to be sure"
    share = text.percent(m.good_fraction)
    return f"{share} met it" if state == MISSED else f"by {share} of requests"


def _memory(plan: MemoryPlan | None) -> tuple[str, str]:
    if plan is None:
        return text.ABSENT, ""
    used = plan.limit - plan.free
    unit, name = (1e9, "GB") if plan.limit >= 1e9 else (1e6, "MB")
    return f"{used / unit:.3g} {name}", f"of {plan.limit / unit:.3g} {name}"
