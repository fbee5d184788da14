"""The command line of the benchmarks: every suite runs on small sizes, and its JSON holds what it printed."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.bench import host
from engine.bench.cli import LIMITS, main, parse
from engine.bench.kvfit import MORE, MOST_CONCURRENT
from engine.bench.measure import serve
from engine.bench.peers import PeerSizes, run_peers
from engine.bench.reference import batches, generate_candidate, load_network
from engine.bench.roofline import Roofline
from engine.bench.soak import Soak, run_soak
from engine.bench.work import Work, fixed_work, shared_work, uniform_work
from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import ConfigError
from engine.loading.loader import load_model
from engine.request import Request
from engine.sampling_params import SamplingParams
from tests.unit.engine.test_overlap import SlotDevice

TINY = ["--model", "synthetic:tiny", "--device", "cpu", "--memory-limit", "0.1"]


def run(tmp_path: Path, *argv: str) -> dict[str, Any]:
    target = tmp_path / "figures.json"
    main([*TINY, *argv, "--json", str(target)])
    report: dict[str, Any] = json.loads(target.read_text())
    assert report["machine"]["versions"]["torch"] and report["seed"] == 0 and "--suite" in report["machine"]["command"]
    assert str(tmp_path) not in report["machine"]["command"], "the command is one for other machines too"
    return report["suites"]


def test_works_are_what_their_names_say() -> None:
    work = shared_work(100, 5, 16, 4, 3, seed=1)
    assert len({tuple(prompt[:16]) for prompt in work.prompts}) == 1 and len({tuple(p) for p in work.prompts}) == 5
    assert {len(prompt) for prompt in work.prompts} == {20} and work.output_tokens == 15
    offline = uniform_work(1000, 256, 100, 1024, 0)
    assert len(offline.prompts) == 256 and 100 <= min(map(len, offline.prompts)) < max(offline.num_outputs) <= 1024


def test_floor_is_bytes_over_bandwidth() -> None:
    roofline = Roofline(1000, 2.0, 100.0, "by hand")
    assert roofline.floor(3, 50.0) == pytest.approx((1000 + 3 * 50 * 2) / 100)


@pytest.mark.parametrize("model", ["synthetic:tiny", "bundled"])
@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_a_step_reads_every_matrix_once(model: str, weights: str) -> None:
    """Tied embeddings too, which oneDNN holds twice: for the product, which reads all, and for looking rows up."""
    config = EngineConfig(model=model, weights=weights, device="cpu", max_batch_size=1, memory_limit=1 << 28)
    with Engine(config) as engine:
        roofline, held = Roofline.of(engine, (1.0, "by hand")), engine.memory.weights
        table = held["lm_head"] or held["embeddings"]
    assert roofline.weight_bytes == held["attention"] + held["mlp"] + held["norms"] + table


def test_tokens_that_were_not_made_are_in_no_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """A session too short for the work would answer with fewer tokens, which the rate would count all the same."""
    config = EngineConfig(model="synthetic:tiny", device="cpu", memory_limit=100_000_000, session_len=16)
    with Engine(config) as engine:
        with pytest.raises(ConfigError, match=r"the longest request of this work takes 17 tokens.* holds 16 \("):
            serve(engine, fixed_work(512, 2, 8, 9, 0))
        work = fixed_work(512, 2, 8, 8, 0)
        assert [len(output.token_ids) for output in serve(engine, work)[1]] == [8, 8]
        monkeypatch.setattr(Work, "params", [SamplingParams(max_tokens=7, ignore_eos=True)] * 2)
        with pytest.raises(RuntimeError, match="made 7 tokens of 8: it ended as length"):
            serve(engine, work)


def test_work_that_no_session_holds_is_refused_in_a_sentence() -> None:
    small = ["--memory-limit", "0.0217", "--max-batch-size", "1", "--max-batched-tokens", "4096"]
    with pytest.raises(SystemExit, match=r"error: the longest request of this work takes 641 tokens, and a session of"):
        main([*TINY, *small, "--suite", "decode1", "--repeats", "1"])


def test_peers_in_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--divide", "32", "--repeats", "1", "--max-batched-tokens", "256"]
    [report] = run(tmp_path, "--suite", "peers", *small)["peers"]
    assert [row["batch"] for row in report["tpot"]] == [1, 2]
    assert all(row["floor_ms"] > 0 and row["tpot_ms"] > 0 and row["steps"] == 3 for row in report["tpot"])
    assert report["ttft"]["prompt"] == 16 and report["offline"]["output_tokens"] > 0
    assert report["shared"]["hit_tokens"] == 3 * 32, "the prefix is computed once for all four"
    assert report["config"]["prefix_caching"] and "roofline" in report
    printed = capsys.readouterr().out
    assert printed.index("floor per step") < printed.index("tpot_bs1") < printed.index("offline")


def test_the_workloads_of_the_peers() -> None:
    sizes = PeerSizes()
    assert (sizes.prompt, sizes.output, tuple(sizes.batches)) == (512, 129, (1, 8, 64))
    assert sizes.shared == (128, 1024, 64, 64) and sizes.offline == (256, 100, 1024)


def test_timed_runs_of_the_peers_begin_rested(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each run that counts waits once, warm-ups do not; on a machine that is not a GPU nothing does."""
    rests: list[float] = []
    monkeypatch.setattr("engine.bench.peers.time.sleep", rests.append)
    config = EngineConfig(model="synthetic:tiny", device="cpu", memory_limit=100_000_000)
    sizes = PeerSizes(prompt=8, output=3, batches=(1, 2), rest=0.125)
    with load_model(config) as model:
        run_peers(config, model, sizes, ("ttft", "tpot"), 2, 0)
    ttft, tpot = 3, 2 * 2 * 2  # three at least; for each batch and repeat one of one token and one of them all
    assert rests.count(0.125) == ttft + tpot and set(rests) == {0.0, 0.125}
    assert PeerSizes().rest > 0 == PeerSizes().divided(2).rest


def test_figures_of_an_engine_say_how_it_ran(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = "--suite", "single", "--repeats", "1", "--weights", "bf16", "int8", "--compare", "generate"
    *rows, other = run(tmp_path, *argv)["single"]
    assert [row["config"]["weights"] for row in rows] == ["bf16", "int8"]
    assert other["name"] == "transformers generate, bf16, batches of 16" and "config" not in other
    printed = capsys.readouterr().out
    for row in rows:
        assert row["description"] in printed
        assert f"at {row['roofline']['bandwidth'] / 1e9:,.0f} GB/s ({row['roofline']['measured_by']})" in printed
        assert row["roofline"]["weight_bytes"] > 0 and row["config"]["max_batch_size"] == 64


@pytest.mark.parametrize("ends", [KeyboardInterrupt, AssertionError, ConfigError])
def test_what_was_measured_is_kept_when_a_later_suite_breaks_off(
    ends: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ends("in the middle")

    monkeypatch.setattr("engine.bench.cli.run_soak", broken)
    with pytest.raises((ends, SystemExit)):
        run(tmp_path, "--suite", "single", "soak", "--repeats", "1")
    report = json.loads((tmp_path / "figures.json").read_text())
    assert list(report["suites"]) == ["single"] and report["machine"]["versions"]["torch"]


def test_each_format_of_the_peers_is_kept_as_it_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measured_once(config: EngineConfig, *_: object) -> dict[str, str]:
        if config.weights == "int8":
            raise KeyboardInterrupt
        return {"weights": str(config.weights)}

    monkeypatch.setattr("engine.bench.cli.run_peers", measured_once)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "--suite", "peers", "--weights", "bf16", "int8")
    assert json.loads((tmp_path / "figures.json").read_text())["suites"] == {"peers": [{"weights": "bf16"}]}


def test_kvfit_counts_requests_that_run(tmp_path: Path) -> None:
    rows = run(tmp_path, "--suite", "kvfit", "--kv", "bf16", "int8", "--concurrent", "3")["kvfit"]
    assert [row["kv"] for row in rows] == ["bf16", "int8"]
    assert rows[0]["most_running"] == 3 and rows[1]["most_running"] >= 5
    assert all(row["preempted"] == 0 for row in rows)
    assert rows[1]["pool_bytes"] == pytest.approx(rows[0]["pool_bytes"], rel=0.02)


def test_switch_reuses_what_does_not_change(tmp_path: Path) -> None:
    report = run(tmp_path, "--suite", "switch", "--weights", "bf16", "int8", "--kv", "bf16", "int8")["switch"]
    assert report["start"]["seconds"] > 0
    turned = [row["change"] for row in report["changes"]]
    assert turned[:3] == [{"weights": "int8"}, {"kv": "int8"}, {"cache_ratio": 0.5}]
    assert all(row["seconds"] >= row["build_s"] + row["first_token_s"] for row in report["changes"])


def test_host_cost_is_measured_on_the_real_loop() -> None:
    rows = host.run_host([3], seed=0)
    assert [row["sampling"] for row in rows] == ["greedy", "drawn"]
    assert [(row["model"], row["running"]) for row in rows] == [("synthetic:7b", 3)] * 2
    assert all(0 < row["prepare_ms"] < row["host_ms"] for row in rows)


def test_host_steps_are_of_as_many_requests_as_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """A simulated GPU's own memory would hold 1,000 of the contexts to the last step, not 1,024."""
    steps = host.MOST_RUNNING * host.PROMPT // host.BUDGET + host.STEPS + 2
    with Engine(host.configuration(host.MOST_RUNNING, 0)) as engine:
        assert engine.memory.tokens_that_fit >= host.MOST_RUNNING * (host.PROMPT + steps + engine.block_size)
    with Engine(host.configuration(32, 0)) as engine:
        plan, ratio = engine.memory, engine.config.cache_ratio
        few = plan.weights_total + plan.workspace + int(32 * 640 / plan.block_size * plan.block_bytes / ratio)
    monkeypatch.setattr(host, "POOL", few)
    with pytest.raises(RuntimeError, match=r"a step computed \d+ requests, not 32"):
        host.run_host([32], seed=0)


@pytest.mark.parametrize("overlap", [False, True])
def test_soak_on_a_device_that_remembers(overlap: bool) -> None:
    small = {"memory_limit": 24 << 20, "block_size": 16, "max_batch_size": 6}
    config = EngineConfig(model="synthetic:tiny", runner="simulated", overlap=overlap, **small)  # type: ignore[arg-type]
    with load_model(config) as model, Engine(config, model=model) as engine:
        engine.core.runner = SlotDevice(engine.core.runner)  # type: ignore[arg-type]
        report = Soak(engine, seed=0).run(0.7)
    assert report["requests"] > 5 and report["steps"] > 100 and set(report["ends"]) <= {"length", "stop", "abort"}


def test_soak_on_the_model(tmp_path: Path) -> None:
    report = run(tmp_path, "--suite", "soak", "--minutes", "0.015", "--max-batch-size", "4")["soak"]
    assert report["requests"] > 0 and report["integrity_checks"] >= 1 and report["output_tokens"] > 0


def test_an_interrupt_ends_a_soak_with_its_report() -> None:
    before = signal.getsignal(signal.SIGINT)
    config = EngineConfig(model="synthetic:tiny", runner="simulated", max_batch_size=4)
    with load_model(config) as model, Engine(config, model=model) as engine:
        engine.observers.append(lambda step: signal.raise_signal(signal.SIGINT))
        report = run_soak(engine, minutes=5.0, seed=0)
    assert report["requests"] > 0 and report["seconds"] < 60
    assert signal.getsignal(signal.SIGINT) is before


def test_soak_sees_a_lost_token() -> None:
    config = EngineConfig(model="synthetic:tiny", runner="simulated", max_batch_size=4)
    with load_model(config) as model, Engine(config, model=model) as engine:
        deliver, calls = engine.core._deliver, iter(range(1 << 20))

        def forgetful(request: Request) -> None:
            if next(calls) == 50:
                request.num_told = request.num_output
            deliver(request)

        engine.core._deliver = forgetful  # type: ignore[method-assign]
        with pytest.raises(AssertionError, match="tokens were lost on the way"):
            Soak(engine, seed=0).run(2.0)


@pytest.mark.parametrize("option", ["--repeats", "--minutes", "--divide", "--concurrent", "--counts"])
def test_numbers_that_make_no_sense(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse([option, "0"])
    assert f"{option} is 0; it must be" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--weights", "int3"], "weights is 'int3'; it must be one of bf16, int8,"),
        (["--kv", "int8", "int5"], "kv is 'int5'; it must be one of bf16, int8,"),
        (["--max-batch-size", "0"], "max_batch_size is 0; it must be a whole number from 1 to 4,096"),
        (["--suite", "host", "--counts", "16", "4097"], "--counts is 4097; it must be from 1 to 4,096"),
        (["--suite", "kvfit", "--concurrent", "513"], "--concurrent is 513; it must be from 1 to 512"),
        (["--memory-limit", "0"], "--memory-limit is 0 GB; it must be from 0.0011 to 1,000,000"),
        (["--memory-limit", "nan"], "--memory-limit is nan GB; it must be"),
        (["--minutes", "nan"], "--minutes is nan; it must be greater than 0 and finite"),
        (["--minutes", "inf"], "--minutes is inf; it must be greater than 0 and finite"),
        (["--suite", "peers", "--max-batched-tokens", "8"], "is 8; it must be a whole number from 16"),
        (["--runner", "simulated"], "--runner is 'simulated', which computes nothing that single could time"),
        (["--runner", "simulated", "--suite", "soak", "peers"], "nothing that peers could time; it must be 'torch'"),
        (["--suite", "peers", "--compare", "generate"], "--compare is 'generate'; it must come with a suite that"),
        (["--suite", "soak", "--kv", "bf16", "int8"], "--kv is 'bf16 int8'; it must be one format with the suite soak"),
        (["--suite", "kvfit", "--weights", "bf16", "int8"], "--weights is 'bf16 int8'; it must be one format with"),
        (["--json", "no/such/folder.json"], "cannot be written: there is no folder 'no/such'"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_a_model_is_loaded(
    argv: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(argv)
    assert words in capsys.readouterr().err


def test_sizes_are_checked_with_the_defaults_of_their_suite() -> None:
    """The host's are its own."""
    assert parse(["--suite", "peers", "--max-batch-size", "4096"]).max_batch_size == 4096
    assert parse(["--suite", "host", "--counts", "4096"]).counts == [4096]
    assert parse(["--runner", "simulated", "--suite", "soak", "kvfit", "host"]).runner == "simulated"
    with pytest.raises(SystemExit):
        parse(["--suite", "peers", "mixed", "--max-batch-size", "4097"])


def test_limits_of_the_command_line_are_within_those_of_a_configuration() -> None:
    for limit in LIMITS:
        parse(["--memory-limit", str(limit)])
    EngineConfig(max_batch_size=MORE * MOST_CONCURRENT, max_batched_tokens=1 << 14)
    with pytest.raises(ConfigError):
        EngineConfig(max_batch_size=MORE * MOST_CONCURRENT + 1, max_batched_tokens=1 << 14)


def test_a_model_that_is_not_there() -> None:
    with pytest.raises(SystemExit, match=r"error: model is 'nosuch'; it must be 'bundled',"):
        main(["--model", "nosuch"])


def test_padded_batches_that_hold_the_same_are_measured_once() -> None:
    assert batches(64) == batches(17) == [16, 64] and batches(16) == batches(1) == [16]


@pytest.mark.parametrize("model", ["synthetic:tiny", "bundled"])
def test_transformers_computes_the_same_dimensions(model: str) -> None:
    with load_model(EngineConfig(model=model)) as loaded:
        network = load_network(loaded, torch.device("cpu"))
        assert sum(p.numel() for p in network.parameters()) == loaded.spec.num_parameters
        seconds, outputs = generate_candidate(loaded, network, 2)(uniform_work(loaded.spec.vocab_size, 3, 2, 5, 0))
        assert seconds > 0 and outputs is None
