"""Outcome verifiers: golden values, the loss packed and flat, what is saved and scored, the recipe on a toy model."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rstar.calculator import completion
from rstar.config import EngineSection, ModelSection, VerifierSection, recipe_name
from rstar.engines.base import ValueHead, squash, value_head
from rstar.engines.hf import HfScorer
from rstar.evaluation import Candidate, EvalRecord
from rstar.extract.outcomes import outcome_rows
from rstar.grading import is_equivalent_fast
from rstar.problems.worked import solution_text
from rstar.prompts import Malformed, parse_solution, step_prompt
from rstar.recipes import load_config, outcome_verifier
from rstar.recipes.verification import auc, ranking, top_vote, verification_curves, verification_measures
from rstar.report.results import results, results_table
from rstar.report.sections import recorded
from rstar.run import Artifact, Stage
from rstar.store import read_trees
from rstar.tokens import SegmentEncoder, load_tokenizer
from rstar.training.batching import MicroBatch, micro_batches, optimizer_batches
from rstar.training.data import EncodedRow, encode_sft
from rstar.training.models import load_policy
from rstar.training.verifier import ValueLoss, reserve_token, train_verifier, value_losses, verifier_rows
from rstar.tree import Tree
from rstar.types import OutcomeRow, Problem, PromptText, SftRow, StepKind, TerminalReason, UserError
from tests.fakes import execute_stages
from tests.training_rows import outcome_rows as made_up_outcomes
from tests.training_rows import sft_rows as made_up_solutions

SECTION = VerifierSection(
    epochs=1, batch_size=8, learning_rate=1e-3, micro_batch_tokens=512, max_length=256, dtype="float32"
)


@pytest.fixture(scope="module")
def outcomes() -> list[OutcomeRow]:
    return [replace(row, weight=1.0 + k % 3) for k, row in enumerate(made_up_outcomes(trees=2))]


@pytest.fixture(scope="module")
def references() -> list[SftRow]:
    return made_up_solutions(trees=2, count=1)


def loss_module(model: Path, *, bias: float = 0.5, lm_weight: float = 1.0, **settings: Any) -> ValueLoss:
    torch.manual_seed(0)
    tokenizer = load_tokenizer(model)
    loaded = load_policy(str(model), replace(SECTION, **settings), tokenizer)
    return ValueLoss(loaded.model, reserve_token(loaded.model, tokenizer), bias, lm_weight)


def encoded(model: Path, outcomes: list[OutcomeRow], references: list[SftRow], **settings: Any) -> list[EncodedRow]:
    return verifier_rows(outcomes, references, SegmentEncoder(load_tokenizer(model)), replace(SECTION, **settings))


def batches(rows: list[EncodedRow], *, tree_packing: bool = True, budget: int = 4096) -> list[MicroBatch]:
    return micro_batches(rows, budget, tree_packing=tree_packing)[0]


# -- golden values --------------------------------------------------------------------------------------------


def test_golden_losses_by_token_and_by_solution() -> None:
    values = torch.tensor([0.2, 0.5, 0.9])
    assert value_losses(values, torch.ones(3)).mean().item() == pytest.approx(0.3)
    assert value_losses(values, torch.zeros(3)).mean().item() == pytest.approx(0.366667, abs=1e-6)
    assert value_losses(values[-1:], torch.ones(1)).mean().item() == pytest.approx(0.01)


def test_golden_value_is_gain_times_the_reserved_logit_plus_bias(tiny_model: Path) -> None:
    module = loss_module(tiny_model)
    row = module.model.get_output_embeddings().weight
    hidden = torch.randn(1, row.shape[1])
    hidden = hidden * (2.0 / (hidden @ row[module.token])).detach()  # the logit becomes 2
    with torch.no_grad():
        module.gain.fill_(0.5), module.bias.fill_(-0.25)
    assert module.values(hidden).item() == pytest.approx(0.75, abs=1e-5)


def test_values_are_float32_under_bfloat16_too(tiny_model: Path) -> None:
    module = loss_module(tiny_model)
    row = module.model.get_output_embeddings().weight[module.token]
    hidden = torch.randn(50, len(row)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        values = module.values(hidden)
    torch.testing.assert_close(values, hidden.float() @ row + module.bias)


def test_golden_votes_and_the_tie_goes_to_the_higher_best_score() -> None:
    """V9."""
    scored = [(0.60, "18"), (0.90, "26"), (0.95, "18"), (0.5, "9"), (0.88, "26")]
    candidates = [Candidate(answer, score, 1, answer == "18") for score, answer in scored]
    chosen = {k: top_vote(candidates, k=k) for k in (1, 3, 5)}
    assert {k: c.answer for k, c in chosen.items() if c} == {1: "18", 3: "26", 5: "18"}
    twice = [replace(candidates[1], count=2), candidates[2]]
    assert (best := top_vote(twice, k=3)) is not None and best.answer == "26"  # two samples, two votes


def test_golden_values_of_the_paper_are_in_its_config() -> None:
    _, config = load_config(str(Path(__file__).parent.parent / "configs/outcome_verifier/paper.yaml"), [])
    search, sft, verifier = config.search, config.sft, config.verifier
    assert (search.rollouts, search.temperature, search.calculator, search.form) == (100, 0.7, True, "text")
    assert (sft.epochs, sft.learning_rate, sft.schedule) == (2, 1.6e-5, "linear")
    assert (verifier.epochs, verifier.learning_rate, verifier.level, verifier.lm_weight) == (1, 1e-5, "token", 1.0)
    assert (config.eval.completions, config.eval.epochs[-1], config.eval.epoch_samples) == (100, 20, 100)
    assert (sft.dropout, verifier.dropout, verifier.tree_rows) == (0, 0, 8)  # V7, V12


def test_the_question_carries_no_loss_in_fine_tuning(tiny_model: Path) -> None:
    """V11."""
    encoder = SegmentEncoder(load_tokenizer(tiny_model))
    row = encode_sft(SftRow("1 + 1?\n", "#### 2", (("#### 2", True),), "p", "t", ()), encoder, 100)
    question = len(encoder.encode(["1 + 1?\n"]))
    assert not row.trained[:question].any() and row.trained[question:].all()


def test_a_completion_and_its_reference_stay_in_one_optimizer_step(
    tiny_model: Path, outcomes: list[OutcomeRow], references: list[SftRow]
) -> None:
    """V5, V12: also where a problem's completions are spread over the steps."""
    rows = encoded(tiny_model, outcomes, references)
    batches = optimizer_batches([row.tree_id for row in rows], 4, np.random.default_rng(0), tree_rows=2)
    assert len(rows) == 2 * len(outcomes) and len(batches) == len(rows) / 4
    assert all(k + 1 in batch for batch in batches for k in batch if k % 2 == 0)


def test_completions_that_are_too_long_are_cut_or_where_only_their_end_is_scored_dropped(
    tiny_model: Path, outcomes: list[OutcomeRow]
) -> None:
    longer = replace(outcomes[0], segments=(*outcomes[0].segments, ("and more words", True)))
    outcomes = [longer, *outcomes[1:]]
    whole = encoded(tiny_model, outcomes, [])
    longest = whole[0].tokens
    assert longest > max(row.tokens for row in whole[1:])
    cut = encoded(tiny_model, outcomes, [], max_length=longest - 1)
    for before, after in zip(whole, cut, strict=True):
        assert after.paths[0].tolist() == before.paths[0][: longest - 1].tolist()
        assert after.scored.tolist() == [place for place in before.scored if place < longest - 1]
    left = encoded(tiny_model, outcomes, [], max_length=longest - 1, level="solution")
    assert [row.name for row in left] == [row.name for row in whole[1:]]
    with pytest.raises(UserError, match="rows are longer than max_length=4"):
        encoded(tiny_model, outcomes, [], max_length=4)


# -- the loss --------------------------------------------------------------------------------------------


def naive_loss(module: ValueLoss, rows: list[EncodedRow]) -> float:
    """Row by row without packing: mean squared error over value tokens, mean NLL over reference tokens (V5)."""
    squared, weights, nll, words = 0.0, 0.0, 0.0, 0.0
    model = AutoModelForCausalLM.from_pretrained(module.model.name_or_path, dtype=torch.float32).eval()
    model.resize_token_embeddings(module.model.get_input_embeddings().num_embeddings, mean_resizing=False)
    model.load_state_dict(module.model.state_dict())
    for row in rows:
        ids = torch.from_numpy(row.paths[0])[None]
        with torch.no_grad():
            logits = model(ids).logits[0]
        if len(row.scored):
            values = module.gain * logits[row.scored, module.token] + module.bias
            squared += row.weight * float(((values - torch.from_numpy(row.labels)) ** 2).sum())
            weights += row.weight * len(row.scored)
        else:
            logits[:, module.token] = -torch.inf
            places = np.flatnonzero(row.trained)
            found = torch.log_softmax(logits[places - 1], -1)[range(len(places)), ids[0, places]]
            nll -= row.weight * float(found.sum())
            words += row.weight * len(places)
    return squared / weights + module.lm_weight * (nll / words if words else 0.0)


@pytest.mark.parametrize("level", ["token", "solution"])
@pytest.mark.parametrize("lm_weight", [1.0, 0.0])
def test_packed_flat_and_naive_losses_are_equal(
    tiny_model: Path, outcomes: list[OutcomeRow], references: list[SftRow], level: str, lm_weight: float
) -> None:
    rows = encoded(tiny_model, outcomes, references if lm_weight else [], level=level)
    module = loss_module(tiny_model, lm_weight=lm_weight).eval()
    whole = sum(module(batch).item() for batch in batches(rows))
    assert whole == pytest.approx(naive_loss(module, rows), rel=1e-4)
    for options in ({"tree_packing": False}, {"budget": 150}):
        assert sum(module(b).item() for b in batches(rows, **options)) == pytest.approx(whole, rel=1e-4)
    packed, flat = (sum(b.tokens for b in batches(rows, tree_packing=p)) for p in (True, False))
    assert packed < 0.7 * flat  # the completions of a question and its reference share the question


def test_golden_joint_loss_is_the_sum_of_both_means(
    tiny_model: Path, outcomes: list[OutcomeRow], references: list[SftRow]
) -> None:
    rows = encoded(tiny_model, outcomes, references)
    parts = [sum(loss_module(tiny_model, lm_weight=w).eval()(b).item() for b in batches(rows)) for w in (0.0, 1.0, 0.5)]
    assert parts[2] == pytest.approx((parts[0] + parts[1]) / 2, rel=1e-5)
    assert parts[1] - parts[0] > 1  # an untrained language model's loss


def test_no_question_token_carries_loss_and_gradients_reach_the_head(
    tiny_model: Path, outcomes: list[OutcomeRow], references: list[SftRow]
) -> None:
    rows = encoded(tiny_model, outcomes, references)
    tokenizer = load_tokenizer(tiny_model)
    question = len(SegmentEncoder(tokenizer).encode(outcomes[0].prompt_segments))
    for row in rows:
        first = row.scored[0] if len(row.scored) else np.flatnonzero(row.trained)[0]
        assert first == question and row.paths[0][-1] == tokenizer.eos_token_id
    assert all(len(row.paths[0]) - 1 in row.scored for row in rows if len(row.scored))  # V3: the end token has a value
    module = loss_module(tiny_model)
    sum(module(batch) for batch in batches(rows)).backward()
    table = module.model.get_output_embeddings().weight
    assert module.gain.grad.abs() > 0 and module.bias.grad.abs() > 0 and table.grad[module.token].abs().sum() > 0


def test_references_are_mixed_one_to_one_with_the_samples(
    tiny_model: Path, outcomes: list[OutcomeRow], references: list[SftRow]
) -> None:
    """V5."""
    rows = encoded(tiny_model, outcomes, references)
    values, words = [r for r in rows if len(r.scored)], [r for r in rows if len(r.trained)]
    assert [r.weight for r in values] == [r.weight for r in words] == [row.weight for row in outcomes]
    assert [(r.problem_id, r.tree_id) for r in values] == [(r.problem_id, r.tree_id) for r in words]


def test_fresh_values_are_the_share_of_correct_completions(tiny_model: Path, outcomes: list[OutcomeRow]) -> None:
    """V4: values start near the bias, whatever the body writes."""
    (batch,) = batches(encoded(tiny_model, outcomes[:2], []))
    module = loss_module(tiny_model, bias=0.3, lm_weight=0.0).eval()
    expected = ((0.3 - batch.label) ** 2 * batch.weight).sum().item()
    assert module(batch).item() == pytest.approx(expected, abs=0.05)


def test_dropout_acts_in_training_only(tiny_model: Path, outcomes: list[OutcomeRow]) -> None:
    """V7."""
    (batch,) = batches(encoded(tiny_model, outcomes[:2], []))
    module = loss_module(tiny_model, dropout=0.2, lm_weight=0.0)
    assert module.eval()(batch).item() == loss_module(tiny_model, lm_weight=0.0).eval()(batch).item()
    module.train()
    assert len({module(batch).item() for _ in range(3)}) == 3


# -- the checkpoint --------------------------------------------------------------------------------------------


def test_verifier_is_a_plain_model_and_scores_as_it_was_trained(
    tiny_model: Path, outcomes: list[OutcomeRow], references: list[SftRow], tmp_path: Path
) -> None:
    section = replace(SECTION, epochs=8)
    result = train_verifier(outcomes, references, str(tiny_model), tmp_path / "verifier", section, seed=0)
    assert result.training.mean_loss < result.training.first_loss
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "verifier", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    head = value_head(str(tmp_path / "verifier"))
    assert head == ValueHead(**result.head) and head is not None and value_head(str(tiny_model)) is None
    encoder = SegmentEncoder(load_tokenizer(tmp_path / "verifier"))

    def value(row: OutcomeRow) -> float:
        ids = encoder.encode((*row.prompt_segments, *(text for text, _ in row.segments)))
        with torch.no_grad():
            logits = model(torch.tensor([[*ids, encoder.tokenizer.eos_token_id]])).logits
        return head.gain * logits[0, -1, head.token].item() + head.bias

    async def scores() -> list[float]:
        scorer = HfScorer(str(tmp_path / "verifier"), EngineSection(dtype="float32", device="cpu"))
        one = [row for row in outcomes if row.tree_id == outcomes[0].tree_id]
        prompt = PromptText(one[0].prompt_segments)
        found = await scorer.score(prompt, [[text for text, _ in row.segments] for row in one])
        await scorer.close()
        return found

    found = asyncio.run(scores())
    assert found == pytest.approx([squash(2 * value(row) - 1, 1.0) for row in outcomes[: len(found)]], abs=1e-4)


@pytest.mark.parametrize(
    ("rows", "settings", "words"),
    [([], {}, "no labelled solutions"), (made_up_outcomes(trees=1), {"level": "word"}, "token or solution")],
)
def test_mistakes_are_named_before_a_model_is_loaded(
    rows: list[OutcomeRow], settings: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=words):
        train_verifier(rows, [], "no-model", tmp_path / "v", replace(SECTION, **settings), seed=0)


# -- solutions in words --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "answer"),
    [("48/2 = <<48/2=24>>24\n#### 24", "24"), ("so\n#### 1,234,567 \n", "1234567"), ("x\nA: -3.5", "-3.5")],
)
def test_answer_stands_in_the_last_line(text: str, answer: str) -> None:
    step = parse_solution(text)
    assert not isinstance(step, Malformed) and (step.kind, step.answer, step.code) == (StepKind.ANSWER, answer, None)


def test_answers_are_the_same_where_their_values_are() -> None:
    """V1."""
    step = parse_solution("x\n#### 72.0")
    assert not isinstance(step, Malformed) and is_equivalent_fast(step.answer or "", "72")


@pytest.mark.parametrize("text", ["", "the answer is 3", "#### 3\nand more", "x\n####"])
def test_text_without_an_answer_line_is_malformed(text: str) -> None:
    assert isinstance(parse_solution(text), Malformed)


def test_reference_solutions_in_words_of_any_file() -> None:
    gsm8k = Problem("a", "q", "72", solution="48/2 = <<48/2=24>>24.\n48+24 = <<48+24=72>>72.\n#### 72")
    assert solution_text(gsm8k, annotated=True) == gsm8k.solution
    plain = Problem("b", "q", "7", solution="3 + 4 = 7 eggs")
    assert solution_text(plain, annotated=True) == "3 + 4 = <<3+4=7>>7 eggs\n#### 7"
    assert solution_text(Problem("c", "q", "7"), annotated=True) == "#### 7"
    metamath = replace(plain, solution="3 + 4 = 7 eggs\n#### 7\nThe answer is: 7")
    assert solution_text(metamath) == "3 + 4 = 7 eggs\n#### 7"
    generated = Problem("d", "State the final answer: 3 + 4 - 2 =", "5", source="chain_sum")
    steps = ("combine the first two numbers: 3 + 4 = <<3+4=7>>7", "subtract the next number: 7 - 2 = <<7-2=5>>5")
    assert solution_text(generated, annotated=True) == "\n".join([*steps, "#### 5"])


def words_tree(counts: dict[str, int]) -> Tree:
    """A tree of solutions in words: answer -> samples; "" names none."""
    tree = Tree("p#0", Problem("p", "q", "1"), step_prompt("q\n", "text").segments, searcher="sample")
    for answer, count in counts.items():
        terminal = TerminalReason.ANSWER if answer else TerminalReason.MALFORMED
        tree.add_child(
            tree.root, text=f"#### {answer}", multiplicity=count, terminal=terminal, answer=answer or None,
            reward=(1.0 if answer == "1" else -1.0) if answer else None,
        )  # fmt: skip
    tree.rollouts_done = sum(counts.values())
    return tree


def test_outcome_rows_weigh_samples_and_smaller_draws_are_parts_of_larger_ones() -> None:
    tree = words_tree({"1": 6, "": 5, "2": 9})
    assert [(r.label, r.weight, r.completion) for r in outcome_rows(tree)] == [(1, 6, "#### 1"), (0, 9, "#### 2")]
    before: dict[str, float] = {}
    for samples in (1, 5, 12, 20):
        found = {row.completion: row.weight for row in outcome_rows(tree, samples=samples)}
        assert all(found.get(name, 0) >= weight for name, weight in before.items()) and sum(found.values()) <= samples
        before = found
    assert before == {"#### 1": 6, "#### 2": 9}


def test_measures_and_curves_count_every_problem() -> None:
    good = EvalRecord("a", "", "", (Candidate("1", 0.9, 1, True), Candidate("2", 0.1, 3, False)), 4, 0, 0, 0.0)
    none = EvalRecord("b", "", "", (), 4, 0, 0, 0.0)
    found = {name: m.mean for name, m in verification_measures([good, none], 3).items()}
    assert found == {
        "accuracy": 0.5,
        "vote of best 3": 0.0,
        "majority of 4": 0.0,
        "oracle of 4": 0.5,
        "one sample": 0.125,
    }
    by_size, by_voters = verification_curves([good, none], [1, 2], [1, 3, 100])
    assert [p[0] for p in by_size["series"]["verifier"]] == [1, 2, 4]
    assert by_size["series"]["verifier"][-1][1] == 0.5 and by_size["series"]["oracle"][0][1] == 0.125
    assert [p[:2] for p in by_voters["series"]["verifier"]] == [[1, 0.5], [3, 0.0]]
    assert auc(good.candidates) == 1.0 and auc(none.candidates) is None
    assert ranking([good, none]) == {"auc": 1.0, "auc_within": 1.0, "problems_with_both": 1, "false_positives": 1.0}


# -- the recipe --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(Path("configs/outcome_verifier").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_configs_are_read(path: Path) -> None:
    assert recipe_name(path) == "outcome_verifier"
    recipe, config = load_config(str(path), ["problems.path=none.jsonl"])
    names = [[stage.name for stage in recipe.stages(config, number)] for number in (0, 1)]
    assert names[0][0] == "base" and "policy" in names[0] and names[0][-1] == "eval"
    assert names[1] == ["search", "candidates", "extract", "verifier", "eval"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy run on sums in words with annotations, all stages in this process, with a variant as round 2."""
    folder = tmp_path_factory.mktemp("verifier")
    return execute(folder, [])


def settings_of(run: Path) -> list[str]:
    """The overrides of the run in a folder."""
    shared = [f"run.dir={run}", "problems=file", f"problems.path={run.parent / 'sums.jsonl'}", "problems.heldout=8"]
    return [*shared, "sft.epochs=20", "eval.epochs=[10]", "search.max_step_tokens=40"]


def execute(folder: Path, overrides: list[str], solution: Callable[[int, int], str] | None = None) -> Path:
    with (folder / "sums.jsonl").open("w") as file:
        for a in range(2, 9):
            for b in range(3, 7):
                text = f"Tom has {a}+{b}=<<{a}+{b}={a + b}>>{a + b} apples.\n#### {a + b}"
                file.write(json.dumps({"question": f"Tom has {a} apples and buys {b}. Now?", "answer": text}) + "\n")
    config = load_config("configs/outcome_verifier/tiny.yaml", [*settings_of(folder / "run"), *overrides])[1]
    outcome_verifier.check(config)
    execute_stages(outcome_verifier.RECIPE, config)
    return folder / "run"


def test_an_override_is_refused_by_the_stages_that_read_it_alone(run: Path) -> None:
    def refused(*overrides: str) -> list[str]:
        config = load_config("configs/outcome_verifier/tiny.yaml", [*settings_of(run), *overrides])[1]
        found = []
        for stage in outcome_verifier.RECIPE.planned(config):
            try:
                assert stage.finished() is not None
            except UserError:
                found.append(f"{stage.round.number} {stage.name}")
        return found

    assert refused() == []
    assert refused("verifier.lm_weight=0.5") == ["1 verifier", "2 verifier"]
    assert refused("rounds.r2.verifier.lm_weight=0.5") == ["2 verifier"]
    assert refused("eval.voters=[1, 2]") == ["1 eval", "2 eval"]
    assert refused("eval.completions=5") == ["1 candidates"]
    assert refused("outcomes.completions=3") == ["1 extract", "2 extract"]
    assert refused("eval.epoch_samples=2") == ["0 eval"]
    drawn = [found for found in refused("search.drop_failed_steps=false") if "eval" not in found]
    assert drawn == ["1 search", "1 candidates"]  # held-out candidates are drawn as those that are trained on
    assert refused("sft.learning_rate=1") == ["0 epochs-10", "0 policy"]


@pytest.mark.parametrize(
    "override",
    ["r1.sft.epochs=3", "r1.eval.epochs=[5]", "r2.search.rollouts=3", "r2.eval.completions=3", "r2.problems.limit=3"],
)
def test_a_variant_that_would_change_what_earlier_rounds_made_is_refused(override: str) -> None:
    _, config = load_config("configs/outcome_verifier/tiny.yaml", [f"rounds.{override}"])
    section = override.split(".")[1]
    with pytest.raises(UserError, match=rf"rounds\.{override[:2]} sets {section}"):
        outcome_verifier.check_settings(config)


@pytest.mark.parametrize("override", ["r1.search.rollouts=3", "r2.outcomes.completions=3", "r2.eval.voters=[1, 2]"])
def test_a_variant_may_change_what_its_own_stages_read(override: str) -> None:
    _, config = load_config("configs/outcome_verifier/tiny.yaml", [f"rounds.{override}"])
    outcome_verifier.check_settings(config)


def test_a_verifier_s_start_that_is_not_there_is_named_before_anything_runs(tmp_path: Path) -> None:
    overrides = [f"run.dir={tmp_path / 'run'}", f"rounds.r2.verifier.init={tmp_path / 'none'}"]
    _, config = load_config("configs/outcome_verifier/tiny.yaml", overrides)
    with pytest.raises(UserError, match=rf"verifier\.init={tmp_path / 'none'}"):
        outcome_verifier.check(config)


def test_a_verifier_s_start_is_the_same_where_its_contents_are(run: Path, tiny_model: Path, tmp_path: Path) -> None:
    """A model folder that moved is the same start, one with other contents is another."""

    def stage(folder: Path) -> Stage:
        overrides = [*settings_of(run), f"rounds.r2.verifier.init={folder}"]
        _, config = load_config("configs/outcome_verifier/tiny.yaml", overrides)
        return next(one for one in outcome_verifier.RECIPE.stages(config, 2) if one.name == "verifier")

    first = stage(shutil.copytree(tiny_model, tmp_path / "model"))
    made = {"settings": first.settings, "inputs": first.inputs}
    moved = (tmp_path / "model").rename(tmp_path / "moved")
    assert stage(moved).changes(made) == []
    (moved / "config.json").write_text("{}")
    assert [key for key, _, _ in stage(moved).changes(made)] == ["verifier.init"]


def test_names_of_a_start_are_no_files_even_where_such_files_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither beside the config nor in the working folder."""
    for name in ("generator", "base", "tiny"):
        (tmp_path / name).mkdir()
    text = Path("configs/outcome_verifier/tiny.yaml").read_text()
    (tmp_path / "c.yaml").write_text(text + "  r1: {verifier: {init: base}}\n")
    monkeypatch.chdir(tmp_path)
    _, config = load_config("c.yaml", [f"run.dir={tmp_path / 'run'}"])
    stages = [one for one in outcome_verifier.RECIPE.planned(config) if one.name == "verifier"]
    assert [one.settings["verifier"]["init"] for one in stages] == ["base", "generator"]
    assert not any({"verifier.init", "model.base"} & one.inputs.keys() for one in stages)


def test_step_delimiters_of_an_earlier_attempt_are_not_taken_for_the_base(tiny_model: Path, tmp_path: Path) -> None:
    """The base stage was made again without model.step_tokens, its old folder is still there."""
    shutil.copytree(tiny_model, tmp_path / "round_00" / "start")
    references = Artifact("round 0 base", tmp_path / "round_00", tmp_path / "round_00" / "sft.jsonl")
    for step_tokens, expected in ((True, str(tmp_path / "round_00" / "start")), (False, str(tiny_model))):
        model = ModelSection(base=str(tiny_model), step_tokens=step_tokens)
        assert outcome_verifier.base_of(references, model) == expected


def test_fine_tuned_models_of_the_curve_are_trainings_of_their_own(run: Path) -> None:
    """V6: each schedule ends at its own epoch count."""
    stages = json.loads((run / "round_00" / "manifest.json").read_text())["stages"]
    steps = {name: stages[name]["counts"]["steps"] for name in ("policy", "epochs-10")}
    rates = {
        path.name: [json.loads(line)["learning_rate"] for line in path.read_text().splitlines()]
        for path in (run / "round_00").glob("*-metrics.jsonl")
    }
    assert steps["policy"] == 2 * steps["epochs-10"] and len(rates) == 2
    assert all(values[-1] < 0.1 * values[0] for values in rates.values())


def test_run_ranks_the_same_candidates_in_every_round(run: Path) -> None:
    methods = [json.loads((run / f"round_{n:02d}" / "eval.json").read_text())["methods"] for n in range(3)]
    assert {"greedy", "greedy, 20 epochs", "sample, 10 epochs", "sample, 20 epochs"} == set(methods[0])
    first, second = methods[1]["verifier"]["records"], methods[2]["verifier"]["records"]
    answers = [[[(c["answer"], c["count"]) for c in r["candidates"]] for r in records] for records in (first, second)]
    scores = [[c["score"] for r in records for c in r["candidates"]] for records in (first, second)]
    assert len(first) == 8 and answers[0] == answers[1] and scores[0] != scores[1] and None not in scores[0]


def test_calculator_wrote_the_completions_results(run: Path) -> None:
    texts = [node.text for tree in read_trees(run / "round_01") for node in tree.answers()]
    forced = [(text[place:], result) for text in texts for place, result in results_in(text)]
    assert len(forced) > 10 and all(rest.startswith(result) for rest, result in forced)


def results_in(text: str) -> list[tuple[int, str]]:
    """Where a text has an annotation's "=", and what belongs behind it."""
    places = [i + 1 for i, character in enumerate(text) if character == "="]
    return [(place, result) for place in places if (result := completion(text[:place])) is not None]


def test_report_shows_what_was_chosen(run: Path) -> None:
    found = results(run)
    table = results_table(found)
    for words in ("majority of 8", "oracle of 8", "vote of best 3", "test@4", "verifier"):
        assert words in table
    page = recorded(found)
    assert "completions per problem" in page and "best-scored voters" in page and "epochs" in page


def test_code_steps_go_through_the_same_recipe(tmp_path: Path) -> None:
    """V10: programs instead of words."""
    overrides = ["search.form=steps", "search.calculator=false", "model.step_tokens=true", "run.rounds=1"]
    more = [
        "search.max_step_tokens=48",
        "search.max_depth=5",
        "sft.epochs=40",
        "eval.epochs=[40]",
        "eval.epoch_samples=0",
    ]
    folder = execute(tmp_path, [*overrides, *more])
    nodes = [node for tree in read_trees(folder / "round_01") for node in tree.answers()]
    assert nodes
    rows = [json.loads(line) for line in (folder / "round_01" / "outcomes.jsonl").read_text().splitlines()]
    assert any("print(" in row["completion"] and not row["segments"][-2][1] for row in rows)


def test_verifier_learns_what_makes_solutions_right_on_questions_it_has_not_seen(
    tiny_model: Path, tmp_path: Path
) -> None:
    labelled = [replace(row, label=float("way 1" in row.completion)) for row in made_up_outcomes(trees=14)]
    train_rows = [row for row in labelled if int(row.problem_id[1:]) < 10]
    section = replace(SECTION, epochs=12, batch_size=16, learning_rate=3e-3)
    train_verifier(train_rows, made_up_solutions(10, 1), str(tiny_model), tmp_path / "v", section, seed=0)

    async def scored(row: OutcomeRow) -> Candidate:
        (score,) = await scorer.score(PromptText(row.prompt_segments), [[text for text, _ in row.segments]])
        return Candidate("", score, 1, row.label == 1.0)

    async def all_scored() -> list[Candidate]:
        return [await scored(row) for row in labelled if row not in train_rows]

    scorer = HfScorer(str(tmp_path / "v"), EngineSection(dtype="float32", device="cpu"))
    assert (auc(asyncio.run(all_scored())) or 0.0) > 0.95
