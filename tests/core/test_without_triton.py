"""Triton is an extra: importing a package reaches no module that imports it. Calls may, later."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def file_of(module: str) -> Path | None:
    """The file of one of our modules; None for a name that is not a module."""
    path = ROOT / Path(*module.split("."))
    candidates = (path / "__init__.py", path.with_suffix(".py"))
    return next((found for found in candidates if found.exists()), None)


def run_on_import(tree: ast.AST) -> Iterator[ast.AST]:
    """The statements of a module that its import runs: not those in functions or for types alone."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from run_on_import(child)


def imported(source: str) -> set[str]:
    """The modules that importing this source imports, with the packages that they lie in."""
    names = set()
    for node in run_on_import(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    parts = [name.split(".") for name in names]
    return {".".join(part[:end]) for part in parts for end in range(1, len(part) + 1)}


def reached(package: str) -> set[str]:
    """Every module that `import package` imports, ours and others' (by their first name)."""
    found, waiting = set(), [package]
    while waiting:
        name = waiting.pop()
        path = file_of(name)
        if name in found or (path is None and "." in name):
            continue
        found.add(name)
        if path is not None:
            waiting += imported(path.read_text())
    return found


@pytest.mark.parametrize("package", ["normuon_core", "optax_normuon", "torch_ref"])
def test_a_package_is_imported_without_triton(package):
    modules = reached(package)
    assert "normuon_core.recipes" in modules
    assert "triton" not in modules, sorted(name for name in modules if "kernels" in name)


def test_the_kernels_themselves_need_triton():
    assert "triton" in reached("normuon_core.kernels.source")
    assert "triton" in reached("torch_ref.kernels.launcher")
    assert imported("def late():\n    import triton\n") == set()
