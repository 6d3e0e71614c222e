"""The tree search against an independent reference (reference_mcts.py) on random scripted trees, node by node."""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Callable, Sequence
from functools import cache

import pytest

from rstar.config import SearchSection
from rstar.prompts import step_prompt
from rstar.search.expand import Expander, Tools
from rstar.search.mcts import Mcts
from rstar.tree import Tree
from rstar.types import Generation, PromptText, SamplingParams, TerminalReason
from tests.fakes import LiteralSession, exact_grade, problem
from tests.reference_mcts import Draw, Search, Settings

Script = Callable[[str], tuple[Draw, ...]]
KINDS = {
    None: "live",
    TerminalReason.ANSWER: "answer",
    TerminalReason.CODE_ERROR: "error",
    TerminalReason.MALFORMED: "malformed",
    TerminalReason.MAX_DEPTH: "max_depth",
    TerminalReason.DEAD_END: "dead_end",
}
PUMPED = 16  # turns of the event loop after which nothing moves but what waits for the policy


def random_script(seed: int) -> Script:
    """Draws by the label of the node that they continue; a label that ends with "c" ends the code."""
    rng = random.Random(seed)
    width, depth = rng.randint(1, 5), rng.randint(1, 12)
    failing, right = rng.choice((0.0, 0.1, 0.4)), rng.choice((0.0, 0.3, 0.7, 1.0))
    ppm_values = rng.choice(((0.5,), (-0.5, 0.0, 0.5), tuple(rng.uniform(-1, 1) for _ in range(50))))
    logprobs = rng.choice(((-1.0,), tuple(rng.uniform(-9, 0) for _ in range(50))))

    @cache
    def script(label: str) -> tuple[Draw, ...]:
        own = random.Random(f"{seed} {label}")
        draws: list[Draw] = []
        for i in range(width):
            if draws and own.random() < 0.15:
                draws.append(own.choice(draws))
                continue
            kind, ending = "step", own.random() < (len(label) + 1) / (2 * depth)
            if own.random() < failing:
                kind = own.choice(("error", "malformed"))
            if label.endswith("c"):
                kind, ending = "answer" if kind == "step" else "malformed", False
            draws.append(
                Draw(
                    f"{label}{i}{'c' if ending else ''}",
                    kind,
                    1.0 if own.random() < right else -1.0,
                    own.choice(ppm_values),
                    own.choice(logprobs),
                    own.randint(1, 20),
                )
            )
        return tuple(draws)

    return script


def random_settings(seed: int) -> Settings:
    rng = random.Random(-seed - 1)
    return Settings(
        rollouts=rng.randint(1, 40),
        in_flight=rng.choice((1, 1, 2, 3, 6)),
        guidance=rng.choice(("terminal", "ppm", "ppm", "test")),
        prior_visits=rng.choice((0, 1)),
        c=rng.choice((0.0, 0.5, 2.0, 7.0)),
        selection=rng.choice(("uct", "uct", "puct")),
        unvisited_first=rng.random() < 0.7,
        max_depth=rng.choice((2, 4, 8, 16)),
    )


def labels(text: str) -> list[str]:
    return re.findall(r"node=(\S+)", text)


def text_of(draw: Draw) -> str:
    if draw.kind == "answer":
        return f"So node={draw.label} gives \\boxed{{{'1' if draw.reward > 0 else '0'}}}.<end_of_answer>"
    body = "boom()" if draw.kind == "error" else "x = 1"
    return f"# node={draw.label}\n{body}\n<end_of_{'code' if draw.label.endswith('c') else 'step'}>"


class ScriptedModel:
    """A policy and a scorer that read a script's table. The policy's requests wait until `release` takes their turn."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.waiting: list[asyncio.Future[None]] = []

    async def generate(self, prompt: PromptText, params: SamplingParams) -> list[Generation]:
        turn = asyncio.get_running_loop().create_future()
        self.waiting.append(turn)
        await turn
        at = ["", *labels(prompt.text)][-1]
        cut = [draw.kind == "malformed" for draw in self.script(at)]
        return [
            Generation(text_of(draw), draw.tokens, draw.logprob, stop=None, cut_off=short)
            for draw, short in zip(self.script(at), cut, strict=True)
        ]

    async def score(self, prompt: PromptText, completions: Sequence[Sequence[str]]) -> list[float]:
        wanted = [labels("".join(completion))[-1] for completion in completions]
        found = {draw.label: draw.ppm for draw in self.script(["", *labels(prompt.text)][-1])}
        return [found[label] for label in wanted]

    async def close(self) -> None:
        """Nothing to give back."""


async def searched(script: Script, settings: Settings, choose: Callable[[int], int]) -> Tree:
    model, guided = ScriptedModel(script), settings.guidance != "terminal"
    tools = Tools(
        policy=model,
        scorer=model if guided else None,
        open_session=lambda seed: LiteralSession(),  # type: ignore[arg-type,return-value]
        grade=None if settings.guidance == "test" else exact_grade,
    )
    sampling = SearchSection(
        candidates=8,
        max_depth=settings.max_depth,
        ppm_prior_visits=settings.prior_visits,
    )
    tree = Tree(tree_id="p#0", problem=problem("1"), prompt=step_prompt("Q: q\n").segments)
    unvisited = float("inf") if settings.unvisited_first else 0.0
    mcts = Mcts(Expander(tree, tools, sampling), c=settings.c, selection=settings.selection, unvisited=unvisited)
    search = asyncio.create_task(mcts.search(settings.rollouts, in_flight=settings.in_flight))
    while not search.done():
        for _ in range(PUMPED):
            await asyncio.sleep(0)
        if model.waiting:
            model.waiting.pop(choose(len(model.waiting))).set_result(None)
    await search
    return tree


@pytest.mark.parametrize("block", range(10))
async def test_search_grows_the_trees_of_an_independent_reference(block: int) -> None:
    for seed in range(100 * block, 100 * block + 100):
        script, settings = random_script(seed), random_settings(seed)
        reference = Search(script, settings)
        theirs = [
            (
                node.draw.label,
                node.parent.draw.label if node.parent else None,
                node.kind,
                node.count,
                node.visits,
                node.total,
            )
            for node in reference.run(random.Random(seed).randrange)
        ]
        tree = await searched(script, settings, random.Random(seed).randrange)
        names = ["", *(labels(node.text)[-1] for node in tree.nodes[1:])]
        ours = [
            (
                name,
                None if node.parent is None else names[node.parent],
                KINDS[node.terminal],
                node.multiplicity,
                node.visit_count,
                node.value_sum,
            )
            for name, node in zip(names, tree.nodes, strict=True)
        ]
        assert ours == theirs, (seed, settings)
        assert tree.rollouts_done == reference.started and not any(node.virtual_losses for node in tree.nodes)


def test_random_trees_hold_every_kind_of_node_and_walks_that_meet() -> None:
    """What the comparison above would miss otherwise."""
    kinds: set[str] = set()
    ties = met = 0
    for seed in range(200):
        script, settings = random_script(seed), random_settings(seed)
        reference = Search(script, settings)
        select = reference.select

        def counted(parent, reference=reference, select=select):
            nonlocal met
            met += parent.walks > 1
            return select(parent)

        reference.select = counted  # type: ignore[method-assign]
        nodes = reference.run(random.Random(seed).randrange)
        kinds |= {node.kind for node in nodes}
        ties += any(node.count > 1 for node in nodes)
    assert kinds == set(KINDS.values()) and ties > 50 and met > 200
