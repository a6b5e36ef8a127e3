"""Imports go down the layers only."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the ground up. Neighbours in one row never import each other.
LAYERS = [
    ["fedsa_kernels"],
    ["errors", "types", "streams", "config", "csprng", "files"],
    ["adapters"],
    ["methods", "data", "secagg", "privacy"],
    ["federation"],
    ["runtimes", "reporting"],
    ["bench", "audit"],
    ["cli"],
]
FREE_AMONG_THEMSELVES = {"errors", "types", "streams", "config", "csprng", "files"}
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
FILES = sorted(
    path
    for package in ("fedsa_secure", "kernels/fedsa_kernels")
    for path in (ROOT / package).rglob("*.py")
)


def part_of(module: str) -> str | None:
    """The layer's part that a module belongs to, or None for other packages."""
    names = module.split(".")
    if names[0] == "fedsa_kernels":
        return "fedsa_kernels"
    if names[0] != "fedsa_secure":
        return None
    return names[1] if len(names) > 1 else "fedsa_secure"


def imported_modules(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
    return found


def module_of(path: Path) -> str:
    base = ROOT / "kernels" if "fedsa_kernels" in path.parts else ROOT
    return ".".join(path.relative_to(base).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path: Path) -> None:
    own = part_of(module_of(path))
    if own in ("fedsa_secure", "__main__"):  # the public face may see everything
        return
    assert own in LEVEL, f"{own} has no place in the layers"
    for module in imported_modules(path):
        other = part_of(module)
        if other is None or other == own or {own, other} <= FREE_AMONG_THEMSELVES:
            continue
        assert other in LEVEL, f"{path.name} imports {module}"
        assert LEVEL[other] < LEVEL[own], f"{own} must not import {other} ({path.name}: {module})"


def test_the_tests_see_every_part() -> None:
    parts = {part_of(module_of(path)) for path in FILES} - {"fedsa_secure", "__main__"}
    assert parts == set(LEVEL)


# All that secure aggregation rests on: whoever audits it reads these, and nothing that learns.
SECAGG_MAY_IMPORT = sys.stdlib_module_names | {"numpy", "cryptography", "msgspec"}
SECAGG_MAY_NOT_IMPORT = {"logging", "random", "fedsa_secure.streams", "fedsa_secure.types"}


@pytest.mark.parametrize(
    "path", [p for p in FILES if p.parent.name == "secagg"], ids=lambda p: p.name
)
def test_secagg_rests_on_little(path: Path) -> None:
    for module in imported_modules(path):
        assert module not in SECAGG_MAY_NOT_IMPORT, module
        if part_of(module) is None:
            assert module.split(".")[0] in SECAGG_MAY_IMPORT, module


def test_secagg_does_not_bring_torch() -> None:
    code = "import sys, fedsa_secure.secagg; print('torch' in sys.modules, 'flwr' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_kernels_is_a_source_root_and_no_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_only_the_command_line_prints() -> None:
    for path in FILES:
        calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        names = {call.func.id for call in calls if isinstance(call.func, ast.Name)}
        assert "print" not in names, path
