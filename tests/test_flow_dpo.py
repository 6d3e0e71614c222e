"""Flow-DPO: golden cases of the worked chain and of the loss, adapters, the online stream, a whole tiny run."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from rstar.config import DpoSection, EngineSection
from rstar.engines.hf import HfPolicy
from rstar.engines.simulated import SimulatedPolicy
from rstar.extract.flow_pairs import chain, flow_outcome, flow_pairs
from rstar.prompts import split_stop_question
from rstar.search.expand import Expander, Sampling, Tools
from rstar.search.flow import flow
from rstar.training.dpo import AdapterTrainer, dpo_losses, encode_pair
from rstar.tree import Tree
from rstar.types import PreferenceRow, PromptText, SamplingParams, TerminalReason, UserError
from tests.fakes import LiteralSession, answer, exact_grade, finish, problem, step

ASKED = "Is this the complete"
Script = Callable[[str, int, int], str]


def grow(script: Script, *, chunks: int = 6, tokens: int = 1000, form: str = "chunks", **options: object) -> Tree:
    """A flow's tree over scripted models; tokens are characters."""
    tools = Tools(
        policy=SimulatedPolicy(script, count_tokens=len),
        scorer=None,
        open_session=lambda seed: LiteralSession(),  # type: ignore[arg-type,return-value]
        grade=exact_grade,
    )
    tree = Tree(tree_id="p#0", problem=problem("1"), prompt=("Q: q\n",), searcher="flow")
    tree.settings["stop_borders"] = split_stop_question(lambda text: f"[{text}]", "q")
    sampling = Sampling(candidates=3, temperature=1.0, form=form, max_depth=chunks, max_step_tokens=tokens)
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


# -- the loss and the adapters ---------------------------------------------------------------------------------------


def test_dpo_losses_of_the_golden_case() -> None:
    def loss(policy: tuple[float, float], reference: tuple[float, float], beta: float) -> float:
        chosen, rejected = (torch.tensor([p - r]) for p, r in zip(policy, reference, strict=True))
        return float(dpo_losses(chosen, rejected, beta=beta))

    assert loss((-10, -12), (-10, -12), 1.0) == pytest.approx(math.log(2), abs=1e-6)
    assert loss((-10, -12), (-11, -11.5), 1.0) == pytest.approx(0.201413, abs=1e-6)
    assert loss((-10, -12), (-11, -11.5), 0.1) == pytest.approx(0.620957, abs=1e-6)


QUICK = DpoSection(learning_rate=1e-2, micro_batch_tokens=64, batch_size=2)
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


def test_a_pair_that_is_too_long_loses_the_beginning_of_its_prompt(trainer: AdapterTrainer) -> None:
    whole = encode_pair(PAIRS[0], trainer.encoder, 1000)
    cut = encode_pair(PAIRS[0], trainer.encoder, max(len(whole.chosen), len(whole.rejected)) - 3)
    assert cut.start == whole.start - 3 and cut.chosen.tolist() == whole.chosen[3:].tolist()
    with pytest.raises(UserError, match="completion"):
        encode_pair(PAIRS[0], trainer.encoder, 4)
