"""Flow-DPO: golden cases of the worked chain and of the loss, adapters, the online stream, a whole tiny run."""

from __future__ import annotations

import asyncio
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rstar import store
from rstar.config import DpoSection, EngineSection, SearchSection
from rstar.engines.base import ContextOverflow
from rstar.engines.hf import HfPolicy
from rstar.engines.simulated import SimulatedPolicy
from rstar.extract.flow_pairs import chain, flow_outcome, flow_pairs
from rstar.prompts import split_stop_question
from rstar.recipes import load_config
from rstar.recipes.flow_dpo import stop_rows
from rstar.recipes.flow_dpo.compile import judge
from rstar.recipes.flow_dpo.passes import single_pass
from rstar.recipes.flow_dpo.stream import committed, read_stream, stream
from rstar.recipes.flow_dpo.tables import margin_table, progressive_accuracy, progressive_curve
from rstar.recipes.rows import reference_rows
from rstar.report.results import results, results_table
from rstar.search.expand import Expander, Tools
from rstar.search.flow import flow
from rstar.store import TreeWriter, complete_or_absent, read_trees, shards
from rstar.tokens import question_wrapper
from rstar.training.dpo import AdapterTrainer, dpo_losses, encode_pair
from rstar.tree import Tree
from rstar.types import Generation, PreferenceRow, Problem, PromptText, SamplingParams, TerminalReason, UserError
from tests.fakes import LiteralSession, answer, exact_grade, execute_stages, finish, problem, step

CONFIG = "configs/flow_dpo/tiny.yaml"
ROOT = Path(__file__).parent.parent
ASKED = "Is this the complete"
Script = Callable[[str, int, int], str]


def grow(
    script: Script, *, chunks: int = 6, tokens: int = 1000, form: Literal["text", "steps"] = "text", **options: object
) -> Tree:
    """A flow's tree over scripted models; tokens are characters."""
    tools = Tools(
        policy=SimulatedPolicy(script, count_tokens=len),
        scorer=None,
        open_session=lambda seed: LiteralSession(),  # type: ignore[arg-type,return-value]
        grade=exact_grade,
    )
    tree = Tree(tree_id="p#0", problem=problem("1"), prompt=("Q: q\n",), searcher="flow")
    tree.settings["stop_borders"] = split_stop_question(lambda text: f"[{text}]", "q")
    sampling = SearchSection(
        method="flow", candidates=3, temperature=1.0, form=form, max_depth=chunks, max_step_tokens=tokens
    )
    asyncio.run(flow(Expander(tree, tools, sampling), **options))  # type: ignore[arg-type]
    return tree


def solution(prompt: str) -> str:
    """The partial solution that a prompt of either model holds."""
    if ASKED in prompt:
        return prompt.partition("Solution so far:\n")[2].partition(f"\n\n{ASKED}")[0]
    return prompt.removeprefix("Q: q\n")


def worked(prompt: str, seed: int, index: int) -> str:
    """a1 "first ", s1 No, a2 "answer: 1", s2 Yes; a1' ends wrong, a2' right; after s2's flip the answer is spoilt."""
    done = solution(prompt)
    if ASKED in prompt:
        return "Yes" if "answer" in done else "No"
    if not done:
        return "first " if index == 0 else "other "
    if "answer" in done:
        return ", no. answer: 3"
    return ("answer: 1" if index == 0 else "the answer: 1") if done == "first " else "answer: 2"


def test_the_worked_chain_gives_one_answer_pair_and_two_stop_pairs() -> None:
    tree = grow(worked)
    base = chain(tree, tree.root)
    assert [(n.role, n.text) for n in base[1:]] == [
        ("answer", "first "), ("stop", "No"), ("answer", "answer: 1"), ("stop", "Yes"),
    ]  # fmt: skip
    assert flow_outcome(tree).correct and flow_outcome(tree).stopped and flow_outcome(tree).chunks == 2
    rows = flow_pairs(tree)
    assert [(r.kind, r.chosen, r.rejected) for r in rows] == [
        ("answer", "first ", "other "), ("stop", "No", "Yes"), ("stop", "Yes", "No"),
    ]  # fmt: skip
    assert rows[0].prompt == "Q: q\n"
    assert [solution(r.prompt) for r in rows[1:]] == ["first ", "first answer: 1"]
    assert all(len(tree.children(node)) <= 2 for node in tree.nodes)


def test_a_right_deviation_of_a_wrong_base_is_the_chosen_one() -> None:
    def script(prompt: str, seed: int, index: int) -> str:
        return "Yes" if ASKED in prompt else f"answer: {index}"

    (row,) = flow_pairs(grow(script))
    assert (row.kind, row.chosen, row.rejected) == ("answer", "answer: 1", "answer: 0")


def test_a_deviation_that_is_identical_to_the_original_is_rejected() -> None:
    def script(prompt: str, seed: int, index: int) -> str:
        return "Yes" if ASKED in prompt else "answer: 1. "

    tree = grow(script)
    assert len(tree.root.children) == 1  # no other text was drawn
    assert [(r.kind, r.chosen) for r in flow_pairs(tree)] == []
    assert tree.rollouts_done == 2  # the base chain and the flipped Yes


def test_a_chunk_as_long_as_the_answer_leaves_one_answer_node_and_a_limit_cuts_into_pieces() -> None:
    def script(prompt: str, seed: int, index: int) -> str:
        whole = "a long way to answer: 1"
        return ("Yes" if whole in prompt else "No") if ASKED in prompt else whole.removeprefix(solution(prompt))

    assert flow_outcome(grow(script)).chunks == 1
    tree = grow(script, tokens=6, deviations=False)
    pieces = [node for node in tree.nodes if node.role == "answer"]
    assert [node.text for node in pieces] == ["a long", " way t", "o answ", "er: 1"] and tree.solved
    assert [node.meta.get("ended", False) for node in pieces] == [False, False, False, True]


def test_the_last_piece_counts_as_the_answer_so_far_and_stop_is_not_asked_about_it() -> None:
    def script(prompt: str, seed: int, index: int) -> str:
        return "No" if ASKED in prompt else "answer: 1. "

    tree = grow(script, chunks=6)
    base = chain(tree, tree.root)
    assert [n.role for n in base[1:]] == ["answer", "stop"] * 5 + ["answer"]  # 11 outputs, at most 12
    assert base[-1].terminal is TerminalReason.ANSWER and tree.solved and not flow_outcome(tree).stopped
    assert (
        grow(lambda p, s, i: "No" if ASKED in p else "hm ", chunks=2, deviations=False).nodes[-1].terminal
        is TerminalReason.MAX_DEPTH
    )


def test_an_empty_piece_ends_the_flow_and_an_unreadable_word_is_a_no() -> None:
    def script(prompt: str, seed: int, index: int) -> str:
        return "Maybe" if ASKED in prompt else "" if solution(prompt) else "answer: 1"

    tree = grow(script, deviations=False)
    assert [n.text for n in tree.nodes[1:]] == ["answer: 1", "No", ""] and tree.solved
    assert tree.nodes[2].meta["written"] == "Maybe" and tree.nodes[2].logprob is None


@pytest.mark.parametrize("full", range(1, 6))
def test_a_full_context_ends_that_flow_and_no_stage(full: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever call it is at: of the Answer model, of the Stop model, in the base chain or in a deviation."""
    generate, seen = SimulatedPolicy.generate, dict[str, None]()

    async def overflowing(self: SimulatedPolicy, prompt: PromptText, params: SamplingParams) -> list[Generation]:
        seen.setdefault(prompt.text)
        if list(seen).index(prompt.text) == full - 1:
            raise ContextOverflow("3 tokens of prompt", need="room", how="less")
        return await generate(self, prompt, params)

    monkeypatch.setattr(SimulatedPolicy, "generate", overflowing)
    tree = grow(worked)
    assert len(seen) >= full and tree.rollouts_done and flow_outcome(tree).chunks >= 0
    ends = [node for node in tree.nodes if not node.children]
    assert ends and all(node.terminal is not None and node.reward is not None for node in ends)
    assert all(row.chosen and row.rejected for row in flow_pairs(tree))
    if full == 1:
        (end,) = ends  # no deviation has room either
        assert (end.terminal, end.reward, end.text) == (TerminalReason.DEAD_END, -1.0, "")


def test_code_steps_flow_too_and_end_with_the_answer_step() -> None:
    def script(prompt: str, seed: int, index: int) -> str:
        done = solution(prompt).removeprefix("<code>\n")
        if ASKED in prompt:
            return "No"
        if not done:
            return step(1, "x = 1")
        if "end_of_code" not in done:
            return finish("1") if index == 0 else finish("2")
        return answer("2" if "print('2')" in done else "1")

    tree = grow(script, form="steps")
    base = chain(tree, tree.root)
    assert [n.role for n in base[1:]] == ["answer", "stop", "answer", "stop", "answer"] and tree.solved
    rows = flow_pairs(tree)
    assert [(r.kind, r.chosen_segments) for r in rows if r.kind == "answer"] == [("answer", (finish("1") + "\n",))]
    assert "<output>1<end_of_output>" in rows[-1].prompt
    flipped = [r for r in rows if r.kind == "stop"]  # Yes before the answer step leaves no answer
    assert [(r.chosen, r.rejected) for r in flipped] == [("No", "Yes"), ("No", "Yes")]


def test_trees_of_flows_survive_the_disk_and_do_not_depend_on_what_was_ready_first() -> None:
    rows = list(grow(worked).to_rows())
    assert [flow_pairs(Tree.from_rows(rows))] == [flow_pairs(grow(worked))]
    assert [row["id"] for row in rows[1:]] == list(range(len(rows) - 1))
    assert all(row["parent"] is None or row["parent"] < row["id"] for row in rows[1:])


# -- the numbered choices that no other test here pins ----------------------------------------------------------------


def config_of(*overrides: str) -> Any:
    return load_config(str(ROOT / CONFIG), list(overrides))[1]


def test_f2_the_chain_is_greedy_by_default_and_deviations_are_drawn() -> None:
    asked: list[tuple[float, int]] = []

    class Watched(SimulatedPolicy):
        async def generate(self, prompt: PromptText, params: SamplingParams) -> list[Any]:
            asked.append((params.temperature, params.n))
            return await super().generate(prompt, params)

    for temperature in (0.0, 0.7):
        asked.clear()
        tools = Tools(Watched(worked, count_tokens=len), None, lambda seed: LiteralSession(), exact_grade)  # type: ignore[arg-type,return-value]
        tree = Tree(tree_id="p#0", problem=problem("1"), prompt=("Q: q\n",))
        tree.settings["stop_borders"] = split_stop_question(str, "q")
        sampling = SearchSection(
            method="flow", candidates=3, temperature=1.0, form="text", max_depth=6, max_step_tokens=1000
        )
        asyncio.run(flow(Expander(tree, tools, sampling), chain_temperature=temperature))
        assert {t for t, n in asked if n == 1} == {temperature} and [t for t, n in asked if n == 3] == [1.0, 1.0]


def test_f4_f5_f6_switches_of_the_paper_are_the_defaults() -> None:
    config = load_config(str(ROOT / "configs/flow_dpo/paper.yaml"), [])[1]
    assert (config.dpo.beta, config.dpo.learning_rate, config.dpo.batch_size, config.flow.window) == (1.0, 5e-6, 32, 1)
    assert (config.search.max_step_tokens, config.search.max_depth, config.compile.problems) == (160, 6, 1500)
    assert (config.sft.lora_rank, config.sft.lora_alpha, config.sft.epochs, config.sft.learning_rate) == (
        16,
        16,
        3,
        2e-4,
    )
    assert (config.dpo.lora_rank, config.dpo.lora_alpha, config.dpo.lora_dropout) == (8, 8, 0.05)
    assert (config.dpo, config.sft.batch_size) == (DpoSection(), 16)


def test_f8_single_model_and_flow_have_the_same_room(tmp_path: Path) -> None:
    one = single_pass(config_of().search, tmp_path).search
    assert (one.max_depth, one.max_step_tokens, one.deviations, one.seeds) == (1, 48, False, [0])
    drawn = single_pass(config_of().search, tmp_path, samples=3).search
    assert (drawn.seeds, drawn.chain_temperature) == ([0, 1, 2], 1.0)
    steps = single_pass(config_of("search.form=steps").search, tmp_path).search
    assert (steps.method, steps.temperature, steps.max_step_tokens) == ("sample", 0.0, 12)


@pytest.mark.parametrize(
    "wrong",
    [
        "search.method=mcts",
        "rounds.r2.search.method=mcts",
        "search.form=stated",
        "warmup.source=gsm8k",
        "engine.kind=openai",
        "flow.window=0",
        "compile.judged=3",
        "problems.families.sums.heldout=0",
    ],
)
def test_a_config_that_cannot_work_is_refused_before_a_model_is_loaded(wrong: str, tmp_path: Path) -> None:
    recipe, config = load_config(str(ROOT / CONFIG), [wrong, f"run.dir={tmp_path}"])
    with pytest.raises(UserError):
        recipe.check(config)


def test_f9_the_warm_up_says_yes_after_a_whole_solution_and_no_after_a_part(tiny_model: Path) -> None:
    one = Problem("sums/0", "State the final answer: 12 + 7 - 4 =", "15", "chain_sum")
    config, base = config_of(), str(tiny_model)
    (solution,) = reference_rows([one], "text", config.sandbox, question_wrapper(base, config.model))
    assert solution.completion.splitlines()[1:] == ["subtract the next number: 19 - 4 = 15", "#### 15"]
    yes, no = stop_rows(base, config.model, solution, one)
    assert (yes.completion, no.completion) == ("Yes", "No")
    parts = ["".join(row.prompt_segments[1:-1]) for row in (yes, no)]
    assert parts[0] == solution.completion and parts[0].startswith(parts[1]) and 0 < len(parts[1]) < len(parts[0])
    assert one.question in yes.prompt and yes.prompt_segments[0] == no.prompt_segments[0]


# -- the loss and the adapters ---------------------------------------------------------------------------------------


def test_dpo_losses_of_the_golden_case() -> None:
    def loss(policy: tuple[float, float], reference: tuple[float, float], beta: float) -> float:
        chosen, rejected = (torch.tensor([p - r]) for p, r in zip(policy, reference, strict=True))
        return float(dpo_losses(chosen, rejected, beta=beta))

    assert loss((-10, -12), (-10, -12), 1.0) == pytest.approx(math.log(2), abs=1e-6)
    assert loss((-10, -12), (-11, -11.5), 1.0) == pytest.approx(0.201413, abs=1e-6)
    assert loss((-10, -12), (-11, -11.5), 0.1) == pytest.approx(0.620957, abs=1e-6)


QUICK = DpoSection(dtype="float32", learning_rate=1e-2, micro_batch_tokens=64, batch_size=2)
PAIRS = [
    PreferenceRow(
        "", "", "", ("Q: one?\n", "Sum "), ("2 apples",), ("3 pears",), 2.0, 1.0, "answer", "p", "t", (1, 2), True
    ),
    PreferenceRow("", "", "", ("Q: two?\n",), ("It is 4.",), (), 2.0, 1.0, "answer", "p", "t", (1, 2), False, True),
]  # fmt: skip


def weights(trainer: AdapterTrainer, adapter: str) -> list[torch.Tensor]:
    return [value.detach().clone() for value in trainer.parameters(adapter)]


@pytest.fixture(scope="module")
def trainer(tiny_model: Path) -> AdapterTrainer:
    return AdapterTrainer(str(tiny_model), ["answer", "stop"], QUICK, seed=3)


def test_a_step_of_one_adapter_leaves_the_other_and_the_base_bit_identical(tiny_model: Path) -> None:
    trainer = AdapterTrainer(str(tiny_model), ["answer", "stop"], QUICK, seed=3)
    for moved, still in (("answer", "stop"), ("stop", "answer")):
        before, other, base = weights(trainer, moved), weights(trainer, still), trainer.logprobs(None, PAIRS)
        result = trainer.step(moved, PAIRS)
        assert result.loss == pytest.approx(math.log(2), abs=1e-5) and result.margin == pytest.approx(0, abs=1e-5)
        assert any(not a.equal(b) for a, b in zip(before, weights(trainer, moved), strict=True))
        assert all(a.equal(b) for a, b in zip(other, weights(trainer, still), strict=True))
        assert trainer.logprobs(None, PAIRS) == base
    for _ in range(3):
        trainer.step("answer", PAIRS)
    found = trainer.margins("answer", PAIRS)
    assert found.margin > 0.5 and found.accuracy == 1.0 and trainer.steps == {"answer": 4, "stop": 1}


def test_log_probabilities_are_those_of_plain_transformers(trainer: AdapterTrainer, tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    encoder, found = trainer.encoder, trainer.logprobs(None, PAIRS)
    for row, pair in zip(PAIRS, found, strict=True):
        sides = ((row.chosen_segments, row.chosen_ends), (row.rejected_segments, row.rejected_ends))
        for value, (segments, ends) in zip(pair, sides, strict=True):
            start = len(encoder.encode(row.prompt_segments))
            ids = encoder.encode((*row.prompt_segments, *segments)) + [encoder.tokenizer.eos_token_id] * ends
            with torch.no_grad():
                logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            expected = sum(float(logprobs[i - 1, ids[i]]) for i in range(start, len(ids)))
            assert value == pytest.approx(expected, abs=1e-3)


def test_a_checkpoint_goes_on_to_the_same_weights(tiny_model: Path, tmp_path: Path) -> None:
    through = AdapterTrainer(str(tiny_model), ["answer", "stop"], QUICK, seed=3)
    through.step("answer", PAIRS)
    through.save(tmp_path / "step-1")
    through.step("answer", PAIRS)
    through.step("stop", PAIRS)
    again = AdapterTrainer(str(tiny_model), ["answer", "stop"], QUICK, seed=4)
    again.load(tmp_path / "step-1")
    again.seed = 3
    again.step("answer", PAIRS)
    again.step("stop", PAIRS)
    for name in ("answer", "stop"):
        assert all(a.equal(b) for a, b in zip(weights(through, name), weights(again, name), strict=True))


def test_served_log_probabilities_change_with_an_update_and_are_the_trainers(tiny_model: Path, tmp_path: Path) -> None:
    trainer = AdapterTrainer(str(tiny_model), ["answer", "stop"], QUICK, seed=3)
    prompt = PromptText(PAIRS[0].prompt_segments)

    async def served() -> list[list[float]]:
        engine = HfPolicy(str(tiny_model), EngineSection(dtype="float32", max_context=128, cache_mib=16))
        rounds = []
        for number in range(2):
            trainer.save(tmp_path / f"step-{number}")
            for name in ("answer", "stop"):
                engine.load_adapter(name, str(tmp_path / f"step-{number}" / name))
            values = []
            for adapter in ("answer", "stop", None):
                params = SamplingParams(n=16, max_tokens=2, top_p=0.5, adapter=adapter)
                compared = 0
                for said in await engine.generate(prompt, params):
                    row = replace(PAIRS[0], chosen_segments=(said.text,), chosen_ends=not said.cut_off)
                    if len(trainer.encoder.encode((said.text,))) + row.chosen_ends == said.tokens:
                        assert trainer.logprobs(adapter, [row])[0][0] == pytest.approx(said.logprob, abs=1e-3)
                        compared += 1
                assert compared > 1  # the others are texts that read back as other tokens
                (one,) = await engine.generate(prompt, replace(params, n=1, temperature=0))
                values.append(one.logprob)
            rounds.append(values)
            for _ in range(4):
                trainer.step("answer", PAIRS)
        await engine.close()
        return rounds

    before, after = asyncio.run(served())
    assert before[0] == pytest.approx(before[2], abs=1e-4)  # a fresh adapter is the base
    assert abs(after[0] - before[0]) > 1e-2 and after[1:] == pytest.approx(before[1:], abs=1e-5)


def test_pairs_that_are_too_long_are_dropped_and_counted(trainer: AdapterTrainer, monkeypatch: Any) -> None:
    whole = [encode_pair(pair, trainer.encoder, 1000) for pair in PAIRS]
    longest = max(max(len(pair.chosen), len(pair.rejected)) for pair in whole if pair is not None)
    kept = [encode_pair(pair, trainer.encoder, longest - 1) for pair in PAIRS]
    assert None not in whole and 0 < kept.count(None) < len(PAIRS)
    monkeypatch.setattr(trainer, "section", replace(trainer.section, max_length=longest - 1))
    step = trainer.step("answer", PAIRS)
    assert (step.pairs, step.dropped) == (len(PAIRS) - kept.count(None), kept.count(None))
    monkeypatch.setattr(trainer, "section", replace(trainer.section, max_length=4))
    with pytest.raises(UserError, match=r"rows are longer than dpo\.max_length=4"):
        trainer.step("answer", PAIRS)


# -- the stream ------------------------------------------------------------------------------------------------------


class Memory:
    """A learner that remembers what it has stepped on; its checkpoints are lists of problems."""

    def __init__(self) -> None:
        self.steps = {"answer": 0, "stop": 0}
        self.known: set[str] = set()
        self.batches: list[list[str]] = []

    def step(self, adapter: str, rows: Sequence[PreferenceRow]) -> dict[str, float]:
        self.steps[adapter] += 1
        self.known |= {row.problem_id for row in rows}
        self.batches.append([row.problem_id for row in rows])
        return {"loss": 1.0, "step": float(sum(self.steps.values()))}

    def save(self, folder: Path) -> None:
        with complete_or_absent(folder) as temporary:
            (temporary / "known.json").write_text(json.dumps([sorted(self.known), self.steps]))

    def load(self, folder: Path) -> None:
        known, self.steps = json.loads((folder / "known.json").read_text())
        self.known = set(known)


class Memorised:
    """Searches with a model that solves exactly the problems its served checkpoint has learned from.

    `stored`: the trees of earlier attempts by problem, which are not grown again; None: nothing is stored.
    """

    def __init__(self, stored: dict[str, Tree] | None = None) -> None:
        self.served: set[str] = set()
        self.searched: list[str] = []
        self.stored = stored

    async def serve(self, folder: Path) -> None:
        self.served = set(json.loads((folder / "known.json").read_text())[0])

    async def search(self, one: Problem) -> Tree:
        if self.stored and one.id in self.stored:
            return self.stored[one.id]
        self.searched.append(one.id)
        known = one.id in self.served

        def script(prompt: str, seed: int, index: int) -> str:
            return "Yes" if ASKED in prompt else f"answer: {int(known) if index == 0 else int(not known)}"

        tree = await asyncio.to_thread(grow, script)
        tree.problem, tree.tree_id, tree.complete = one, f"{one.id}#0", True
        if self.stored is not None:
            self.stored[one.id] = tree
        return tree


def run_stream(
    folder: Path, problems: Sequence[Problem], stored: dict[str, Tree] | None = None, **options: Any
) -> tuple[Memory, Memorised]:
    learner, world = Memory(), Memorised(stored)
    asyncio.run(stream(problems, world.search, learner, world.serve, folder, **{"window": 1, "batch": 2, **options}))
    return learner, world


SOME = [problem("1", id=f"p{k}") for k in range(7)]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("window", [1, 3])
def test_a_model_that_memorises_gains_nothing_in_progressive_accuracy(
    tmp_path: Path, window: int, overlap: bool
) -> None:
    run_stream(tmp_path, SOME, window=window, batch=1, overlap=overlap)
    predictions, steps = read_stream(tmp_path)
    assert [p.problem_id for p in predictions] == [p.id for p in SOME] and len(steps) == 7
    assert not any(p.correct for p in predictions)  # predicting after the update would make all of them right
    first = [p.number // window * window for p in predictions]
    older = [max(0, n - window) for n in first] if overlap else first
    assert [p.learned for p in predictions] == older
    assert [p.staleness for p in predictions] == [p.number - n for p, n in zip(predictions, older, strict=True)]
    _, again = run_stream(tmp_path / "twice", [*SOME, *SOME], batch=1)
    assert [p.correct for p in read_stream(tmp_path / "twice")[0]] == [False] * 7 + [True] * 7
    assert len(again.searched) == 14


def test_pairs_wait_for_a_full_batch_and_survive_a_restart(tmp_path: Path) -> None:
    learner, _ = run_stream(tmp_path, SOME[:3], batch=4)
    assert not learner.batches
    learner, world = run_stream(tmp_path, SOME, batch=4)
    assert world.searched == ["p3", "p4", "p5", "p6"] and learner.batches == [["p0", "p1", "p2", "p3"]]
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-000001"]


def test_what_a_kill_left_behind_is_cut_and_the_record_has_no_gap_and_no_double(tmp_path: Path) -> None:
    run_stream(tmp_path, SOME[:4], batch=2)
    committed = {path: path.read_bytes() for path in tmp_path.glob("stream.*")}
    run_stream(tmp_path, SOME[:6], batch=2)
    lines = (tmp_path / "stream.jsonl").read_bytes()
    checkpoint = json.loads(committed[tmp_path / "stream.json"])["checkpoint"]
    (tmp_path / checkpoint).mkdir(exist_ok=True)  # the commit point was not replaced yet when the kill came
    (tmp_path / checkpoint / "known.json").write_text(json.dumps([["p0", "p1", "p2", "p3"], {"answer": 2, "stop": 0}]))
    (tmp_path / "stream.json").write_bytes(committed[tmp_path / "stream.json"])
    (tmp_path / "stream.jsonl").write_bytes(lines + b'{"number": 6, "prob')
    _, world = run_stream(tmp_path, SOME, batch=2)
    predictions, steps = read_stream(tmp_path)
    assert [p.number for p in predictions] == list(range(7)) and [p.problem_id for p in predictions] == [
        p.id for p in SOME
    ]
    assert world.searched == ["p4", "p5", "p6"] and [s["step"] for s in steps] == [1, 2, 3]


class Killed(Exception):
    """Stands for the end of the process."""


def killing_at(number: int) -> Callable[[str, Path], None]:
    """In place of store.reached: the process ends at that point of a write, counted from 0."""
    points = iter(range(number + 1))

    def reached(point: str, path: Path) -> None:
        if next(points, None) == number:
            raise Killed

    return reached


@pytest.mark.parametrize("overlap", [False, True])
def test_a_stream_that_is_killed_at_any_write_ends_with_the_record_of_one_that_never_was(
    tmp_path: Path, overlap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"window": 2, "batch": 2, "overlap": overlap}
    run_stream(tmp_path / "whole", SOME, **options)
    whole = read_stream(tmp_path / "whole")
    for kills in range(1000):
        folder, stored = tmp_path / f"killed-{kills}", dict[str, Tree]()
        monkeypatch.setattr(store, "reached", killing_at(kills))
        try:
            run_stream(folder, SOME, stored, **options)
            break
        except Killed:
            run_stream(folder, SOME, stored, **options)
        assert read_stream(folder) == whole and committed_trees(folder, stored) == 7
    assert kills > 30


def committed_trees(folder: Path, stored: dict[str, Tree]) -> int:
    """`committed`, with the trees of a stream in a shard as a search worker leaves them."""
    with TreeWriter(folder / "trees-w0.jsonl.zst") as writer:
        for tree in stored.values():
            writer.append(tree)
    return committed(folder)


def flip(path: Path) -> None:
    """Damage a file without changing its size."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder, step: flip(folder / "stream.jsonl"),
        lambda folder, step: (folder / "stream.jsonl").unlink(),
        lambda folder, step: flip(step / "known.json"),
        lambda folder, step: (step / "known.json").unlink(),
        lambda folder, step: shards(folder)[0].unlink(),  # as a stage does that begins with other settings
    ],
)
def test_a_commit_point_that_counts_what_is_damaged_or_missing_is_void_and_the_stream_begins_anew(
    tmp_path: Path, damage: Callable[[Path, Path], None]
) -> None:
    stored = dict[str, Tree]()
    run_stream(tmp_path, SOME[:4], stored)
    assert committed_trees(tmp_path, stored) == 4
    damage(tmp_path, tmp_path / json.loads((tmp_path / "stream.json").read_text())["checkpoint"])
    assert committed(tmp_path) == 0 and not list(tmp_path.iterdir())


def test_progressive_accuracy_of_the_golden_outcomes() -> None:
    found = progressive_accuracy([True, False, True, True])
    assert [round(value, 4) for value in found] == [1.0, 0.5, 0.6667, 0.75]
    points = progressive_curve({"flow": [True, False] * 50})["series"]["flow"]
    assert len(points) == 12 and points[-1][:2] == [100, 0.5]


def test_an_adapter_without_held_out_pairs_is_shown_with_none() -> None:
    (row,) = margin_table({}, {"answer": 3}, 0.0)["rows"]
    assert row == ["answer", "3", "0", "-", "-", "-", "-", "-"]


def test_a_judge_that_prefers_what_comes_first_gives_ties() -> None:
    def script(prompt: str, seed: int, index: int) -> str:
        first = prompt.index("good") < prompt.index("bad") if "bad" in prompt else True
        return "Both try. Verdict: " + ("A" if first else "B") if "bad" in prompt else "**Verdict: A**"

    policy = SimulatedPolicy(script)
    duels = [("q", "good", "bad"), ("q", "bad", "good"), ("q", "good", "good")]
    assert asyncio.run(judge(policy, duels)) == {"won": 1, "lost": 1, "tied": 1}


# -- the whole recipe on a toy model ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished tiny run whose stream was killed in its middle."""
    folder = tmp_path_factory.mktemp("runs") / "flow"
    recipe, config = load_config(str(ROOT / CONFIG), [f"run.dir={folder}"])
    recipe.check(config)
    execute_stages(recipe, config, lambda stage: stage.round.number <= 0)
    call = recipe.stages(config, 1)[0].start()
    process = subprocess.Popen(
        [sys.executable, "-m", "rstar", "stage", str(call)], cwd=ROOT, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    record = folder / "round_01" / "stream.json"
    deadline = time.monotonic() + 300
    while not record.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = json.loads(record.read_text())["problems"]
    before = read_stream(record.parent)[0]
    execute_stages(recipe, config, lambda stage: stage.round.number <= 2)
    assert done in (4, 8) and read_stream(record.parent)[0][:done] == before
    return folder


@pytest.mark.slow
def test_the_stream_went_on_after_the_kill_without_gap_or_double_and_moved_both_adapters(run: Path) -> None:
    here = run / "round_01"
    predictions, steps = read_stream(here)
    assert [p.number for p in predictions] == list(range(12))
    assert [p.learned for p in predictions] == [0] * 4 + [4] * 4 + [8] * 4
    for role in ("answer", "stop"):
        numbers = [one["step"] for one in steps if one["adapter"] == role]
        assert numbers == list(range(1, len(numbers) + 1)) and numbers
    assert len(list(read_trees(here))) == 12 and len(list(here.glob("step-*"))) <= 2
    adapters = here / json.loads((here / "stream.json").read_text())["checkpoint"]
    for role in ("answer", "stop"):
        found = load_file(adapters / role / "adapter_model.safetensors")
        assert any(value.abs().max() > 0 for name, value in found.items() if "lora_B" in name), role


@pytest.mark.slow
def test_the_run_reports_curves_margins_and_arms_of_equal_size(run: Path) -> None:
    evaluated = json.loads((run / "round_01" / "eval.json").read_text())
    (curve,) = evaluated["curves"]
    assert set(curve["series"]) == {"trained flow", "frozen flow", "single model"}
    predictions, _ = read_stream(run / "round_01")
    assert curve["series"]["trained flow"][-1][:2] == [12, sum(p.correct for p in predictions) / 12]
    text = results_table(results(run))
    for title in ("round 1: Flows", "round 1: Reward margins", "round 2: Compiled models"):
        assert title in text
    files = {arm: run / "round_02" / f"{arm}.jsonl" for arm in ("reference", "self", "flow")}
    rows = {arm: [json.loads(line) for line in path.read_text().splitlines()] for arm, path in files.items()}
    problems = {arm: [row["problem_id"] for row in one] for arm, one in rows.items()}
    assert problems["reference"] == problems["self"] == problems["flow"] != []
    assert {row["prompt"] for row in rows["flow"]} == {row["prompt"] for row in rows["reference"]}
    assert all(len(row["segments"]) == 1 for row in rows["flow"])


@pytest.mark.slow
def test_a_finished_run_is_not_run_again_and_refuses_the_settings_that_each_stage_has_read(run: Path) -> None:
    def finished(*overrides: str) -> dict[str, bool]:
        recipe, config = load_config(str(ROOT / CONFIG), [f"run.dir={run}", *overrides])
        found = {}
        for stage in recipe.planned(config):
            try:
                found[f"{stage.round.number} {stage.name}"] = stage.finished() is not None
            except UserError as error:
                assert all(one.partition("=")[0].split(".", 2)[-1] in str(error) for one in overrides), error
                found[f"{stage.round.number} {stage.name}"] = False
        return found

    def refused(*overrides: str) -> list[str]:
        return [name for name, done in finished(*overrides).items() if not done]

    assert refused() == [] and len(finished()) == 10
    assert refused("search.trees_in_flight=2", "engine.max_batch=3", "search.rollouts=5", "compile.judge.url=x") == []
    assert refused("flow.window=2") == ["1 stream"]
    assert refused("rounds.r2.sft.epochs=3") == ["2 policy-reference", "2 policy-self", "2 policy-flow"]
    assert refused("sft.lora_alpha=3") == ["2 policy-reference", "2 policy-self", "2 policy-flow"]
    assert refused("compile.problems=2") == ["2 extract"]
    assert refused("compile.samples=3") == ["2 solutions"]


def test_a_peft_that_transformers_refuses_is_named_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, config = load_config("configs/flow_dpo/tiny.yaml", [])
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "99.0")
    with pytest.raises(UserError, match=r"peft \d\S+ with transformers \d\S+; need peft 99.0 or newer"):
        recipe.check(config)
