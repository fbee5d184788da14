"""Measure the engine: `python -m engine.bench --help` says what there is.

Every run prints a roofline card first (the bytes a step must read, and how long that takes), then figures as medians
with their range. `--json FILE` writes everything, with machine, versions, seed and command.
"""

from engine.bench.measure import paired_ratio as paired_ratio
