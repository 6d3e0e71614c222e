"""Golden trees: a scripted policy, and the whole tree equals a JSON that was checked by hand.

To renew after a meant change: `python -m tests.test_golden_trees`, then read the difference.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rstar.search.expand import Expander
from rstar.search.mcts import Mcts
from tests.fakes import answer, branching, depth_of, finish, grow, step

GOLDEN = Path(__file__).parent / "data" / "golden_trees.json"


def dead_ends(prompt: str, seed: int, index: int) -> str:
    """Branch 0 fails on its second step, branch 1 ends in a right answer."""
    if "<end_of_code>" in prompt:
        return answer("1")
    if depth_of(prompt) == 0:
        return step(1, f"x1 = {index}")
    return step(2, "boom()") if "x1 = 0" in prompt else finish("1")


def duplicates(prompt: str, seed: int, index: int) -> str:
    """Three of four samples agree at every step; the answers differ."""
    if "<end_of_code>" in prompt:
        return answer(str(index % 2))
    return step(1, f"x1 = {index // 3}") if depth_of(prompt) == 0 else finish("v")


def score(text: str) -> float:
    return 0.5 if "x1 = 1" in text else -0.25


CASES: dict[str, Callable[[], tuple[Expander, int]]] = {
    "terminal_guided": lambda: (grow(branching(2, lambda made: made == [1, 0])), 4),
    "ppm_augmented": lambda: (grow(branching(2, lambda made: made == [1, 0]), score=score), 4),
    # differs where a walk counts its own virtual loss in N_parent
    "ppm_augmented_wide": lambda: (grow(branching(2, lambda made: sum(made) % 2 == 0), candidates=3, score=score), 6),
    "prior_outside_n": lambda: (grow(branching(1, lambda made: made == [1]), score=score, prior_visits=0), 2),
    "test_time": lambda: (grow(branching(1, lambda made: made == [0]), score=score, test_time=True), 4),
    "dead_ends": lambda: (grow(dead_ends), 4),
    "all_candidates_fail": lambda: (grow(lambda prompt, seed, index: f"boom({index})<end_of_step>"), 4),
    "duplicates": lambda: (grow(duplicates, candidates=4), 4),
}


async def rows(case: str) -> list[dict[str, Any]]:
    expander, rollouts = CASES[case]()
    await Mcts(expander).search(rollouts)
    head, *nodes = expander.tree.to_rows()
    keep = (
        "id",
        "parent",
        "text",
        "error",
        "n",
        "value_sum",
        "ppm_value",
        "multiplicity",
        "terminal",
        "answer",
        "reward",
        "stdout",
    )
    return [{"rollouts_done": head["rollouts_done"]}, *({k: node[k] for k in keep} for node in nodes)]


@pytest.mark.parametrize("case", CASES)
async def test_search_grows_the_golden_tree(case: str) -> None:
    assert await rows(case) == json.loads(GOLDEN.read_text())[case]


if __name__ == "__main__":
    made = {case: asyncio.run(rows(case)) for case in CASES}
    lines = [f'  "{case}": [\n    ' + ",\n    ".join(json.dumps(row) for row in made[case]) + "\n  ]" for case in made]
    GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n")
