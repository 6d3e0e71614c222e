"""The numbered deviations of rstar/recipes/rstar_math.py: each has a test named after it and a switch, or a reason.

Here are the switches, and what is not tested beside its own part. D2, D13 and the defaults of D1, D3, D4, D5 are in
test_mcts.py, D8 and D9 in test_extract.py, D10's votes in test_evaluation.py.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from rstar.config import ExtractSection, PpmSection, SandboxSection, SearchSection, TrainSection, keys
from rstar.extract.sft import sft_rows
from rstar.extract.trajectories import path_segments
from rstar.problems.agreement import agreeing_answer
from rstar.recipes import flow_dpo, load_config, orca2, outcome_verifier, rstar_math
from rstar.recipes.base_model import checkpoint
from rstar.recipes.rows import scorer_rows
from rstar.run import Artifact
from rstar.search.expand import Expander
from rstar.search.mcts import Mcts, select
from rstar.search.sample import sample
from rstar.tokens import SegmentEncoder, load_tokenizer
from rstar.training.batching import optimizer_batches
from rstar.training.models import load_ppm, transformers_model
from rstar.tree import Tree
from rstar.types import TerminalReason, UserError
from tests.fakes import answer, branching, depth_of, finish, grow, problem, step
from tests.training_rows import pair_rows
from tests.training_rows import sft_rows as solution_rows

CONFIGS = Path(__file__).parent.parent / "configs" / "rstar_math"
DEVIATIONS = re.findall(r"^(D\d+) ((?:.|\n(?=    ))+)", rstar_math.__doc__ or "", flags=re.MULTILINE)


SECTIONS = "search|extract|ppm|sft|verifier|dpo|flow|compile|orca|sandbox|problems|warmup|bootstrap|eval"
SETTING = rf"\b((?:{SECTIONS})\.[a-z_.]*[a-z])"
OTHERS = {outcome_verifier: ("V", 12), flow_dpo: ("F", 11), orca2: ("O", 12)}


def with_switch(expander: Expander, **switch: object) -> Expander:
    return Expander(expander.tree, expander.tools, dataclasses.replace(expander.sampling, **switch))


def test_every_deviation_has_a_test_and_a_switch_or_a_reason() -> None:
    text = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    assert [name for name, _ in DEVIATIONS] == [f"D{n}" for n in range(1, len(DEVIATIONS) + 1)] and len(
        DEVIATIONS
    ) >= 18
    known = set(keys(rstar_math.Config))
    for name, says in DEVIATIONS:
        assert re.search(rf"def test_deviation_{name}_", text), f"{name} has no test"
        named = re.findall(SETTING, says)
        assert set(named) <= known, f"{name} names {set(named) - known}"
        assert named or "No switch:" in says or "all three" in says, f"{name} has neither a switch nor a reason"


@pytest.mark.parametrize("recipe", OTHERS, ids=lambda recipe: recipe.__name__.rpartition(".")[2])
def test_the_other_recipes_number_their_deviations_and_name_settings_that_exist(recipe: ModuleType) -> None:
    letter, most = OTHERS[recipe]
    found = re.findall(rf"^({letter}\d+) ((?:.|\n(?=    ))+)", recipe.__doc__ or "", flags=re.MULTILINE)
    assert [name for name, _ in found] == [f"{letter}{n}" for n in range(1, most + 1)]
    named = {key for _, says in found for key in re.findall(SETTING, says)}
    assert named and named <= set(keys(recipe.Config)), named


def test_deviation_D1_switch_scores_unvisited_children_zero() -> None:
    """G2b: with the official rule A is still chosen, and a toy tree is searched nearly depth first."""
    tree = Tree(tree_id="t", problem=problem(), prompt=("q",))
    visited, fresh = tree.add_child(tree.root, text="A"), tree.add_child(tree.root, text="C")
    for _ in range(3):
        tree.backpropagate(visited, 1.0)
    assert select(tree, tree.root, c=2.0, unvisited=0.0) is visited
    assert select(tree, tree.root, c=2.0) is fresh


@pytest.mark.parametrize(("unvisited", "branches"), [(math.inf, 12), (0.0, 1)])
async def test_deviation_D1_standard_uct_visits_every_branch(unvisited: float, branches: int) -> None:
    expander = grow(branching(4, lambda made: True), candidates=12)
    await Mcts(expander, unvisited=unvisited).search(48)
    tree = expander.tree
    assert sum(child.visit_count > 0 for child in tree.children(tree.root)) == branches


def failing(prompt: str, seed: int, index: int) -> str:
    return step(1, f"x1 = {index}") if depth_of(prompt) == 0 else step(2, f"boom({index})")


async def test_deviation_D3_a_dead_end_is_backed_up_once() -> None:
    expander = grow(failing)
    await Mcts(expander).search(10)
    tree = expander.tree
    dead = [node for node in tree.children(tree.root) if node.terminal is TerminalReason.DEAD_END]
    assert [(n.visit_count, n.value_sum) for n in dead] == [(1, -1.0)] * 2
    assert (tree.root.visit_count, tree.root.value_sum) == (2, -2.0)


async def test_deviation_D4_max_depth_is_backed_up_to_the_root() -> None:
    expander = grow(branching(9, lambda made: True), candidates=1, max_depth=3)
    await Mcts(expander).search(1)
    (leaf,) = [n for n in expander.tree.nodes if n.terminal is TerminalReason.MAX_DEPTH]
    assert (leaf.visit_count, leaf.value_sum) == (1, -1.0)
    assert (expander.tree.root.visit_count, expander.tree.root.value_sum) == (1, -1.0)


async def test_deviation_D5_all_distinct_answers_of_an_expansion_are_kept() -> None:
    def script(prompt: str, seed: int, index: int) -> str:
        return finish("v") if "<end_of_code>" not in prompt else answer(str(index % 3))

    expander = grow(script, candidates=4)
    await Mcts(expander).search(1)
    assert [node.answer for node in expander.tree.nodes if node.terminal] == ["0", "1", "2"]
    assert expander.tree.root.visit_count == 3


def test_deviation_D6_scores_are_squashed_and_the_loss_is_on_raw_scores() -> None:
    """G4: 0.361572 on raw scores, 0.412201 with tanh inside; served scores tanh(v / 5)."""
    torch = pytest.importorskip("torch")
    from rstar.engines.base import squash
    from rstar.training.losses import pairwise_losses

    default, paper = PpmSection(), PpmSection(tanh_in_loss=True, score_scale=1.0)
    chosen, rejected = torch.tensor([1.2, 1.2, 0.4, 0.4]), torch.tensor([-0.3, 0.1, -0.3, 0.1])
    for section, golden in ((default, 0.361572), (paper, 0.412201)):
        scale = section.score_scale if section.tanh_in_loss else 0.0
        assert float(pairwise_losses(chosen, rejected, tanh_scale=scale).mean()) == pytest.approx(golden, abs=1e-6)
    served = [squash(raw, default.score_scale) for raw in (1.2, 0.4, -0.3, 0.1)]
    assert served == pytest.approx([0.235496, 0.079830, -0.059928, 0.019997], abs=1e-6)
    assert squash(1.2, paper.score_scale) == pytest.approx(math.tanh(1.2))
    with pytest.raises(UserError, match="NaN"):  # of a forward pass that overflowed: no tree may keep it
        squash(math.nan, 1.0)


@pytest.mark.parametrize("tanh_in_loss", [False, True])
def test_deviation_D6_switch_reaches_the_training_and_the_checkpoint(
    tiny_model: Path, tmp_path: Path, tanh_in_loss: bool
) -> None:
    from rstar.training.ppm import train_ppm

    quick = PpmSection(learning_rate=1e-3, batch_size=64, micro_batch_tokens=4096, dtype="float32", heldout=0.0)
    section = dataclasses.replace(quick, tanh_in_loss=tanh_in_loss, score_scale=0.01)  # so small that tanh saturates
    result = train_ppm(pair_rows(trees=2), str(tiny_model), tmp_path / "ppm", section, seed=0)
    raw = train_ppm(pair_rows(trees=2), str(tiny_model), tmp_path / "raw", quick, seed=0)
    assert (abs(result.training.first_loss - raw.training.first_loss) > 1e-3) is tanh_in_loss
    assert json.loads((tmp_path / "ppm" / "config.json").read_text())["rstar_score_scale"] == 0.01


def test_deviation_D7_the_ppm_trains_for_one_epoch(tiny_model: Path, tmp_path: Path) -> None:
    from rstar.training.ppm import train_ppm

    assert PpmSection().epochs == 1 and TrainSection().epochs == 2
    section = PpmSection(learning_rate=1e-3, batch_size=7, micro_batch_tokens=4096, dtype="float32", heldout=0.0)
    steps = []
    for epochs in (1, 2):
        one = dataclasses.replace(section, epochs=epochs)
        steps.append(train_ppm(pair_rows(trees=2), str(tiny_model), tmp_path / f"{epochs}", one, seed=0).training.steps)
    assert steps == [2, 4]


def test_deviation_D11_only_the_model_s_own_text_carries_loss(tiny_model: Path) -> None:
    from rstar.training.data import encode_sft

    tokenizer = load_tokenizer(tiny_model)
    row = solution_rows(1, 1)[0]
    encoded = encode_sft(row, SegmentEncoder(tokenizer), 4096)
    trained = tokenizer.decode(encoded.paths[0][encoded.trained])
    own = "".join(text for text, mine in row.segments if mine)
    assert trained.removesuffix(tokenizer.eos_token) == own
    assert "<output>" in row.completion and "<output>" not in trained and "<answer>" not in trained


async def test_deviation_D11_search_marks_what_we_wrote() -> None:
    expander = grow(branching(0, lambda made: True), candidates=1)
    await Mcts(expander).search(1)
    ours = [text for text, mine in path_segments(expander.tree, expander.tree.answers()[0]) if not mine]
    assert ours == ["<output>v<end_of_output>\n<answer>"]


async def test_deviation_D12_escalation_goes_on_in_the_same_tree() -> None:
    script = branching(3, lambda made: made == [1, 1, 1])
    once, escalated = grow(script), grow(script)
    await Mcts(once).search(8)
    await Mcts(escalated).search(3)
    before = [node.text for node in escalated.tree.nodes]
    await Mcts(escalated).search(8)  # rollouts 3, escalate [5]
    assert [node.text for node in escalated.tree.nodes][: len(before)] == before
    rows = [
        [{k: v for k, v in row.items() if k != "seconds"} for row in one.tree.to_rows()] for one in (once, escalated)
    ]
    assert rows[0] == rows[1] and escalated.tree.rollouts_done == 8


def test_deviation_D14_warm_up_is_off_but_where_a_config_asks_for_it(tmp_path: Path, tiny_model: Path) -> None:
    for path in CONFIGS.glob("*.yaml"):
        if path.stem in ("few_shot", "paper"):
            continue
        _, config = load_config(str(path), [])
        assert config.warmup.enabled is (path.stem in ("quickstart", "tiny")), path
        assert not (config.warmup.enabled and config.bootstrap.enabled)
    _, config = load_config(str(CONFIGS / "tiny.yaml"), [f"model.base={tiny_model}", "model.step_tokens=false"])
    for warmup, base in ((True, tmp_path / "policy"), (False, tiny_model)):
        made = Artifact("round 0 base", tmp_path, tmp_path / "policy" if warmup else tmp_path)
        if warmup:
            shutil.copytree(tiny_model, tmp_path / "policy")
        assert checkpoint(made, config.model) == str(base)


def test_deviation_D15_the_second_pass_is_a_fresh_tree_with_the_next_seed() -> None:
    search = SearchSection(rollouts=16, seeds=[0, 3], escalate=[64], second_pass=12)
    again = rstar_math.second_pass(search)
    assert again is not None and (again.seeds, again.rollouts, again.escalate) == ([4], 12, [])
    assert rstar_math.second_pass(dataclasses.replace(search, second_pass=0)) is None


async def test_deviation_D16_bootstrap_rows_carry_the_prompt_that_is_trained() -> None:
    """What a round of it looks like is in test_rounds.py; a row is the same for any prompt."""
    expander = grow(branching(1, lambda made: made == [1]))
    await Mcts(expander).search(4)
    other = dataclasses.replace(expander.tree, prompt=("plain q\n", "<code>\n"))
    (theirs,), (ours,) = sft_rows([expander.tree]), sft_rows([other])
    assert ours.prompt == "plain q\n<code>\n" != theirs.prompt and ours.completion == theirs.completion


def test_deviation_D17_a_shared_step_counts_once_for_each_row_that_holds_it(tiny_model: Path) -> None:
    from rstar.training.batching import micro_batches
    from rstar.training.data import encode_sft

    encoder = SegmentEncoder(load_tokenizer(tiny_model))
    rows = [encode_sft(row, encoder, 4096) for row in solution_rows(1, 2)]  # the same first step
    weights = []
    for packing in (True, False):
        ((batch,),) = micro_batches(rows, 100_000, tree_packing=packing)
        weights.append(float(batch.weight.sum()))
        assert len(batch.ids) < sum(row.tokens for row in rows) if packing else True
        heaviest = float(batch.weight.max() / batch.weight.min())
        assert heaviest == pytest.approx(2.0 if packing else 1.0)
    assert weights == pytest.approx([1.0, 1.0])


def test_deviation_D18_synthetic_answers_agree_as_numbers_or_texts() -> None:
    answers = ["1/2", "0.5", "\\frac12", "0.51", "3"]
    assert agreeing_answer(answers, 3) == "1/2" and agreeing_answer(answers, 4) is None
    assert agreeing_answer(["5", "6", "6"], 3) is None and agreeing_answer(["5", "6", "6"], 0) == "6"


async def test_deviation_D20_switch_keeps_steps_that_fail_and_never_runs_them_again() -> None:
    def script(prompt: str, seed: int, index: int) -> str:
        if "<end_of_code>" in prompt:
            return answer("7")
        return finish("7") if depth_of(prompt) == 1 else step(1, "boom(1)")

    dropped, kept = grow(script, candidates=1), with_switch(grow(script, candidates=1), drop_failed_steps=False)
    await Mcts(dropped).search(2)
    assert not dropped.tree.answers() and dropped.tree.nodes[1].terminal is TerminalReason.CODE_ERROR
    await Mcts(kept).search(2)
    (leaf,) = kept.tree.answers()
    failed, finished, _ = kept.tree.path(leaf)
    assert failed.error and failed.code is None and failed.stdout == "" and failed.status == "error"
    assert finished.stdout == "7\n" and "<output>" not in "".join(text for text, _ in path_segments(kept.tree, failed))


@pytest.mark.parametrize(("widen", "pairs"), [(True, 4), (False, 2)])
def test_deviation_D21_switch_keeps_two_by_two(widen: bool, pairs: int) -> None:
    tree = Tree("t", problem(), ("q",))
    for k in range(6):
        child = tree.add_child(tree.root, text=f"step {k}" * 10, terminal=TerminalReason.ANSWER, answer=str(k))
        child.reward = -1.0 if k else 1.0
        tree.backpropagate(child, child.reward)
    section = ExtractSection(min_edit_distance=0, answer_pairs=False, widen_pairs=widen)
    found = scorer_rows([tree], section, "pairwise")
    assert [row.weight for row in found] == [1 / pairs] * pairs


async def test_deviation_D22_numbers_stay_as_printed_and_the_papers_time_limit_is_set() -> None:
    _, paper = load_config(str(CONFIGS / "qwen2.5-math-7b.yaml"), [])
    assert (paper.sandbox.cpu_seconds, SandboxSection().cpu_seconds) == (30, 5)

    def script(prompt: str, seed: int, index: int) -> str:
        return answer("1") if "<end_of_code>" in prompt else "boxed{9} print('0.123456789')<end_of_code>"

    expander = grow(script, candidates=1)
    await Mcts(expander).search(2)
    first, last = expander.tree.path(expander.tree.answers()[0])
    assert first.stdout == "0.123456789\n" and last.answer == "1"  # and "boxed" in code is no answer


async def test_deviation_D23_a_greedy_solution_ends_at_its_first_failing_step() -> None:
    expander = grow(
        lambda prompt, seed, index: step(1, "boom(1)") if depth_of(prompt) == 0 else finish("1"), candidates=1
    )
    await sample(expander, 1)
    assert [node.terminal for node in expander.tree.nodes[1:]] == [TerminalReason.CODE_ERROR]


def test_deviation_D24_switch_spreads_a_tree_over_the_optimizer_steps() -> None:
    trees = [f"t{tree}" for tree in range(20) for _ in range(10)]
    sizes = {}
    for rows in (0, 1):
        batches = optimizer_batches(trees, 40, np.random.default_rng(0), tree_rows=rows)
        assert sorted(k for batch in batches for k in batch) == list(range(200)) and {len(b) for b in batches} == {40}
        sizes[rows] = {len({trees[k] for k in batch}) for batch in batches}
    assert sizes[0] == {4} and min(sizes[1]) > 10
    _, paper = load_config(str(CONFIGS / "qwen2.5-math-7b.yaml"), [])
    assert (paper.ppm.tree_rows, paper.sft.tree_rows) == (16, 0)


def test_deviation_D25_a_fresh_ppm_has_a_head_near_zero_without_bias_and_dropout(tiny_model: Path) -> None:
    model = transformers_model(load_ppm(str(tiny_model), PpmSection(), load_tokenizer(tiny_model)).model)
    assert model.score.bias is None and 0 < float(model.score.weight.detach().abs().max()) < 0.01
    assert not any(isinstance(module, torch.nn.Dropout) and module.p for module in model.modules())


def test_deviation_D26_the_papers_configs_score_whatever_a_search_may_write() -> None:
    _, config = load_config(str(CONFIGS / "qwen2.5-math-7b.yaml"), [])
    assert config.ppm.max_length == config.engine.max_context == 4096
    _, official = load_config(str(CONFIGS / "qwen2.5-math-7b.yaml"), ["ppm.max_length=2048"])
    assert official.ppm.max_length == 2048


async def test_deviation_D27_solutions_that_differ_in_comments_only_are_one_row() -> None:
    expander = grow(branching(2, lambda made: True))
    await Mcts(expander).search(12)
    rows = sft_rows([expander.tree], top=9)
    programs = [re.sub(r"#.*|\s", "", row.completion) for row in rows]
    assert rows and len(set(programs)) == len(programs)
