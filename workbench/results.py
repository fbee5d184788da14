"""The README's tables, made from the measurements that are committed: `python -m workbench.results`.

No figure in the README is typed in by hand; a test compares the README with what this prints.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

from engine.bench import paired_ratio

ROOT = Path(__file__).parents[1]
ENGINE, WORKBENCH = ROOT / "engine" / "results", ROOT / "workbench" / "results"
PYTHON = ".venv/bin/python"


def main() -> None:
    print(tables())


def tables() -> str:
    """Both tables as Markdown."""
    return f"{bars()}\n\n{decode_table()}"


def bars() -> str:
    """What was asked for, what was measured, and the command that measures it again."""
    rows = [
        ("what", "bar", "measured", "command"),
        ("---", "---", "---", "---"),
        ("perplexity of int8 and int4 weights against bf16", "int8 within 1 %", _perplexity(), "`make demo`"),
        (
            "64 requests of 16 to 128 tokens in and out, against transformers' `generate` in padded batches of 16; "
            "one request alone",
            "2x; 1x",
            _against_transformers(),
            f"`{PYTHON} -m engine.bench --suite mixed single --compare transformers`",
        ),
        (
            "`synthetic:0.5b`, decode of one request, int8 and int4 against bf16",
            "1.5x, 2x",
            _decode_by_format(),
            f"`{PYTHON} -m engine.bench --model synthetic:0.5b --weights bf16 int8 int4`",
        ),
        ("tokens/s with the panel on against off", "97 %", _overhead(), f"`{PYTHON} -m workbench.overhead`"),
        (
            "H200: logits of `synthetic:7b` in every weight and KV format against its dequantized weights in float32, "
            "relative error",
            "3 %; with a KV cache of its own 4, 6, 35 % (bf16, int8, int4)",
            _logits(),
            f"`{PYTHON} -m tests.gpu.test_runner`",
        ),
    ]
    machine = _read(ENGINE / "cpu-bundled.json")["machine"]
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    where = f"Without a GPU: {machine['processor']}, {machine['cores']} cores, torch {machine['versions']['torch']}."
    return f"{table}\n\n{where}"


def decode_table() -> str:
    """Milliseconds per token on the GPU, by format and batch size."""
    report = _read(ENGINE / "h200-synthetic-7b.json")
    suites = report["suites"]
    machine = report["machine"]
    head = ["`synthetic:7b`, ms per output token", *(f"batch {name.removeprefix('decode')}" for name in suites)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for i, first in enumerate(next(iter(suites.values()))):
        cells = [f"{median(results[i]['tpot']) * 1e3:.2f}" for results in suites.values()]
        lines.append(f"| {first['name']} | " + " | ".join(cells) + " |")
    versions = machine["versions"]
    lines.append("")
    lines.append(
        f"{machine['gpu']}, torch {versions['torch']}, Triton {versions['triton']}; prompts of 512 tokens, 129 tokens "
        f"out, the mean gap after the first: `{_short(machine['command'])}`"
    )
    return "\n".join(lines)


def _perplexity() -> str:
    runs = _read(WORKBENCH / "cpu-demo.json")["runs"]
    by_format = {run["weights"]: run["perplexity"] for run in runs}
    return ", ".join(
        f"{name} {100 * (value / by_format['bf16'] - 1):+.2f} %" for name, value in by_format.items() if name != "bf16"
    )


def _against_transformers() -> str:
    suites = _read(ENGINE / "cpu-bundled.json")["suites"]
    pairs = [(suites[name][-1]["seconds"], suites[name][0]["seconds"]) for name in ("mixed", "single")]
    return "; ".join(f"{paired_ratio(theirs, ours):.2f}x" for theirs, ours in pairs)


def _decode_by_format() -> str:
    bf16, *others = _read(ENGINE / "cpu-synthetic-0.5b.json")["suites"]["single"]
    return ", ".join(f"{paired_ratio(bf16['tpot'], other['tpot']):.2f}x" for other in others)


def _overhead() -> str:
    return f"{100 * _read(WORKBENCH / 'cpu-overhead.json')['ratio']:.1f} %"


def _logits() -> str:
    rows = _read(ENGINE / "h200-logits.json")["errors"]
    own = [max(row["own"] for row in rows if row["kv"] == kv) for kv in ("bf16", "int8", "int4")]
    worst = max(row["shared"] for row in rows)
    return f"{100 * worst:.1f} %; " + ", ".join(f"{100 * error:.1f}" for error in own) + " %"


def _short(command: str) -> str:
    """Without the file it was written to."""
    return command.split(" --json")[0]


def _read(path: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(path.read_text())
    return report


if __name__ == "__main__":
    main()
