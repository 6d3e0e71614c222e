"""Who may import whom, read from the imports themselves; and what a light command must not load."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "rstar"
LAYERS = {
    "types": 0, "overrides": 0, "values": 0, "config": 0, "__init__": 0, "calculator": 0,
    "tree": 1, "sandbox": 1, "machine": 1,
    "grading": 2,
    "prompts": 3, "problems": 3,
    "tokens": 4, "store": 4,
    "engines": 5, "warmup": 5, "ray_training": 5,
    "search": 6, "extract": 6, "training": 6,
    "evaluation": 7, "rounds": 7,
    "cluster": 8, "stopping": 8, "report": 8,
    "recipes": 9, "status": 9, "init": 9,
    "comparison": 10, "doctor": 10,
    "commands": 11, "cli": 12, "__main__": 13,
}  # fmt: skip
ONLY_IN = {
    "vllm": {"engines/vllm.py", "engines/vllm_loop.py"},
    "ray": {"cluster.py", "ray_training.py"},
    "torch": {"engines", "training"},
    "transformers": {"engines", "training", "tokens.py", "machine.py"},
}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Dotted names that a file imports, those under TYPE_CHECKING too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module)
            if node.module == "rstar":
                found |= {f"rstar.{alias.name}" for alias in node.names}
    return found


def part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_module_imports_lower_layers_only(path: Path) -> None:
    own = part(path)
    for name in imported(path):
        if name.startswith("rstar."):
            other = name.split(".")[1]
            if other != own:
                ground = own in ("config", "overrides", "values") and other in ("types", "overrides", "values")
                assert LAYERS[other] < LAYERS[own] or ground, f"{own} imports {other}"
        root = name.split(".")[0]
        if root in ONLY_IN:
            relative = str(path.relative_to(PACKAGE))
            allowed = any(relative == place or relative.startswith(f"{place}/") for place in ONLY_IN[root])
            assert allowed or (root == "torch" and own == "doctor"), f"{relative} imports {root}"


def test_every_part_has_a_layer() -> None:
    assert {part(path) for path in modules()} <= set(LAYERS)


@pytest.mark.parametrize(
    "name", ["rstar.config", "rstar.search.mcts", "rstar.search.collect", "rstar.cli", "rstar.recipes.rstar_math"]
)
def test_light_modules_leave_heavy_libraries_alone(name: str) -> None:
    code = f"import sys, {name}; print([m for m in ('torch', 'vllm', 'transformers', 'ray') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_help_is_instant() -> None:
    code = "import sys\nfrom rstar.cli import run\ntry: run(['--help'])\nexcept SystemExit: pass\n"
    code += "print([m for m in ('torch', 'numpy', 'omegaconf', 'ray') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip().endswith("[]")


def test_no_file_is_past_four_hundred_lines() -> None:
    long = {str(p.relative_to(PACKAGE)): n for p in modules() if (n := len(p.read_text().splitlines())) > 420}
    assert not long
