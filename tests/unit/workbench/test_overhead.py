"""The panel's cost: the arithmetic, and that real widgets send real messages while a run goes on."""

import comm
import pytest

from workbench import overhead
from workbench.overhead import Overhead, Pair


def test_the_median_of_the_pairs_counts():
    pairs = (Pair(90.0, 100.0), Pair(99.0, 100.0), Pair(150.0, 100.0))
    result = Overhead(pairs=pairs, messages=30, message_bytes=6000, seconds=3.0, panel_cpu=0.06, engine="an engine")
    assert result.ratio == 0.99
    assert "median of 3 ratios 0.990, spread 0.900 to 1.500; 10.0 messages/s, 2 kB/s, 2.0% of one core" in str(result)


def test_a_pair_measures_the_same_load_twice_and_leaves_no_wire_behind():
    plain = comm.create_comm
    result = overhead.measure(1, progress=False, model="synthetic:0.5b", device="l4", requests=20, concurrency=4)
    assert comm.create_comm is plain
    (pair,) = result.pairs
    assert pair.panel_on == pair.panel_off  # a virtual clock does not feel the panel
    assert result.messages > 0 and result.message_bytes > 1000 and result.panel_cpu > 0


def test_bad_options(capsys):
    with pytest.raises(SystemExit):
        overhead.main(["--pairs", "0"])
    assert "--pairs is 0; it must be at least 1" in capsys.readouterr().err
