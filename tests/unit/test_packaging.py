"""One declaration of the dependencies, and everything else in step with it: constraints, conda, wheel, README."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
README = (ROOT / "README.md").read_text("utf-8")

# torch's CUDA build pins these itself, release by release.
PINNED_BY_TORCH = ("nvidia-", "cuda-")


def declared(extra: str | None = None) -> list[Requirement]:
    texts = PROJECT["dependencies"] if extra is None else PROJECT["optional-dependencies"][extra]
    return [Requirement(text) for text in texts]


def constraints() -> dict[str, Requirement]:
    lines = [line for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if not line.startswith("#")]
    pins = {str(canonicalize_name(pin.name)): pin for pin in map(Requirement, lines)}
    assert len(pins) == len(lines), "a package is pinned twice"
    return pins


def pinned_version(pin: Requirement) -> Version:
    (specifier,) = pin.specifier
    assert specifier.operator == "==", f"{pin} does not name one exact version"
    return Version(specifier.version)


def installation() -> set[str]:
    """Every distribution that installing inferlab[test] here brings with it."""
    found: set[str] = set()
    waiting = [*declared(), *declared("test")]
    while waiting:
        requirement = waiting.pop()
        name = str(canonicalize_name(requirement.name))
        extras = ["", *sorted(requirement.extras)]
        if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in extras):
            continue
        if name in found:
            continue
        found.add(name)
        for text in importlib.metadata.requires(name) or []:
            below = Requirement(text)
            if below.marker is None or any(below.marker.evaluate({"extra": extra}) for extra in extras):
                below.marker = None
                waiting.append(below)
    return found


# --- constraints.txt --------------------------------------------------------------------------------------------------


def test_constraints_lie_in_the_declared_ranges() -> None:
    pins = constraints()
    for requirement in [*declared(), *declared("test")]:
        pin = pins[str(canonicalize_name(requirement.name))]
        assert pinned_version(pin) in requirement.specifier, f"{pin} is not what pyproject.toml asks for: {requirement}"


def test_constraints_name_no_local_build() -> None:
    local = [str(pin) for pin in constraints().values() if pinned_version(pin).local]
    assert not local, "a local version such as +cpu exists on some machines only"


def test_constraints_cover_the_whole_installation() -> None:
    unpinned = {name for name in installation() if not name.startswith(PINNED_BY_TORCH)} - constraints().keys()
    assert not unpinned


# --- environment.yml --------------------------------------------------------------------------------------------------


def test_conda_environment_is_in_step_with_pyproject() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text("utf-8"))
    assert environment["name"] == PROJECT["name"]
    *conda, pip_section = environment["dependencies"]
    known = {str(canonicalize_name(requirement.name)): requirement.specifier for requirement in declared()}
    known |= {"python": SpecifierSet(PROJECT["requires-python"]), "pip": SpecifierSet()}
    for requirement in map(Requirement, conda):
        assert requirement.specifier == known[str(canonicalize_name(requirement.name))], f"{requirement} is out of step"
    assert {Requirement(text).name for text in conda} >= {"python", "pip"}
    # The packages come from pyproject.toml itself, at the tested versions, so that there is no second list to keep.
    assert pip_section == {"pip": ["-c constraints.txt", "-e .[test]"]}  # lm-eval is for who asks for it


# --- the wheel --------------------------------------------------------------------------------------------------------


def test_wheel_holds_every_tracked_file_of_the_packages(tmp_path: Path) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: there is no list of tracked files")
    packages = ["kernels", "engine", "workbench"]
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("inferlab-*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    git = ["git", "ls-files", "-z", *packages]
    listed = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    missing = {name for name in listed if name and (ROOT / name).exists()} - held
    assert not missing
    assert {name.partition("/")[0] for name in held} <= {*packages, f"inferlab-{PROJECT['version']}.dist-info"}
    assert {f"inferlab-{PROJECT['version']}.dist-info/licenses/{name}" for name in PROJECT["license-files"]} <= held


# --- README.md --------------------------------------------------------------------------------------------------------


def code_in_readme() -> str:
    blocks = re.findall(r"^```.*?\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    return "\n".join(blocks + re.findall(r"`([^`\n]+)`", README))


def test_readme_calls_targets_that_the_makefile_has() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    called = set(re.findall(r"\bmake ([a-z]+)", code_in_readme()))
    assert {"lab", "demo", "test"} <= called <= targets


def test_readme_runs_modules_that_exist() -> None:
    modules = re.findall(r"-m ((?:kernels|engine|workbench)[\w.]*)", code_in_readme())
    assert modules
    for module in modules:
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), f"python -m {module}"


def test_readme_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", README) + re.findall(r'(?:src|href)="([^"]+)"', README)
    for link in links:
        if not re.match(r"[a-z]+:|#", link):
            assert (ROOT / link.partition("#")[0]).exists(), link
