"""The design rules that matter, as tests: who may import whom, a light import, a sorted public API, documents that run."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ctrlib

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "ctrlib"

# Lowest first. A module may import modules of lower layers and of its own group; the rules of single groups are below.
LAYERS = (
    {"schema", "config", "progress", "files", "plots"},
    {"batch", "dropout", "ragged", "_native"},
    {"table"},
    {"rowwise", "content_map"},
    {
        "calibration",
        "metrics",
        "ranking_metrics",
        "losses",
        "optim",
        "training",
        "cpu",
        "embedding",
        "memory",
        "interactions",
        "data",
    },
    {"models"},
    {"artifact", "hoisting"},
    {"node_artifact", "ranking"},
    {"export", "service", "scoring"},
    {"experiment"},
    {"search", "nodes"},
    {"cli", "__main__"},
)
FORBIDDEN = {
    "interactions": {"batch", "data", "models", "training", "embedding", "losses", "metrics", "optim"},
    "data": {"models", "interactions", "training", "embedding", "losses", "optim", "memory"},
    "embedding": {"data", "interactions", "training"},
    **{
        name: {"models", "interactions", "data", "embedding"}
        for name in ("losses", "metrics", "ranking_metrics", "optim", "training")
    },
    "models": {"data", "training"},
}
# Schema.infer is the name people look for; it asks the module that reads data, when it is called.
EXCEPTIONS = {("schema", "data")}


def _modules() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def _group(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node.module
            if node.module == "ctrlib":
                yield from (f"ctrlib.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", _modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    rank = {group: i for i, layer in enumerate(LAYERS) for group in layer}
    here = _group(path)
    for name in _imports(path):
        top, _, rest = name.partition(".")
        assert top not in ("datasets", "experiments", "benchmarks", "tests"), f"{path} imports {name}"
        if top != "ctrlib" or not rest:
            continue
        there = rest.partition(".")[0]
        if there == here or (here, there) in EXCEPTIONS:
            continue
        assert rank[there] <= rank[here], f"{path} imports {name}, which stands above it"
        assert there not in FORBIDDEN.get(here, set()), f"{path} imports {name}; {here} must not know {there}"


@pytest.mark.parametrize("name", ["schema", "config", "files"])
def test_the_bottom_needs_only_the_standard_library(name: str) -> None:
    allowed = {*sys.stdlib_module_names, "ctrlib"}
    assert {n.partition(".")[0] for n in _imports(PACKAGE / f"{name}.py")} <= allowed


def test_import_is_light() -> None:
    heavy = ["torch", "polars", "pyarrow", "numpy", "optuna", "typer", "rich", "sklearn", "pandas"]
    code = f"import sys, ctrlib; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_library_does_not_import_what_only_tests_have() -> None:
    used = {(_group(path), n.partition(".")[0]) for path in _modules() for n in _imports(path)}
    absent = {"pandas", "sklearn", "scipy", "pickle", "pytest", "optuna", "lightgbm", "matplotlib"}
    absent |= {"pymetis", "torch_geometric"}
    assert {p.stem for p in _modules() if any(n.partition(".")[0] == "optuna" for n in _imports(p))} == {
        *("tuning", "worker", "outcome", "sampling")
    }
    # the extra "search", imported by the functions that need it
    allowed = {("search", name) for name in ("sklearn", "lightgbm", "optuna")} | {("plots", "matplotlib")}
    allowed |= {("data", "pymetis")}  # the extra "graph", imported by the function that needs it
    assert {pair for pair in used if pair[1] in absent} <= allowed


def test_searches_load_without_what_the_extra_has() -> None:
    with_optuna = {"tuning", "worker", "outcome", "sampling"}  # imported when a search begins
    files = sorted(p for p in (PACKAGE / "search").glob("[a-z]*.py") if p.stem not in with_optuna)
    names = ", ".join(f"ctrlib.search.{path.stem}" for path in [*files, PACKAGE / "cli.py"]).replace("search.cli", "cli")
    code = f"import sys, {names}; print([m for m in ('sklearn', 'lightgbm', 'matplotlib', 'optuna') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_public_names_are_sorted_complete_and_there() -> None:
    loaded = {name for names in ctrlib._MODULES.values() for name in names}
    assert sorted(ctrlib.__all__, key=lambda n: (not n.isupper(), n[0].islower(), n)) == ctrlib.__all__
    assert set(ctrlib.__all__) == loaded
    for name in ctrlib.__all__:
        assert getattr(ctrlib, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = ctrlib.nonsense


def test_every_page_is_in_the_index_and_every_preset_on_a_page() -> None:
    docs = ROOT / "docs"
    pages = {str(page.relative_to(docs)) for page in docs.rglob("*.md")} - {"index.md"}
    assert set(re.findall(r"\]\(((?:papers/)?\w+\.md)\)", (docs / "index.md").read_text(encoding="utf-8"))) == pages
    text = "".join(page.read_text(encoding="utf-8") for page in (docs / "papers").glob("*.md"))
    assert [name for name in ctrlib.PRESETS if f"`{name}`" not in text] == []


def _blocks() -> list[tuple[str, str]]:
    found = []
    for document in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        for i, code in enumerate(re.findall(r"^```python\n(.*?)^```", document.read_text(encoding="utf-8"), re.S | re.M)):
            found.append((f"{document.name}-{i}", code))
    return found


@pytest.mark.parametrize(("name", "code"), _blocks(), ids=[name for name, _ in _blocks()])
def test_documented_code_runs(name: str, code: str, tmp_path: Path) -> None:
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, f"{name}:\n{result.stderr}"
