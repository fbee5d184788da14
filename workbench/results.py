"""The README's tables, made from the measurements that are committed: `python -m workbench.results`.

No figure in the README is typed in by hand; a test compares the README with what this prints.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.bench import paired_ratio
from kernels import WEIGHT_FORMATS

ROOT = Path(__file__).parents[1]
ENGINE, WORKBENCH = ROOT / "engine" / "results", ROOT / "workbench" / "results"
PYTHON = ".venv/bin/python"


def main() -> None:
    print(tables())


def tables() -> str:
    """Every table as Markdown."""
    return f"{bars()}\n\n{gpu_table()}"


def bars() -> str:
    """What was asked for, what was measured, and the command that measures it again."""
    rows = [
        ("what", "bar", "measured", "command"),
        ("---", "---", "---", "---"),
        ("perplexity of int8 and int4 weights against bf16", "int8 within 1 %", _perplexity(), "`make demo`"),
        (
            "the same for int8 weights, w8a8 weights, int8 KV; w4a8 weights against int4",
            "0.5, 1.5, 0.2 %; 1.5 %",
            _quality(),
            f"`{PYTHON} -m workbench.quality`",
        ),
        (
            "int4, group 128, by quantizer; w4a8",
            "the best loses half of what rtn does",
            _quantizers(),
            f"`{PYTHON} -m workbench.quantizers`",
        ),
        (
            "int4 with a finer format where it pays, on average at most 5 bits",
            "1 %",
            _assigned(),
            f"`{PYTHON} -m workbench.sensitivity --methods rtn gptq`",
        ),
        (
            "64 requests of 16 to 128 tokens in and out, against transformers' `generate` in padded batches of 16, and "
            "of all 64; one request alone",
            "3x; 1x",
            _against_transformers(),
            f"`{PYTHON} -m engine.bench --suite mixed single --compare generate`",
        ),
        (
            "`synthetic:0.5b`, decode of one request, int8 and int4 against bf16",
            "1.5x, 2x",
            _decode_by_format(),
            f"`{PYTHON} -m engine.bench --model synthetic:0.5b --weights bf16 int8 int4`",
        ),
        ("tokens/s with the panel on against off", "97 %", _overhead(), f"`{PYTHON} -m workbench.overhead`"),
        (
            "H200: logits of `synthetic:7b` against its dequantized weights in float32, relative error",
            "3 %; with a KV cache of its own 4, 6, 35 % (bf16, int8, int4)",
            _logits(),
            f"`{PYTHON} -m tests.gpu.test_runner`",
        ),
        (
            "H200: `synthetic:7b` from constructor to first token; the longest change of weights, KV, cache ratio or "
            "batching",
            "15 s; 6 s",
            _switching(),
            f"`{PYTHON} -m engine.bench --model synthetic:7b --suite switch`",
        ),
        (
            "H200: requests of 1,024 tokens at once in the same bytes of KV, int8 and int4 against bf16",
            "1.9x",
            _fitting(),
            f"`{PYTHON} -m engine.bench --model synthetic:7b --suite kvfit --kv bf16 int8 int4 fp8 k8v4`",
        ),
        (
            "H200: offline tokens/s against bf16, int4 (w4a8) and int8 (w8a8) weights with KV k8v4",
            "1.2x, 1.2x",
            _offline_ratios(),
            f"`{PYTHON} -m engine.bench --model synthetic:7b --suite peers --parts offline`",
        ),
        (
            "H200: the host's time for a decode step of that run in bf16; steps that it prepared while another ran",
            "0.7 ms; all",
            _host_time(),
            f"`{PYTHON} -m engine.bench --model synthetic:7b --suite peers --parts offline`",
        ),
        (
            "H200: `synthetic:7b` quantized to int4 by rtn; by hqq",
            "10 s; 60 s",
            _quantizing(),
            f"`{PYTHON} -m engine.quantize --model synthetic:7b --method hqq`",
        ),
        (
            "H200: 20 minutes of mixed traffic with random aborts on `synthetic:7b`, weights int4, KV int8; memory at "
            "the end against half way, host and device",
            "nothing lost; none",
            _soaked(),
            f"`{PYTHON} -m engine.bench --model synthetic:7b --weights int4 --kv int8 --suite soak "
            "--max-batch-size 64`",
        ),
    ]
    machine = _read(ENGINE / "cpu-bundled.json")["machine"]
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    where = (
        f"Rows that do not begin with H200: {machine['processor']}, {machine['cores']} cores and no GPU, "
        f"torch {machine['versions']['torch']}."
    )
    return f"{table}\n\n{where}"


def gpu_table() -> str:
    """The workloads that other engines were measured with, on a GPU; what was not measured is left empty."""
    machine = _peer_reports(PEERS)[-1]["machine"]
    versions = machine["versions"]
    caption = (
        f"{machine['gpu']}, torch {versions['torch']}, Triton {versions['triton']}: "
        f"`{PYTHON} -m engine.bench --model synthetic:7b --suite peers --weights ... --kv ...`. Batch N: N prompts of "
        "512 tokens, 129 out. Offline: 256 requests, 100 to 1,024 tokens in and out. Shared: 128 prompts of a common "
        "prefix of 1,024 tokens and 64 of their own. The other engines ran on another H200 "
        "([how](engine/results/h200-others.json))."
    )
    head = ["`synthetic:7b`", *(f"ms/token, batch {n}" for n in BATCHES), "TTFT, 512 tokens (ms)"]
    head += ["offline tokens/s", "shared prefix (s)"]
    lines = [caption, "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += _our_rows(PEERS)
    lines += _our_rows(SECOND_GPU, " (a second H200)")
    for row in _read(ENGINE / OTHERS)["rows"] if (ENGINE / OTHERS).exists() else ():
        tpot = {int(batch): ms for batch, ms in row["tpot_ms"].items()}
        figures = [row.get(name) for name in ("ttft_ms", "tokens_per_s", "shared_s")]
        lines.append(_gpu_row(f"{row['engine']}: {row['formats']}", [*map(tpot.get, BATCHES), *figures]))
    return "\n".join(lines)


def _our_rows(files: Sequence[str], where: str = "") -> list[str]:
    rows = []
    for name, measured in _peer_rows(files).items():
        tpot = {row["batch"]: row["tpot_ms"] for row in measured.get("tpot", [])}
        ttft, offline, shared = (measured.get(part, {}) for part in ("ttft", "offline", "shared"))
        figures = [ttft.get("ttft_ms"), offline.get("tokens_per_s"), shared.get("seconds")]
        rows.append(_gpu_row(f"InferLab: {name}{where}", [*map(tpot.get, BATCHES), *figures]))
    return rows


def _gpu_row(name: str, figures: Sequence[float | None]) -> str:
    """figures: TPOT at each of BATCHES, TTFT, offline tokens/s and the seconds of the shared prefix."""
    kinds = zip(figures, (*(".2f" for _ in BATCHES), ".1f", ",.0f", ".2f"), strict=True)
    return f"| {name} | " + " | ".join("" if value is None else format(value, kind) for value, kind in kinds) + " |"


BATCHES = (1, 8, 64)
OTHERS = "h200-others.json"
"""Other engines, measured once on a machine of their own: nothing here installs them."""
PEERS = (
    "h200-peers-bf16.json", "h200-peers-offline.json", "h200-peers-int8-fp8.json", "h200-peers-int4.json",
    "h200-peers-w8a8.json", "h200-peers-w4a8.json",
)  # fmt: skip
"""Of two runs of one configuration the later one counts, where it measured the same. What has no file yet was not
measured."""


SECOND_GPU = ("h200-peers-bf16-second-gpu.json", "h200-peers-offline-second-gpu.json")
"""GPUs of one kind differ by 2 to 5 %: the same commands where memory was read at 4.5 instead of 4.7 TB/s."""


def _peer_reports(files: Sequence[str]) -> list[dict[str, Any]]:
    return [_read(ENGINE / name) for name in files if (ENGINE / name).exists()]


def _peer_rows(files: Sequence[str] = PEERS) -> dict[str, dict[str, Any]]:
    """By configuration, in order of weight bytes."""
    found: dict[str, dict[str, Any]] = {}
    for report in _peer_reports(files):
        for run in report["suites"]["peers"]:
            name = f"weights {run['config']['weights']}, KV {run['config']['kv']}"
            found.setdefault(name, {}).update({part: run[part] for part in PARTS if part in run})
    order = ("bf16", "int8", "w8a8", "fp8", "int4", "w4a8")
    return dict(sorted(found.items(), key=lambda item: order.index(item[0].split()[1].rstrip(","))))


PARTS = ("tpot", "ttft", "offline", "shared")


def _fitting() -> str:
    rows = {row["kv"]: row["ratio"] for row in _read(ENGINE / "h200-kvfit.json")["suites"]["kvfit"]}
    return f"{rows['int8']:.2f}x, {rows['int4']:.2f}x"


def _offline_ratios() -> str:
    rows = _peer_rows()
    bf16, *others = (
        rows[name]["offline"]["tokens_per_s"]
        for name in ("weights bf16, KV bf16", "weights w4a8, KV k8v4", "weights w8a8, KV k8v4")
    )
    return ", ".join(f"{other / bf16:.2f}x" for other in others)


def _host_time() -> str:
    decode = _peer_rows()["weights bf16, KV bf16"]["offline"]["decode"]
    return f"{decode['host_ms']:.2f} ms; {decode['overlapped']:,} of {decode['steps']:,}"


def _perplexity() -> str:
    runs = _read(WORKBENCH / "cpu-demo.json")["runs"]
    by_format = {run["weights"]: run["perplexity"] for run in runs}
    return ", ".join(
        f"{name} {100 * (value / by_format['bf16'] - 1):+.2f} %" for name, value in by_format.items() if name != "bf16"
    )


def _against_transformers() -> str:
    suites = _read(ENGINE / "cpu-bundled.json")["suites"]

    def ratios(suite: str) -> str:
        ours, *theirs = (row["seconds"] for row in suites[suite])
        return ", ".join(f"{paired_ratio(seconds, ours):.2f}x" for seconds in theirs)

    return f"{ratios('mixed')}; {ratios('single')}"


def _decode_by_format() -> str:
    bf16, *others = _read(ENGINE / "cpu-synthetic-0.5b.json")["suites"]["single"]
    return ", ".join(f"{paired_ratio(bf16['tpot'], other['tpot']):.2f}x" for other in others)


def _overhead() -> str:
    return f"{100 * _read(WORKBENCH / 'cpu-overhead.json')['ratio']:.1f} %"


def _logits() -> str:
    """Of the formats whose activations stay in 16 bits; the others have bounds of their own."""
    rows = _read(ENGINE / "h200-logits.json")["errors"]
    rows = [row for row in rows if WEIGHT_FORMATS[row["weights"]].activations is None]
    own = [max(row["own"] for row in rows if row["kv"] == kv) for kv in ("bf16", "int8", "int4")]
    worst = max(row["shared"] for row in rows)
    return f"{100 * worst:.1f} %; " + ", ".join(f"{100 * error:.1f}" for error in own) + " %"


def _quality() -> str:
    bars_ = _read(WORKBENCH / "cpu-quality.json")["bars"]
    against_bf16, against_int4 = ("int8 weights", "w8a8 weights", "KV int8"), ("w4a8 weights, group 128",)
    return "; ".join(
        ", ".join(f"{bars_[name]['percent']:+.2f} %" for name in names) for names in (against_bf16, against_int4)
    )


def _quantizers() -> str:
    rows = _read(WORKBENCH / "cpu-quantizers.json")["rows"]
    return "; ".join(
        ", ".join(f"{row['method']} {row['percent']:+.2f} %" for row in rows if row["weights"] == name)
        for name in ("int4", "w4a8")
    )


def _assigned() -> str:
    bar = _read(WORKBENCH / "cpu-sensitivity.json")["bar"]
    return f"{bar['percent']:+.2f} % at {bar['bits']:.2f} bits ({bar['plan'].split(', ')[-1]})"


def _soaked() -> str:
    report = _read(ENGINE / "h200-soak.json")["suites"]["soak"]
    middle = next(held for held in report["memory"] if held["elapsed_s"] >= report["seconds"] / 2)
    more = [(report["memory"][-1][name] - middle[name]) / 1e6 for name in ("host_bytes", "device_bytes")]
    ended = f"{report['requests']:,} requests ended as they must, {report['ends']['abort']:,} by an abort"
    return f"{ended}; {more[0]:+,.0f} MB, {more[1]:+,.0f} MB"


def _switching() -> str:
    report = _read(ENGINE / "h200-switch.json")["suites"]["switch"]
    return f"{report['start']['seconds']:.1f} s; {max(change['seconds'] for change in report['changes']):.1f} s"


def _quantizing() -> str:
    return "; ".join(f"{_read(ENGINE / f'h200-quantize-{name}.json')['seconds']:.1f} s" for name in ("rtn", "hqq"))


def _read(path: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(path.read_text())
    return report


if __name__ == "__main__":
    main()
