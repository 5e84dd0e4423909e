"""Packages import only what docs/architecture.md says, and no two files import each other."""

from __future__ import annotations

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SMALL = {"errors", "interrupts", "progress", "parsing", "yaml_size", "peak_memory", "help"}
FREE = {"cli", "entry", "__init__"}  # they may import all


def imports(path: Path) -> set[str]:
    """The modules of this project that a file imports when it runs."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
    return {name for name in found if name.split(".")[0] in ("geodesic", "learned_opt")}


def module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def package(name: str) -> str:
    first, *rest = name.split(".")
    return first if first == "geodesic" else rest[0] if rest else "__init__"


FILES = {module(p): p for top in ("geodesic", "learned_opt") for p in (ROOT / top).rglob("*.py")}


def allowed() -> dict[str, set[str]]:
    page = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| (`.*?) \|.*\|(.*)\|$", page, re.M)
    return {name: set(re.findall(r"`(\w+)`", may)) for names, may in rows
            for name in re.findall(r"`(\w+)`", names)}  # fmt: skip


def test_packages_import_what_the_page_says() -> None:
    rows = allowed()
    for name, path in FILES.items():
        if (own := package(name)) in FREE:
            continue
        found = {package(m) for m in imports(path) if m in FILES} - SMALL - {own, "__init__"}
        may = set() if own in SMALL else rows[own]
        assert found <= may, f"{name} imports {found - may}"


def test_no_files_import_each_other() -> None:
    graph = {
        name: {m for m in imports(path) if m in FILES} - {name} for name, path in FILES.items()
    }
    for name, found in graph.items():  # a module's package comes with it; only names count here
        graph[name] = {m for m in found if not any(other.startswith(f"{m}.") for other in found)}
    TopologicalSorter(graph).prepare()
