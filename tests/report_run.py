"""A run made by hand, without any model, for the tests of what a person sees of one."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rstar.evaluation import Candidate, EvalRecord, measures
from rstar.manifest import RoundDir, RunDir
from rstar.store import TreeWriter, write_json
from rstar.tree import Tree
from rstar.types import Problem, TerminalReason

HOSTILE = "</script><script>alert(1)</script><!-- <img src=x onerror=alert(2)> \u2028 {{DATA}}"
STEP, ANSWER = "<end_of_step>", "<end_of_answer>"


def small_tree(problem_id: str, *, solved: bool, level: str = "1", seed: int = 0) -> Tree:
    """root -> 1 (good) -> 3 answer 7 (right only if `solved`), 4 answer 5 (wrong); root -> 2 code error."""
    problem = Problem(problem_id, f"What is 3 + 4? {problem_id}", "7", level=level)
    tree = Tree(f"{problem_id}#{seed}", problem, ("Q",), searcher="mcts", rollouts_done=2, tokens=100, complete=True)
    first = tree.add_child(tree.root, text=f"# add\nx = 3 + 4\n{STEP}", code="# add\nx = 3 + 4\n", stdout="noise\n")
    first.ppm_value = 0.25
    tree.add_child(
        tree.root, text=f"x = y\n{STEP}", code="x = y\n", error="NameError: y", terminal=TerminalReason.CODE_ERROR
    )
    for answer, right, times in (("7", True, 1), ("5", False, 2)):
        if right and not solved:
            answer, right = "6", False
        leaf = tree.add_child(first, text=f"So \\boxed{{{answer}}}.\n{ANSWER}", terminal=TerminalReason.ANSWER)
        leaf.answer, leaf.reward, leaf.multiplicity = answer, 1.0 if right else -1.0, times
        tree.backpropagate(leaf, leaf.reward)
    return tree


def search(folder: RoundDir, trees: list[Tree], levels: dict[str, list[int]]) -> None:
    with TreeWriter(folder.trees / "trees-a.jsonl.zst") as writer:
        for tree in trees:
            writer.append(tree)
    counts = {
        "solved_by_level": levels,
        "outcomes": {"live": 3, "answer": 6, "code_error": 3},
        "trees": len(trees),
        "rollouts": 2 * len(trees),
        "tokens": 100 * len(trees),
    }
    finish(folder, "search", counts, 90.0, {"search": {"rollouts": 2 * folder.number}, "model": {"base": "some/model"}})


def finish(folder: RoundDir, stage: str, counts: dict[str, Any], seconds: float, settings: Any = None) -> None:
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.finish(stage, settings=settings or {}, inputs={}, outputs=[], counts=counts, seconds=seconds)


def evaluate(folder: RoundDir, right: dict[str, int]) -> None:
    """`right[method]` of four held-out problems are right, the first ones."""
    methods = {}
    for method, n in right.items():
        records = [
            EvalRecord(f"h{i}", str(1 + i % 2), "", (Candidate("1", 0.5, 1, i < n),), 1, 10, 1, 0.1) for i in range(4)
        ]
        methods[method] = {
            "measures": {name: asdict(m) for name, m in measures(method, records).items()},
            "tokens": 40,
            "records": [asdict(record) for record in records],
        }
    write_json(folder.eval_json, {"round": folder.number, "methods": methods})
    finish(folder, "eval", {}, 30.0, {"eval": {"trajectories": 1}})


def trained(rows: int, first: float, last: float) -> dict[str, Any]:
    return {"rows": rows, "steps": 5, "tokens": 999, "first_loss": first, "last_loss": last, "mean_loss": last}


def make_run(folder: Path) -> Path:
    """A base with warm-up, a whole round 1, and round 2 after its search stage."""
    run = RunDir(folder)
    base, one, two = run.round(0), run.round(1), run.round(2)
    finish(base, "base", trained(20, 2.0, 1.5), 60.0, {"warmup": {"enabled": True, "rows": 0, "source": "own"}})
    evaluate(base, {"greedy": 1})
    first, second, third = (small_tree(f"p-{i}", solved=i == 1, level="2" if i == 2 else "1") for i in (1, 2, 3))
    search(one, [first, second, third], {"1": [1, 2], "2": [0, 1], "all": [1, 3]})
    one.pairs.write_text(json.dumps({"tree_id": "p-1#0", "node_ids": [3, 4]}) + "\n")
    finish(one, "extract", {"sft_rows": 11, "pairs": 17}, 1.0)
    finish(one, "policy", trained(11, 1.25, 0.5), 120.0)
    pairs = {"pairs": 8, "accuracy": 0.625, "loss": 0.6, "calibration_error": 0.1}
    finish(one, "ppm", {"training": trained(17, 0.693, 0.25), "heldout_before": pairs, "heldout_after": pairs}, 60.0)
    (one.path / "policy-metrics.jsonl").write_text("".join(f'{{"step": {i}, "loss": {2 - i}}}\n' for i in range(2)))
    evaluate(one, {"greedy": 2, "mcts": 3})
    second = small_tree("p-2", solved=True, level="2")
    search(two, [first, second, third], {"1": [1, 2], "2": [1, 1], "all": [2, 3]})
    return run.path


def make_hostile(run: Path) -> None:
    """HOSTILE wherever a file of the run's rounds can say something, and a tree that says nothing else."""
    two = RoundDir(run, 2)
    tree = small_tree(HOSTILE, solved=True, level=HOSTILE)
    for node in tree.nodes[1:]:
        node.text = node.stdout = node.error = HOSTILE
        node.answer = HOSTILE if node.answer else None
    counts = {HOSTILE: [1, 1], "all": [1, 1]}
    with TreeWriter(two.trees / "trees-a.jsonl.zst") as writer:
        writer.append(tree)
    finish(two, "search", {"solved_by_level": counts, "outcomes": {HOSTILE: 3}, "trees": 1, "tokens": 5}, 1.0,
            {HOSTILE: {HOSTILE: HOSTILE}, "model": {"base": HOSTILE}})  # fmt: skip
    finish(RoundDir(run, 1), "search", {"solved_by_level": counts, "tokens": 1}, 1.0, {"model": {"base": HOSTILE}})
