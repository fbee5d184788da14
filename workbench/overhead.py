"""What the live panel costs the engine: tokens/s with the panel drawing against the same run with nobody watching.

    python -m workbench.overhead [--pairs 7] [--json FILE]

Runs come in pairs, one with the panel and one without, in alternating order on the same engine and the same closed-loop
load, so that a machine that slows down or speeds up meets both alike; the result is the median of the pairs' ratios.
The widgets are the real ones. There is no browser: messages to it are packed as a kernel packs them, and dropped.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import comm
from comm.base_comm import BaseComm
from jupyter_client.session import json_packer
from tqdm import tqdm

from engine.files import writable
from workbench.panel.panel import Workbench
from workbench.runs.run import Run

BAR = 0.97


@dataclass(frozen=True, slots=True)
class Pair:
    """Output tokens/s of one run with the panel and one without."""

    panel_on: float
    panel_off: float

    @property
    def ratio(self) -> float:
        return self.panel_on / self.panel_off


@dataclass(frozen=True, kw_only=True)
class Overhead:
    """messages, message_bytes: what the panel sent to the browser over all pairs, in `seconds` of runs with the panel.

    panel_cpu: processor seconds that the panel's thread took in them; a bound on its cost that other work on the
    machine does not blur.
    """

    pairs: tuple[Pair, ...]
    messages: int
    message_bytes: int
    seconds: float
    panel_cpu: float
    engine: str

    @property
    def ratio(self) -> float:
        """Median of the pairs' ratios."""
        return statistics.median(pair.ratio for pair in self.pairs)

    def __str__(self) -> str:
        ratios = sorted(pair.ratio for pair in self.pairs)
        lines = [f"  on {pair.panel_on:9.1f}   off {pair.panel_off:9.1f}   {pair.ratio:.3f}" for pair in self.pairs]
        return "\n".join(
            [
                self.engine,
                "tokens/s with the panel, without, and their ratio:",
                *lines,
                f"median of {len(ratios)} ratios {self.ratio:.3f}, spread {ratios[0]:.3f} to {ratios[-1]:.3f}; "
                f"{self.messages / self.seconds:.1f} messages/s, {self.message_bytes / self.seconds / 1e3:.0f} kB/s, "
                f"{self.panel_cpu / self.seconds:.1%} of one core for the panel's thread",
            ]
        )


class _Wire:
    """Counts what would go to the browser."""

    def __init__(self) -> None:
        self.messages = self.bytes = 0
        self.is_cut = False

    def comm(self, *args: Any, **kwargs: Any) -> BaseComm:
        wire = self

        class PackingComm(BaseComm):
            def publish_msg(
                self, msg_type: str, data: Any = None, metadata: Any = None, buffers: Any = None, **keys: Any
            ) -> None:
                if wire.is_cut:  # widgets say goodbye when Python ends
                    return
                wire.messages += 1
                wire.bytes += len(json_packer({"data": data, "metadata": metadata}))
                wire.bytes += sum(memoryview(buffer).nbytes for buffer in buffers or ())

        return PackingComm(*args, **kwargs)


@contextmanager
def _wire() -> Iterator[_Wire]:
    """Put a counting wire in the place that the comm package keeps for a kernel's, and take it out again."""
    wire, plain = _Wire(), comm.create_comm
    comm.create_comm = wire.comm
    try:
        yield wire
    finally:
        comm.create_comm = plain
        wire.is_cut = True


def measure(pairs: int, *, progress: bool = True, **knobs: Any) -> Overhead:
    """Run `pairs` pairs of what `knobs` of the panel describe; the first runs, which warm up, are not counted."""
    counted: list[Pair] = []
    messages = message_bytes = 0
    seconds = panel_cpu = 0.0
    with _wire() as wire, Workbench(threaded=False, **knobs) as panel:
        assert panel.screen is not None, "the panel draws only when its widgets exist"
        watched = panel.run(blocking=True)
        alone = _alone(panel, watched)
        for i in tqdm(range(pairs), disable=not progress, desc="pairs", unit="pair"):
            before = wire.messages, wire.bytes, time.thread_time()
            if i % 2:
                alone, watched = _alone(panel, watched), panel.run(blocking=True)
            else:
                watched, alone = panel.run(blocking=True), _alone(panel, watched)
            panel_cpu += time.thread_time() - before[2]
            messages += wire.messages - before[0]
            message_bytes += wire.bytes - before[1]
            seconds += watched.metrics.duration if watched.metrics else 0.0
            counted.append(Pair(_tokens_per_s(watched), _tokens_per_s(alone)))
    return Overhead(
        pairs=tuple(counted),
        messages=messages,
        message_bytes=message_bytes,
        seconds=seconds,
        panel_cpu=panel_cpu,
        engine=watched.description,
    )


def _alone(panel: Workbench, like: Run) -> Run:
    """The same run in the same session with nobody reading it."""
    run = panel.session.start(like.config, like.workload, like.slo)
    run.wait()
    panel.session.stop()  # joins the thread
    return run


def _tokens_per_s(run: Run) -> float:
    speed = run.metrics.tokens_per_s if run.metrics else None
    if run.status != "done" or speed is None:
        raise RuntimeError(f"run {run.id} ended as {run.status}: {run.error}")
    return speed


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 when the ratio is below BAR."""
    parser = argparse.ArgumentParser(prog="python -m workbench.overhead", description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=7, help="pairs of runs")
    parser.add_argument("--requests", type=int, default=96, help="requests per run")
    parser.add_argument("--concurrency", type=int, default=16, help="requests in flight")
    parser.add_argument("--model", default="bundled", help="as the panel's knob")
    parser.add_argument(
        "--json", metavar="FILE", type=writable, help="also write the pairs, the versions and the machine to FILE"
    )
    options = parser.parse_args(argv)
    if options.pairs < 1:
        parser.error(f"--pairs is {options.pairs}; it must be at least 1")
    knobs = {"model": options.model, "concurrency": options.concurrency, "requests": options.requests}
    overhead = measure(options.pairs, **knobs)
    print(overhead)
    print(f"at least {BAR:.0%} of the tokens/s are kept: {'yes' if overhead.ratio >= BAR else 'no'}")
    if options.json:
        from engine.machine import write_report

        write_report(options.json, {"ratio": overhead.ratio, **asdict(overhead)}, argv)
    return int(overhead.ratio < BAR)


if __name__ == "__main__":
    sys.exit(main())
