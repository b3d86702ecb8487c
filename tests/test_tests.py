"""Are the tests as .github/CONTRIBUTING.md says: shared things in helper modules, and what starts processes marked?"""

import ast
from functools import cache
from pathlib import Path

import pytest

FILES = sorted(Path(__file__).parent.glob("*.py"))
STARTS = {
    "processes": {"run", "start", "in_a_process", "script", "start_script"},
    "subprocess": {"run", "Popen"},
}  # by module
MARKS = {"pytest.mark.processes", "pytest.mark.third_party"}


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def marks(nodes: list[ast.expr]) -> set[str]:
    return {ast.unparse(n) for expression in nodes for n in ast.walk(expression) if isinstance(n, ast.Attribute)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_nothing_is_imported_from_a_test_file(path: Path) -> None:
    for node in ast.walk(tree_of(path)):
        imported = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        imported += [a.name for a in node.names] if isinstance(node, ast.Import) else []
        for name in imported:
            assert not name.startswith(("test_", "tests")), f"line {node.lineno}: import helper modules by their name"


@pytest.mark.parametrize("path", [p for p in FILES if p.stem.startswith("test_")], ids=lambda path: path.stem)
def test_tests_that_start_processes_are_marked(path: Path) -> None:
    tree = tree_of(path)
    starters = {f"{module}.{name}" for module, names in STARTS.items() for name in names}
    of_file: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module in STARTS:
            starters |= {a.asname or a.name for a in node.names if a.name in STARTS[node.module]}
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark":
            of_file = marks([node.value])
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            called = {ast.unparse(n.func) for n in ast.walk(node) if isinstance(n, ast.Call)}
            assert not called & starters or (of_file | marks(node.decorator_list)) & MARKS, node.name
