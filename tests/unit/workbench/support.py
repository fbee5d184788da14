"""What tests of sessions and of panels begin with."""

from engine.config import EngineConfig
from workbench import Workload

SIMULATED = {"model": "synthetic:0.5b", "device": "l4", "requests": 24, "rate": 20.0}
CONFIG = EngineConfig(model="synthetic:0.5b", runner="simulated", gpu="l4", max_batch_size=8)
SHORT = Workload.preset("dialogue service", num_requests=20, rate=20.0)
ENDLESS = Workload(num_requests=5000, concurrency=8, input_len=(8, 8), output_len=(64, 64))
TINY = EngineConfig(model="synthetic:tiny", device="cpu", memory_limit=60 * 10**6)


def started(session, workload=ENDLESS):
    """A run in its thread, once it has finished a request."""
    run = session.start(CONFIG, workload)
    while not run.snapshot().finished and not run.wait(0.01):
        pass
    return run


def finish(panel):
    assert panel._run.wait(30)
    more = panel.tick()
    assert more is False, panel.screen.alert.text


def tiny_load(prompt, **changes):
    return Workload(
        **{"num_requests": 4, "concurrency": 2, "input_len": (prompt, prompt), "output_len": (4, 4), **changes}
    )
