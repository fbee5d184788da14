"""Sensitivity on a small checkpoint with one matrix made fragile and one made immune; plans from it run."""

import itertools
import json

import numpy as np
import pytest
import torch

from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import ConfigError
from engine.loading.loader import load_model
from engine.model.weight_plan import MODULES, WeightPlan
from tests.unit.engine.checkpoints import random_model, save, tiny_config
from workbench.sensitivity import frontier as sensitivity_frontier
from workbench.sensitivity import measure
from workbench.sensitivity.assignment import assign, frontier
from workbench.sensitivity.frontier import Frontier, measure_frontier

TEXT = "def f(x):\n    return [y + 1 for y in x if y]\n\n" * 200
FRAGILE = "layers.1.down"
IMMUNE = "layers.0.o", "layers.0.qkv"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Scale moved from one matrix to the next leaves the function as it was, but spoils the groups of the second;
    where an output projection is zero, neither it nor what it reads matters."""
    model = random_model(tiny_config("llama"), torch.bfloat16)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[:, ::64] *= 64
        model.model.layers[1].mlp.up_proj.weight[::64] /= 64
        model.model.layers[0].self_attn.o_proj.weight.zero_()
    return save(model, tmp_path_factory.mktemp("fragile") / "model")


@pytest.fixture(scope="module")
def config(folder):
    return EngineConfig(model=str(folder), group_size=64, device="cpu", memory_limit=60 * 10**6)


@pytest.fixture(scope="module")
def model(config):
    with load_model(config) as model:
        yield model


@pytest.fixture(scope="module")
def found(config, model):
    return measure(config, text=TEXT, model=model, max_tokens=128, window=64, progress=False)


def test_every_matrix_is_measured_alone_in_every_format(found):
    expected = {(f"layers.{i}.{name}", form) for i in (0, 1) for name in MODULES for form in ("int4", "int8")}
    assert {(row.matrix, row.format) for row in found.rows} == expected | {("lm_head", "int8")}
    losses = {(row.matrix, row.format): row.loss.value for row in found.rows}
    assert all(losses[name, form] == 0.0 for name in IMMUNE for form in ("int4", "int8"))
    assert max(losses, key=losses.get) == (FRAGILE, "int4")
    assert all(losses[name, "int8"] < losses[name, "int4"] for name, _ in expected if name not in IMMUNE)
    row = next(row for row in found.rows if row.matrix == FRAGILE and row.format == "int4")
    assert (row.layer, row.module, row.weights, row.nbytes) == (1, "down", 128 * 256, 128 * (128 + 4 * 4))
    assert found.config.impl == "torch" and found.tokens == 2 * 63


def test_bits_go_where_they_count(found):
    planned = found.assign(bits_per_weight=6.0)
    assert planned.plan[FRAGILE] != "int4" and planned.plan.head == "int8"
    assert all(planned.plan[name] == "int4" for name in IMMUNE)
    assert planned.bits_per_weight <= 6.0
    uniform = found.uniform("int4")
    assert uniform.plan == WeightPlan.of({"default": "int4", "lm_head": "int8"}) and uniform.bits_per_weight == 4.5
    assert planned.predicted_loss < uniform.predicted_loss
    assert uniform.predicted_loss == pytest.approx(sum(row.loss.value for row in found.rows if row.format == "int4"))
    total = sum(found.spec.weight_bytes(planned.plan, 64).values())
    assert planned.total_bytes == total
    assert found.assign(budget_bytes=total).predicted_loss <= planned.predicted_loss
    bounded = found.assign(max_loss=planned.predicted_loss)
    assert bounded.predicted_loss <= planned.predicted_loss and bounded.bits_per_weight < 16
    free = WeightPlan.of(dict.fromkeys(IMMUNE, "int4") | {"lm_head": "bf16"})
    assert found.assign(max_loss=0.0, head="bf16").plan == free


def test_no_combination_of_the_measured_losses_is_better(found):
    by_matrix = {}
    for choice in found.choices():
        by_matrix.setdefault(choice.matrix, []).append((choice.nbytes, choice.loss))
    everything = np.array([np.sum(picked, 0) for picked in itertools.product(*by_matrix.values())])
    assert len(everything) == 3**8
    for passed in frontier(found.choices()):
        best = everything[everything[:, 0] <= passed.nbytes, 1].min()
        assert assign(found.choices(), budget_bytes=passed.nbytes).loss == pytest.approx(best, abs=1e-9)


def test_bounds_that_cannot_be_met(found):
    least = found.uniform("int4").total_bytes
    with pytest.raises(ConfigError, match=f"budget_bytes is 1,000; the smallest formats take {least:,} bytes"):
        found.assign(budget_bytes=1000)
    with pytest.raises(ConfigError, match=r"bits_per_weight is 3; the smallest formats take 4.50"):
        found.assign(bits_per_weight=3.0)
    with pytest.raises(ConfigError, match="give one of"):
        found.assign(bits_per_weight=5.0, max_loss=1.0)


def test_the_engine_runs_the_plan_and_loses_less(found, config, model):
    judged = measure_frontier(found, TEXT[3:], model=model, bits=(6.0,), max_tokens=128, window=64, progress=False)
    names = [(point.kind, point.name) for point in judged.points]
    assert names == [("uniform", "int8"), ("uniform", "int4"), ("assigned", "<= 6 bits")]
    loss = {point.name: point.divergence.kl_mean.value for point in judged.points}
    assert loss["int8"] < loss["<= 6 bits"] < loss["int4"] / 2
    assert json.loads(json.dumps(judged.records()))[2]["weights"]["default"] in ("int4", "int8")
    assert judged.bar()["plan"] == "int4, rtn"  # the only one within 5 bits
    assert len(str(judged).splitlines()) == 5 and len(judged.frame()) == 3
    drawn = judged.figure()
    assert [trace.name for trace in drawn.data] == [
        "predicted: sum of single losses",
        "assigned, rtn",
        "one format, rtn",
    ]
    with Engine(EngineConfig(model=config.model, group_size=64, weights=judged.points[2].planned.plan)) as engine:
        assert str(judged.points[2].planned.plan) in engine.description


def test_other_methods_of_int4_run_the_same_plan(found, model):
    judged = measure_frontier(
        found, TEXT[3:], model=model, bits=(6.0,), methods=("hqq",), max_tokens=128, window=64, progress=False
    )
    assert [(point.name, point.method) for point in judged.points] == [("int4", "hqq"), ("<= 6 bits", "hqq")]
    assert all(point.planned.plan.head == "bf16" for point in judged.points)
    assert judged.points[1].planned.bits_per_weight == found.assign(bits_per_weight=6.0).bits_per_weight


def test_it_is_shown_as_heat_map_and_table(found):
    (cells,) = found.figure("int4").data
    table = found.frame()
    loss = table[(table.matrix == FRAGILE) & (table.format == "int4")].loss.item()
    assert cells.z[1][MODULES.index("down")] == pytest.approx(np.log10(loss))
    assert cells.text[1][MODULES.index("down")] == f"{loss:.2g}"
    marks = zip(cells.colorbar.tickvals, cells.colorbar.ticktext, strict=True)
    assert all(np.log10(float(nats)) == pytest.approx(at) for at, nats in marks) and len(cells.colorbar.ticktext) > 1
    assert list(cells.x) == list(MODULES) and table.matrix[0] == FRAGILE


def test_an_interrupt_keeps_what_was_measured(config, model):
    asked = iter([False] * 6 + [True] * 100)
    part = measure(
        config, text=TEXT, model=model, max_tokens=128, window=64, progress=False, stopped=lambda: next(asked)
    )
    assert part.interrupted and 0 < len(part.rows) < 17
    measured = {row.matrix for row in part.rows}
    plan = part.assign(max_loss=1e9).plan
    assert all((plan[f"layers.1.{name}"] == "bf16") == (f"layers.1.{name}" not in measured) for name in MODULES)


def test_refusals(config, model):
    with pytest.raises(ConfigError, match="format is 'bf16'; it must be one of int8, int4"):
        measure(config, ["bf16"], TEXT, model=model)
    with pytest.raises(ConfigError, match="'synthetic:tiny' has no perplexity here"):
        measure(EngineConfig(model="synthetic:tiny", memory_limit=30 * 10**6), progress=False)


def test_the_command_prints_and_writes(folder, tmp_path, capsys):
    text = tmp_path / "text.py"
    text.write_text(TEXT)
    path = tmp_path / "out.json"
    arguments = ["--model", str(folder), "--text", str(text), "--tokens", "64", "--judge-tokens", "64"]
    with pytest.raises(SystemExit):
        sensitivity_frontier.main([*arguments, "--tokens", "600", "--group-size", "64", "--text", str(tmp_path / "no")])
    assert "no" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        sensitivity_frontier.main([*arguments, "--bits", "6", "1"])
    assert "--bits is 1; int4, int8 take 4.25 or more" in capsys.readouterr().err
    code = sensitivity_frontier.main(
        [*arguments, "--tokens", "512", "--judge-tokens", "512", "--group-size", "64", "--bits", "6", "--quiet",
         "--json", str(path)]
    )  # fmt: skip
    record = json.loads(path.read_text())
    assert code == int(not record["bar"]["met"])
    assert len(record["matrices"]) == 17 and [plan["name"] for plan in record["plans"]] == ["int8", "int4", "<= 6 bits"]
    assert record["machine"]["versions"]["torch"] and FRAGILE in capsys.readouterr().out


def test_a_bar_is_judged_by_the_best_plan_within_it(found):
    assert Frontier(found, (), 0).bar() is None
