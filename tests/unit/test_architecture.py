"""The rules that hold the layout together, read from the source itself: who imports whom, what is never written."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("kernels", "engine", "workbench")
TOP_LEVEL = {
    *PACKAGES, "notebooks", "tests", ".ci", ".gitattributes", ".gitignore", "LICENSE", "Makefile", "README.md",
    "constraints.txt", "environment.yml", "pyproject.toml",
}  # fmt: skip
MAX_FILE_BYTES = 24 * 2**20
MAX_TOTAL_BYTES = 40 * 2**20
MAX_NOTEBOOK_BYTES = 300_000

# Imports go notebooks -> workbench -> engine -> kernels, never back.
THIRD_PARTY = {
    "kernels": {"numpy", "torch", "triton"},
    "engine": {"huggingface_hub", "numpy", "psutil", "safetensors", "tokenizers", "torch", "tqdm", "transformers"},
    "workbench": {
        "anywidget", "ipywidgets", "numpy", "pandas", "plotly", "psutil", "torch", "tqdm", "transformers",
        "IPython", "comm", "jupyter_client", "traitlets",  # ipywidgets and JupyterLab stand on these
        "lm_eval",  # the extra of that name
    },
}  # fmt: skip
PERMITTED = {
    "kernels": THIRD_PARTY["kernels"] | {"kernels"},
    "engine": THIRD_PARTY["engine"] | {"engine", "kernels"},
    "workbench": THIRD_PARTY["workbench"] | {"workbench", "engine", "kernels"},
}
# Each package's rooms, from the bottom up, and beside each those it takes from; what lies in no room is bound only by
# the rule against circles.
ROOMS: dict[str, dict[str, set[str]]] = {
    "kernels": {
        "formats": set(),
        "rows": {"formats"},
        "products": {"formats", "rows"},
        "paged": {"rows"},
        "measuring": {"formats", "rows", "products", "paged"},
        "bench": {"formats", "rows", "products", "paged", "measuring"},
    },
    "engine": {
        "bundled": set(),
        "model": set(),
        "scheduling": set(),
        "loading": {"bundled", "model"},
        "running": {"loading", "model", "scheduling"},
        "quantize": {"loading", "model"},
        "bench": {"bundled", "loading", "model", "running", "scheduling"},
    },
    "workbench": {
        "quality": set(),
        "sensitivity": {"quality"},
        "runs": {"quality"},
        "panel": {"runs"},
    },
}
WITHOUT_TORCH = ("engine.errors", "engine.sampling_params", "engine.request", "engine.clock", "engine.scheduling")


def sources() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def tracked_files() -> list[Path]:
    """What git holds, as far as it lies in the checkout."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: there is no list of tracked files")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).exists()]


def describe(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in sources()}


# --- the rules: each yields the lines of a module that break it -------------------------------------------------------


def imported_packages(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.partition(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.lineno, (node.module or "").partition(".")[0]


def foreign_imports(tree: ast.Module, package: str) -> Iterator[str]:
    permitted = PERMITTED[package] | sys.stdlib_module_names
    for line, name in imported_packages(tree):
        if name not in permitted:
            yield f"line {line} imports {name}, {package} may not"


def relative_escapes(tree: ast.Module, depth: int) -> Iterator[str]:
    """`depth`: folders between the module and the top level; a longer row of dots leaves the package."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level > depth:
            yield f"line {node.lineno} leaves its package by a relative import"


def imported_modules(tree: ast.Module, folder: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """Our own modules that one in `folder` imports, anywhere in its code and for its annotations too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = folder[: len(folder) + 1 - node.level] if node.level else ()
            names = [".".join(filter(None, (*above, node.module, alias.name))) for alias in node.names]
        else:
            continue
        for name in names:
            while name and name not in MODULES:  # what a module holds is named behind it
                name = name.rpartition(".")[0]
            if name:
                yield node.lineno, name


def imports_of(path: Path) -> list[tuple[int, str]]:
    return list(imported_modules(ast.parse(path.read_text("utf-8")), path.relative_to(ROOT).parent.parts))


def place(module: str) -> str:
    """The room of a module, or the module itself where it lies in none."""
    return ".".join(module.split(".")[:2])


def circle(imports: Iterable[tuple[str, str]]) -> list[str]:
    """Names of which each imports the one before it, first and last the same; none where there is no such row."""
    graph: dict[str, set[str]] = {}
    for name, imported in imports:
        graph.setdefault(name, set()).update({imported} - {name})
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


def unsafe_loading(tree: ast.Module) -> Iterator[str]:
    """Ways to run what a file says: pickles, torch.load, remote code, eval and exec."""
    yield from (f"line {line} imports {name}" for line, name in imported_packages(tree) if name in PICKLES)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Name) and node.func.id in {"eval", "exec", "__import__"}:
            yield f"line {node.lineno} calls {node.func.id}"
        if ast.unparse(node.func) in {"torch.load", "torch.hub.load"}:
            yield f"line {node.lineno} calls {ast.unparse(node.func)}; only safetensors are loaded"
        for keyword in node.keywords:
            if keyword.arg == "trust_remote_code" and ast.unparse(keyword.value) != "False":
                yield f"line {node.lineno} sets trust_remote_code"


def swallowed_errors(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            if node.type is None:
                yield f"line {node.lineno} catches everything"
            if all(isinstance(line, ast.Pass) or ast.unparse(line) == "..." for line in node.body):
                yield f"line {node.lineno} swallows an error without a word"
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in {"suppress", "contextlib.suppress"}:
            everything = {"Exception", "BaseException"} & {ast.unparse(error) for error in node.args}
            yield from (f"line {node.lineno} suppresses {name}" for name in everything)


def at_import(node: ast.AST) -> Iterator[ast.AST]:
    """Every node below `node` that runs when the module is imported: not the bodies of functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        yield child
        yield from at_import(child)


def import_time_switches(tree: ast.Module) -> Iterator[str]:
    for node in at_import(tree):
        if isinstance(node, ast.Attribute | ast.Name) and ast.unparse(node) in {
            "os.environ", "os.getenv", "os.putenv", "environ", "getenv",
        }:  # fmt: skip
            yield f"line {node.lineno} looks at the environment when it is imported"


def untyped_functions(tree: ast.Module) -> Iterator[str]:
    """Functions without full annotations. Kernels are Triton's language, or its Gluon: tensors carry none there."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if any(ast.unparse(decorator).startswith(("triton.jit", "gluon.jit")) for decorator in node.decorator_list):
            continue
        everything = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
        everything += [argument for argument in (node.args.vararg, node.args.kwarg) if argument]
        if node.returns is None or any(a.annotation is None and a.arg not in {"self", "cls"} for a in everything):
            yield f"line {node.lineno}: {node.name} is not fully annotated"


RULES: dict[str, tuple[Callable[[ast.Module], Iterator[str]], list[str]]] = {
    "unsafe loading": (
        unsafe_loading,
        ["import pickle", "from pickle import loads", "torch.load(path)", "eval(text)", "exec(text)",
         "load(path, trust_remote_code=True)", "load(path, trust_remote_code=flag)"],
    ),
    "swallowed errors": (
        swallowed_errors,
        ["try:\n    f()\nexcept:\n    g()", "try:\n    f()\nexcept ValueError:\n    pass",
         "try:\n    f()\nexcept ValueError:\n    ...", "with suppress(Exception):\n    f()"],
    ),
    "import-time switches": (
        import_time_switches,
        ["import os\nX = os.environ['X']", "class A:\n    x = os.getenv('X')", "if os.environ.get('X'):\n    pass"],
    ),
    "types": (untyped_functions, ["def f(x) -> int:\n    return x", "def f(x: int):\n    return x"]),
}  # fmt: skip


@pytest.mark.parametrize("name", RULES)
def test_no_module_breaks_the_rule(name: str) -> None:
    rule, _ = RULES[name]
    broken = [f"{describe(path)}: {fault}" for path in sources() for fault in rule(ast.parse(path.read_text("utf-8")))]
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(("name", "snippet"), [(name, text) for name, (_, texts) in RULES.items() for text in texts])
def test_rule_sees_what_it_forbids(name: str, snippet: str) -> None:
    assert list(RULES[name][0](ast.parse(snippet)))


def test_rules_let_ordinary_code_pass() -> None:
    ordinary = """
import os
import torch
@triton.jit
def kernel(pointer, N: tl.constexpr):
    pass


def f(model: Model, path: str) -> Model:
    model.eval()
    home = os.environ.get("HOME")
    try:
        return load(path, trust_remote_code=False)
    except OSError as error:
        raise ValueError(path, home) from error
"""
    tree = ast.parse(ordinary)
    assert not [fault for rule, _ in RULES.values() for fault in rule(tree)]
    assert not list(foreign_imports(tree, "kernels"))


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_go_one_way(package: str) -> None:
    broken = []
    for path in sorted((ROOT / package).rglob("*.py")):
        tree = ast.parse(path.read_text("utf-8"))
        depth = len(path.relative_to(ROOT).parts) - 1
        broken += [f"{describe(path)}: {fault}" for fault in foreign_imports(tree, package)]
        broken += [f"{describe(path)}: {fault}" for fault in relative_escapes(tree, depth)]
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize("package", ROOMS)
def test_rooms_stand_on_those_below(package: str) -> None:
    rooms = {f"{package}.{room}": {f"{package}.{other}" for other in below} for room, below in ROOMS[package].items()}
    broken = [
        f"{describe(path)}: line {line} imports {other}, {room} may not"
        for room, below in rooms.items()
        for path in sorted((ROOT / room.replace(".", "/")).rglob("*.py"))
        for line, other in imports_of(path)
        if place(other) in rooms.keys() - below - {room}
    ]
    assert not broken, "\n".join(broken)
    assert {path.parent.name for path in (ROOT / package).glob("*/*.py")} == set(ROOMS[package])


@pytest.mark.parametrize("view", [str, place], ids=["modules", "rooms"])
@pytest.mark.parametrize("package", ROOMS)
def test_imports_make_no_circle(package: str, view: Callable[[str], str]) -> None:
    paths = sorted((ROOT / package).rglob("*.py"))
    assert not circle((view(module_name(path)), view(other)) for path in paths for _, other in imports_of(path))


def test_room_rules_see_whole_names_and_circles() -> None:
    seen = {
        "from ..paged.qkv import x": ["kernels.paged.qkv"],
        "def f():\n    from .. import rows, tuning": ["kernels.rows", "kernels.tuning"],
        "from kernels.products.wide import x": ["kernels.products.wide"],
        "from kernels import bench, linear": ["kernels.bench", "kernels"],
        "import kernels.formats.weights, torch": ["kernels.formats.weights"],
        "if TYPE_CHECKING:\n    from engine.engine import Engine": ["engine.engine"],
        "from . import tokens\nfrom .tokens import y": ["kernels.rows.tokens", "kernels.rows.tokens"],
    }
    for snippet, modules in seen.items():
        assert [name for _, name in imported_modules(ast.parse(snippet), ("kernels", "rows"))] == modules
    assert [place(name) for name in ("kernels.rows.tokens", "kernels.tuning", "kernels")] == [
        "kernels.rows", "kernels.tuning", "kernels",
    ]  # fmt: skip
    assert set(circle([("a", "b"), ("b", "c"), ("c", "a"), ("d", "a")])) == {"a", "b", "c"}
    assert not circle([("a", "b"), ("b", "c"), ("a", "c"), ("a", "a")])


@pytest.mark.parametrize(
    ("package", "snippet"),
    [
        ("kernels", "import engine"),
        ("kernels", "def f():\n    from transformers import AutoModel"),
        ("engine", "from workbench.runs.session import Session"),
        ("engine", "import pandas as pd"),
        ("engine", "import plotly.graph_objects as go"),
        ("engine", "import ipywidgets"),
        ("workbench", "import matplotlib"),
    ],
)
def test_import_rule_sees_the_way_back(package: str, snippet: str) -> None:
    assert list(foreign_imports(ast.parse(snippet), package))
    assert list(relative_escapes(ast.parse("from ..kernels import linear"), depth=1))


# --- what happens at import, seen in a process of its own -------------------------------------------------------------


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_host_logic_imports_no_torch() -> None:
    names = [name for name in MODULES if name.startswith(WITHOUT_TORCH)]
    loaded = python(
        f"import importlib, sys\nfor name in {names!r}: importlib.import_module(name)\n"
        "print([name for name in ('torch', 'triton', 'numpy', 'transformers') if name in sys.modules])"
    )
    assert loaded.strip() == "[]"


def test_importing_engine_refuses_the_other_distribution_named_kernels() -> None:
    said = python(
        "import importlib.metadata as metadata\n"
        "real = metadata.version\n"
        "metadata.version = lambda name: '9.8.7' if name == 'kernels' else real(name)\n"
        "try:\n    import engine\n"
        "except ImportError as error:\n    print(error)\n"
    )
    assert "'kernels' 9.8.7 is installed" in said
    assert "pip uninstall kernels" in said


# --- what the repository holds ----------------------------------------------------------------------------------------


def test_top_level_holds_nothing_else() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in tracked_files()} <= TOP_LEVEL


def test_repository_stays_small() -> None:
    sizes = {describe(path): path.stat().st_size for path in tracked_files()}
    large = {name: size for name, size in sizes.items() if size > MAX_FILE_BYTES}
    assert not large
    assert sum(sizes.values()) < MAX_TOTAL_BYTES


PLOTLY = "application/vnd.plotly.v1+json"


def test_notebooks_are_small_and_hold_no_widget_state() -> None:
    for path in sorted((ROOT / "notebooks").rglob("*.ipynb")):
        if ".ipynb_checkpoints" in path.parts:
            continue
        assert path.stat().st_size < MAX_NOTEBOOK_BYTES, describe(path)
        notebook = json.loads(path.read_text("utf-8"))
        assert "widgets" not in notebook["metadata"], f"{describe(path)} holds widget state"
        outputs = [output.get("data", {}) for cell in notebook["cells"] for output in cell.get("outputs", [])]
        assert not any("%|" in "".join(data.get("text/plain", "")) for data in outputs), "a progress bar stands still"
        figures = [data[PLOTLY] for data in outputs if PLOTLY in data]
        assert all("sendChartToCloud" in figure["layout"]["modebar"]["remove"] for figure in figures), describe(path)
