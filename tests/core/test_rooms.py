"""Who may import whom: no circle, no import of a higher wing, no foreign framework.

Imports within functions count too: they are made late because of what they cost, not to hide a circle.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WINGS = ["leaves", "mesh", "matrices", "kernels", "stages", "steps"]
"""Of both frameworks, from the ground up; the optimizers stand above them all."""

OWN = {"normuon_core", "optax_normuon", "torch_ref"}
MAY_IMPORT = {
    "normuon_core": {"normuon_core", "ml_dtypes", "numpy", "triton"},
    "optax_normuon": {"normuon_core", "optax_normuon", "jax", "numpy", "optax", "triton"},
    "torch_ref": {"normuon_core", "torch_ref", "torch", "ml_dtypes", "numpy", "triton"},
}


def modules(package: str) -> dict[str, Path]:
    """Every module of a package by its name."""
    result = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        result[name.removesuffix(".__init__")] = path
    return result


MODULES = {name: path for package in sorted(OWN) for name, path in modules(package).items()}


def is_for_types_alone(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes of a tree but those that stand under `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(tree):
        if not is_for_types_alone(child):
            yield child
            yield from nodes(child)


def imports(path: Path) -> set[str]:
    """What a file imports, by full name: of our own packages the module, of others the top level."""
    found = set()
    for node in nodes(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
    return {name if name.split(".")[0] in OWN else name.split(".")[0] for name in found}


IMPORTS = {name: imports(path) for name, path in MODULES.items()}


def floor(module: str) -> tuple[str, int]:
    """The package of a module, and how high its wing stands in `WINGS`."""
    package, *rest = module.split(".")
    in_wing = package != "normuon_core" and rest and rest[0] in WINGS
    return package, WINGS.index(rest[0]) if in_wing else len(WINGS)


def test_both_frameworks_have_the_same_wings():
    for package in ("optax_normuon", "torch_ref"):
        found = {
            path.name for path in (ROOT / package).iterdir() if (path / "__init__.py").exists()
        }
        assert found == set(WINGS)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_its_own_framework_alone(module):
    package = module.split(".")[0]
    others = {name.split(".")[0] for name in IMPORTS[module]} - set(sys.stdlib_module_names)
    assert others <= MAY_IMPORT[package]


@pytest.mark.parametrize("module", MODULES)
def test_no_wing_imports_a_wing_above_it(module):
    package, own = floor(module)
    for other in IMPORTS[module]:
        other_package, height = floor(other)
        assert other_package != package or height <= own, f"{module} imports {other}"


def test_modules_do_not_import_each_other_in_a_circle():
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join([*way[way.index(module) :], module])
        if module in done:
            return
        for other in sorted(IMPORTS[module] & MODULES.keys()):
            visit(other, (*way, module))
        done.add(module)

    for module in MODULES:
        visit(module, ())
