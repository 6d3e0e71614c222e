"""Who may import whom, read from the imports themselves; and what a light command must not load."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "rstar"
LAYERS = {
    "types": 0, "config": 0, "__init__": 0, "calculator": 0, "stopping": 0,
    "tree": 1, "sandbox": 1, "machine": 1,
    "grading": 2,
    "prompts": 3, "problems": 3,
    "tokens": 4, "store": 4,
    "engines": 5, "warmup": 5, "ray_training": 5, "call": 5,
    "search": 6, "extract": 6, "training": 6,
    "evaluation": 7, "manifest": 7,
    "workers": 8, "report": 8,
    "run": 9, "status": 9, "init": 9,
    "recipes": 10,
    "comparison": 11, "doctor": 11,
    "commands": 12, "cli": 13, "__main__": 14,
}  # fmt: skip
ONLY_IN = {
    "vllm": {"engines/vllm.py", "engines/vllm_loop.py"},
    "ray": {"workers.py", "ray_training.py"},
    "torch": {"engines", "training"},
    "transformers": {"engines", "training", "tokens.py", "machine.py"},
}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


MODULES = {".".join(("rstar", *path.relative_to(PACKAGE).with_suffix("").parts)) for path in modules()}


def imported(path: Path) -> set[str]:
    """Dotted names that a file imports, those under TYPE_CHECKING too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            below = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= below if below <= MODULES else below | {node.module}
    return found


def part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_module_imports_lower_layers_only(path: Path) -> None:
    own = part(path)
    for name in imported(path):
        if name.startswith("rstar.") and (other := name.split(".")[1]) in LAYERS and other != own:
            ground = (own, other) == ("config", "types")
            assert LAYERS[other] < LAYERS[own] or ground, f"{own} imports {other}"
        root = name.split(".")[0]
        if root in ONLY_IN:
            relative = str(path.relative_to(PACKAGE))
            allowed = any(relative == place or relative.startswith(f"{place}/") for place in ONLY_IN[root])
            assert allowed or (root == "torch" and own == "doctor"), f"{relative} imports {root}"


def test_every_part_has_a_layer() -> None:
    assert {part(path) for path in modules()} <= set(LAYERS)


@pytest.mark.parametrize(
    "name", ["rstar.config", "rstar.search.mcts", "rstar.search.worker", "rstar.cli", "rstar.recipes.rstar_math"]
)
def test_light_modules_leave_heavy_libraries_alone(name: str) -> None:
    code = f"import sys, {name}; print([m for m in ('torch', 'vllm', 'transformers', 'ray') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_help_is_instant() -> None:
    code = "import sys\nfrom rstar.cli import run\ntry: run(['--help'])\nexcept SystemExit: pass\n"
    code += "print([m for m in ('torch', 'numpy', 'pydantic', 'ray') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip().endswith("[]")


def test_no_files_import_each_other_in_a_circle() -> None:
    names = {".".join(("rstar", *path.relative_to(PACKAGE).with_suffix("").parts)): path for path in modules()}
    names = {name.removesuffix(".__init__"): path for name, path in names.items()}
    graph = {name: {one for one in imported(path) if one in names and one != name} for name, path in names.items()}
    for cycle in (found for found in strongly_connected(graph) if len(found) > 1):
        pytest.fail(f"a circle of imports: {', '.join(sorted(cycle))}")


def strongly_connected(graph: dict[str, set[str]]) -> list[set[str]]:
    """Sets of nodes that reach each other, by what each node reaches."""

    def reached(start: str) -> set[str]:
        found, left = {start}, [start]
        while left:
            left += (new := graph[left.pop()] - found)
            found |= new
        return found

    below = {node: reached(node) for node in graph}
    return [{other for other in below[node] if node in below[other]} for node in graph]
