"""Orca 2: golden cases, erased and few-shot rows, strategies, tasks by field map, the numbered choices, a whole run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rstar.config import ProblemsSection, TrainSection, load
from rstar.engines.worked_teacher import UNKNOWN, teacher_script
from rstar.evaluation import bootstrap
from rstar.extract.explanations import Explanation, ExplanationRow, explanation, explanation_row, few_shot_rows
from rstar.manifest import RunDir
from rstar.problems import load_benchmark, load_problems
from rstar.recipes import orca2
from rstar.recipes.orca2.evaluation import macro_mean
from rstar.recipes.orca2.strategies import choose, load_strategies, strategy_of
from rstar.search.expand import stated_answer
from rstar.store import read_json, read_trees
from rstar.tokens import SegmentEncoder, load_tokenizer, wrap_question
from rstar.training.batching import OptimizerSteps, micro_batches, next_fit
from rstar.training.data import encode_sft, read_rows
from rstar.training.models import load_policy
from rstar.training.sft import TokenLoss
from rstar.tree import Tree
from rstar.types import Problem, SftRow, Step, TerminalReason, UserError
from tests.fakes import execute_stages

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs/orca2"
STRATEGIES = CONFIGS / "strategies.yaml"


def wrap(system: str, question: str, turns: Any = ()) -> str:
    return "".join(f"[{system}]" + "".join(f"<{q}|{a}>" for q, a in turns) + question + "\n")


def answers(task: str, told: str, count: int) -> list[Explanation]:
    return [
        Explanation(
            task, told, f"{task} question {n}?", f"Step 1: {n}\n#### {n}", f"{task}/{n}", f"chosen/{task}/{n}", 1
        )
        for n in range(count)
    ]


def teacher_tree(text: str, *, reward: float | None = 1.0, error: str = "", told: str = "Do it in steps.") -> Tree:
    tree = Tree("sums/0#0", Problem("sums/0", "1 + 2?", "3", level="sums"), ("q",), settings={"system": told})
    terminal = TerminalReason.MALFORMED if reward is None else TerminalReason.ANSWER
    tree.add_child(tree.root, text=text, reward=reward, error=error, terminal=terminal, answer="3")
    return tree


# -- golden cases ----------------------------------------------------------------------------------------------------


def test_golden_macro_mean_is_the_plain_mean_of_the_benchmarks() -> None:
    published = [49.93, 50.18, 57.97, 86.86, 82.87, 59.14]
    found = macro_mean([value / 100 for value in published], ["AGIEval", "BBH", "DROP", "CRASS", "RACE", "GSM8K"])
    assert round(100 * found.mean, 2) == 64.49
    assert round((64.49 / 43.71 - 1) * 100, 2) == 47.54


def test_macro_mean_weighs_a_small_task_as_a_large_one() -> None:
    assert macro_mean([1.0, 1.0, 1.0, 0.0], ["a", "a", "a", "b"]).mean == pytest.approx(0.5)
    assert bootstrap([1.0, 1.0, 1.0, 0.0]).mean == 0.75


def test_golden_packing_in_given_order() -> None:
    lengths = [3000, 1000, 200, 4000, 96, 500]
    packs = [[lengths[k] for k in pack] for pack in next_fit(lengths, 4096)]
    assert packs == [[3000, 1000], [200], [4000, 96], [500]]
    assert [4096 - sum(pack) for pack in packs] == [96, 3896, 0, 3596]
    assert next_fit([5000, 10], 4096) == [[0], [1]]


def test_deviation_o6_loss_is_on_the_answer_and_its_end_token_alone(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    prompt = wrap_question(tokenizer, "What is 1 + 2?", system="Be careful.")
    row = explanation_row(answers("sums", "x", 1)[0], lambda *_: prompt, system="")
    encoded = encode_sft(row, SegmentEncoder(tokenizer), 1000)
    assert tokenizer.decode(encoded.paths[0][encoded.trained]) == row.completion + tokenizer.eos_token
    assert tokenizer.decode(encoded.paths[0][~encoded.trained]).removeprefix(tokenizer.bos_token) == prompt
    ((batch,),) = micro_batches([encoded], 1000, tree_packing=False, in_order=True)
    assert batch.other.tolist() == encoded.paths[0][encoded.trained].tolist()  # labels of no other place are read


def packed(tiny_model: Path, budget: int) -> float:
    encoder, module = SegmentEncoder(load_tokenizer(tiny_model)), TokenLoss(load_model(tiny_model)).eval()
    rows = [encode_sft(explanation_row(one, wrap, system="s"), encoder, 1000) for one in answers("sums", "x", 5)]
    batches = micro_batches(rows, budget, tree_packing=False, in_order=True)[0]
    assert [name for batch in batches for name in batch.rows] == [row.name for row in rows]
    return float(sum(module(batch).item() for batch in batches))


def load_model(folder: Path) -> Any:
    return load_policy(str(folder), TrainSection(), load_tokenizer(folder)).model


def test_packed_samples_do_not_see_each_other(tiny_model: Path) -> None:
    assert packed(tiny_model, 4096) == pytest.approx(packed(tiny_model, 1), abs=1e-5)


def test_golden_erasure() -> None:
    """No row shows an instruction, answers are byte-identical, strategies share one system text."""
    found = [*answers("sums", "Do it in steps.", 2), *answers("legs", "Recall first.", 2)]
    erased = [explanation_row(one, wrap, system="Be careful.") for one in found]
    shown = [explanation_row(one, wrap, system=None) for one in found]
    assert [row.completion for row in erased] == [one.answer for one in found] == [row.completion for row in shown]
    assert {row.prompt.partition("]")[0] for row in erased} == {"[Be careful."}
    assert not any(one.teacher_system in row.prompt for one, row in zip(found, erased, strict=True))
    assert all(one.teacher_system in row.prompt for one, row in zip(found, shown, strict=True))
    assert [row.teacher_system for row in erased] == [one.teacher_system for one in found]


def test_golden_few_shot_rows() -> None:
    found = [*answers("sums", "a", 9), *answers("sums", "b", 4), *answers("legs", "a", 3)]
    rows = few_shot_rows(found, wrap, system="Be careful.", share=1.0, seed=0)
    by_problem = {(one.problem_id, one.teacher_system): one for one in found}
    assert {(row.task, row.teacher_system) for row in rows} == {("sums", "a"), ("sums", "b")}  # 3 problems: too few
    for row in rows:
        assert 3 <= len(row.demonstrations) <= 5 and row.problem_id not in row.demonstrations
        turns = [by_problem[name, row.teacher_system] for name in row.demonstrations]  # the same task and instruction
        target = by_problem[row.problem_id, row.teacher_system]
        assert row.prompt == wrap("Be careful.", target.question, [(one.question, one.answer) for one in turns])
        assert row.segments == ((target.answer, True),)
    assert {len(row.demonstrations) for row in rows} == {3, 4, 5}
    assert few_shot_rows(found, wrap, system="x", share=0.0, seed=0) == []


def test_golden_stages_and_epochs() -> None:
    config = load(orca2.Config, CONFIGS / "paper.yaml", ["model.base=tiny"])
    trained = {stage.name: stage for stage in orca2.RECIPE.stages(config, 1) if "rows" in stage.call.arguments}
    assert list(trained) == ["flan", "weaker", "policy"]
    assert [trained["flan"].settings["flan_epochs"], trained["weaker"].settings["weaker_epochs"]] == [1.0, 3.0]
    assert trained["policy"].settings["sft"]["epochs"] == 4.0
    assert (config.sft.micro_batch_tokens, config.sft.in_order) == (4096, True)
    assert (config.orca.only_correct, config.orca.few_shot, config.sft.max_length) == (False, 0.09, 4096)  # O2, O5
    without = orca2.RECIPE.stages(replace(config, flan=replace(config.flan, epochs=0)), 1)
    assert [stage.name for stage in without][:2] == ["weaker-rows", "weaker"]


# -- strategies, teacher, tasks --------------------------------------------------------------------------------------


def test_the_best_strategy_is_chosen_and_a_tie_goes_to_the_shorter_instruction() -> None:
    texts = {"long": "a long instruction", "short": "short", "bad": ""}
    assert choose({"long": 0.9, "short": 0.8, "bad": 0.1}, texts) == "long"
    assert choose({"long": 0.9, "short": 0.9, "bad": 0.1}, texts) == "short"


@pytest.mark.parametrize(
    ("question", "suits", "answer"),
    [
        ("Solve the following arithmetic problem: 4 - 1 - 7 + 10 =", "step_by_step", "6"),
        ("how many legs are there in total if you have 3 cows, 1 starfish?", "recall_reason_generate", "17"),
        ('How many times does the letter "m" appear in the text: "hundred names Mum"?', "extract_generate", "3"),
        ("Find the Greatest Common Divisor (GCD) of these numbers: 48, 36.", "recall_generate", "12"),
        ("Solve for e: 10 - 26*e = -562", "guess_and_check", "22"),
        ("Find the Least Common Multiple (LCM) of these numbers: 12, 18", "recall_reason_generate", "36"),
        ("Solve the following multiplication: 12 * 11. Give only the result.", "direct_answer", "132"),
        ("Calculate ( -6 - 7 * 6 ) / 2 - -3.", "step_by_step", "-21"),
    ],
)
def test_the_teacher_answers_in_the_form_it_is_asked_for(question: str, suits: str, answer: str) -> None:
    """Every strategy's answer shows that strategy; the one that suits the family is right."""
    strategies = load_strategies(STRATEGIES)
    for name, text in strategies.candidates("other").items():
        written = teacher_script(f"{text}\n\n{question}\n", 0, 0)
        assert strategy_of(written, strategies.evidence) == name
        read = stated_answer(written)
        assert isinstance(read, Step) and read.answer in (answer, str(int(answer) + 1))
        assert name != suits or read.answer == answer


def test_the_teacher_works_brackets_out_first_and_is_silent_where_a_division_leaves_a_rest() -> None:
    worked = teacher_script('In steps headed "Step 1:".\nCalculate -( -( 2 * 3 ) - -5 ) * 4.', 0, 0)
    assert worked == "Step 1: 2 * 3 = 6\nStep 2: -6 - -5 = -1\nStep 3: - -1 * 4 = 4\n#### 4"
    assert teacher_script("Calculate 4 / -27.", 0, 0) == UNKNOWN == teacher_script("Who wrote this?", 0, 0)


def test_the_teacher_slips_where_the_form_does_not_suit() -> None:
    asked = [f"Write the answer.\narithmetic problem: {a} + {b} + 1 =" for a in range(20) for b in range(20)]
    right = [teacher_script(text, 0, 0) == f"#### {k // 20 + k % 20 + 1}" for k, text in enumerate(asked)]
    assert 0.5 < np.mean(right) < 0.7


def test_a_strategies_file_without_evidence_for_a_strategy_is_refused(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("tasks: {sums: {guess: try}}\nevidence: {}\n")
    with pytest.raises(UserError, match="without evidence: guess"):
        load_strategies(tmp_path / "s.yaml")


@pytest.mark.parametrize(
    ("name", "record", "question", "answer"),
    [
        (
            "arc-challenge",
            {"question": "Q?", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"},
            "Q?\nA. x\nB. y",
            "B",
        ),
        ("mmlu", {"question": "Q?", "choices": ["x", "y", "z"], "answer": 2}, "Q?\nA. x\nB. y\nC. z", "C"),
        ("race", {"article": "T.", "question": "Q?", "options": ["x", "y"], "answer": "A"}, "T.\nQ?\nA. x\nB. y", "A"),
        ("hellaswag", {"ctx": "He", "endings": ["x", "y"], "label": "1"}, "He\nA. x\nB. y", "B"),
        ("drop", {"passage": "T.", "question": "Q?", "answers_spans": {"spans": ["5", "five"]}}, "T.\nQ?", "5"),
        ("bbh", {"input": "Q?", "target": "(B)"}, "Q?", "(B)"),
        (
            "lambada",
            {"text": "one two three"},
            "one two\nWhich single word comes next? State it as the answer.",
            "three",
        ),
        ("crass", {"question": "Q?", "answer": "A"}, "Q?", "A"),
    ],
)
def test_a_benchmark_file_is_read_by_its_field_map(
    tmp_path: Path, name: str, record: dict[str, Any], question: str, answer: str
) -> None:
    (tmp_path / "b.jsonl").write_text(json.dumps(record) + "\n")
    (problem,) = load_benchmark(name, path=str(tmp_path / "b.jsonl"))
    assert (problem.question, problem.answer) == (question, answer)


def test_sub_categories_are_a_field_of_the_file_and_the_level_is_taken_where_it_has_none(tmp_path: Path) -> None:
    lines = [
        {"question": "1 + 1?", "answer": "2", "level": "easy", "skill": "sums"},
        {"question": "2 + 3?", "answers": ["5", "5", "5"], "level": "hard", "skill": "sums"},
        {"question": "Legs of 3 cows?", "answer": "12", "level": "easy"},
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    section = ProblemsSection(
        name="file", path=str(tmp_path / "p.jsonl"), heldout=0, category="skill", answers="answers"
    )
    problems = load_problems(section).train
    assert [(problem.level, problem.category) for problem in problems] == [
        ("easy", "sums"), ("hard", "sums"), ("easy", ""),
    ]  # fmt: skip
    assert {task: len(group) for task, group in orca2.by_task(problems).items()} == {"sums": 2, "easy": 1}


@pytest.mark.parametrize("task", ["..", ".", "../../x", "a/b", "/tmp/x", "a%2Fb", "a\0b", "Counting & Probability"])
def test_a_sub_category_is_one_folder_whatever_it_is_called(task: str, tmp_path: Path) -> None:
    names = {orca2.folder_name(other) for other in (task, "a/b", "a%2Fb")}
    assert len(names) == len({task, "a/b", "a%2Fb"})  # no two share a folder
    folder = tmp_path / "run" / orca2.folder_name(task)
    folder.mkdir(parents=True)
    assert [path.name for path in folder.parent.iterdir()] == [orca2.folder_name(task)]
    assert folder.resolve().parent == tmp_path.resolve() / "run"


def test_a_generated_problems_sub_category_is_its_label_whatever_its_level() -> None:
    families = {"sums": {"family": "chain_sum", "level": "1", "count": 2, "heldout": 0}}
    (first, _) = load_problems(ProblemsSection(families=families)).train
    assert (first.level, first.category) == ("1", "sums")


def test_a_tree_keeps_the_category_and_older_trees_without_one_are_read() -> None:
    tree = Tree("sums/0#0", Problem("sums/0", "1 + 2?", "3", level="1", category="sums"), ("q",))
    rows = list(tree.to_rows())
    assert Tree.from_rows(rows).problem.category == "sums"
    del rows[0]["problem"]["category"]
    assert Tree.from_rows(rows).problem.category == ""


# -- the numbered choices --------------------------------------------------------------------------------------------


def test_deviation_o2_only_correct_answers_are_a_switch() -> None:
    wrong, right, cut = teacher_tree("#### 4", reward=-1.0), teacher_tree("#### 3"), teacher_tree("Well", reward=None)
    assert explanation(wrong, only_correct=True) is None and explanation(right, only_correct=True) is not None
    assert explanation(wrong, only_correct=False) is not None and explanation(cut, only_correct=False) is not None
    assert explanation(teacher_tree("We", reward=None, error="cut off"), only_correct=False) is None


def test_deviation_o5_few_shot_turns_are_turns_of_the_chat(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    row = few_shot_rows(
        answers("sums", "x", 4), lambda s, q, t: wrap_question(tokenizer, q, system=s, few_shot=t),
        system="Be careful.", share=0.25, seed=0,
    )[0]  # fmt: skip
    assert row.prompt.count("<|im_start|>system") == 1 and row.prompt.count("<|im_start|>assistant") == 4


def test_deviation_o7_rows_keep_their_shuffled_order(tiny_model: Path) -> None:
    encoder = SegmentEncoder(load_tokenizer(tiny_model))
    rows = [
        encode_sft(explanation_row(one, wrap, system="s" * (k % 3 * 40)), encoder, 1000)
        for k, one in enumerate(answers("sums", "x", 12))
    ]
    steps = OptimizerSteps(rows, batch_size=12, epochs=1, seed=1, budget=120, tree_packing=False, in_order=True)
    assert [name for batch in steps[0] for name in batch.rows] == [rows[k].name for k in steps.batches[0]]


def test_deviation_o9_a_heldout_text_is_in_no_stages_data(tmp_path: Path) -> None:
    lines = [json.dumps({"question": f"What is {n} plus {n}?", "answer": str(2 * n)}) for n in range(6)]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    same = ProblemsSection(name="file", path=str(tmp_path / "p.jsonl"), heldout=2)
    assert [problem.answer for problem in orca2.pool(replace(same, heldout=0), same)] == ["0", "2", "4", "6"]


def test_deviation_o10_answers_are_read_by_documented_patterns() -> None:
    for text in ("So \\boxed{B}", "Text\n#### B", "I think the answer is B.", "Answer: B"):
        read = stated_answer(text)
        assert isinstance(read, Step) and read.answer == "B"
    assert not isinstance(stated_answer("It is B"), Step)


def test_deviation_o11_evidence_that_comes_first_counts() -> None:
    evidence = load_strategies(STRATEGIES).evidence
    assert strategy_of("Recall: x\nStep 1: y\n#### 1", evidence) == "recall_reason_generate"
    assert strategy_of("Recall: x\n#### 1", evidence) == "recall_generate"
    assert strategy_of("hm, Step 1: no\n#### 1", evidence) == ""


@pytest.mark.parametrize("name", ["teacher", "weaker_teacher"])
def test_a_teacher_without_an_address_is_found_before_anything_is_trained(name: str, tmp_path: Path) -> None:
    overrides = [f"run.dir={tmp_path}", f"{name}.engine.kind=openai", f"orca.strategies={STRATEGIES}"]
    with pytest.raises(UserError, match=f"^{name}.engine.url="):
        orca2.check(load(orca2.Config, CONFIGS / "tiny.yaml", overrides))


# -- a whole run -----------------------------------------------------------------------------------------------------


def tiny_config(folder: Path, *overrides: str) -> orca2.Config:
    return load(orca2.Config, CONFIGS / "tiny.yaml", [f"run.dir={folder}", *overrides])


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    folder = tmp_path_factory.mktemp("orca2") / "run"
    config = tiny_config(folder)
    orca2.check(config)

    return execute_stages(orca2.RECIPE, config)


def rows_of(done: RunDir, number: int) -> list[ExplanationRow]:
    kind: Any = ExplanationRow
    return list(read_rows(done.round(number).sft, kind))


def test_deviation_o8_stages_run_in_order_and_carry_the_weights_on(finished_run: RunDir) -> None:
    """Each stage starts from the model before it, with a schedule of its own."""
    first = finished_run.round(1)
    starts = {name: first.records()[name].counts["start"] for name in ("flan", "weaker", "policy")}
    assert starts["weaker"] == str(first.path / "flan") and starts["policy"] == str(first.path / "weaker")
    assert starts["flan"].endswith("tiny_model")
    assert [first.records()[name].counts["epochs"] for name in starts] == [1.0, 1.0, 2.0]
    for number in (2, 3):
        assert finished_run.round(number).records()["policy"].counts["start"] == starts["policy"]
    rates = [json.loads(line)["learning_rate"] for line in (first.path / "weaker-metrics.jsonl").open()]
    assert rates[0] == max(rates) > rates[-1]


def test_deviation_o1_choice_is_the_mean_of_teacher_and_student(finished_run: RunDir) -> None:
    chosen = read_json(finished_run.round(1).path / "choice.json")
    assert set(chosen) == {"sums", "letters", "divisors"}
    assert any(one["figures"][one["strategy"]]["teacher"] == 1 for one in chosen.values())
    texts = load_strategies(STRATEGIES).candidates("sums")
    for one in chosen.values():
        means = {name: (found["teacher"] + found["student"]) / 2 for name, found in one["figures"].items()}
        assert one["strategy"] == choose(means, texts)


def test_deviation_o3_the_arms_hold_the_same_problems(finished_run: RunDir) -> None:
    erased, visible, plain = (rows_of(finished_run, number) for number in (1, 2, 3))
    single = [[row for row in rows if not row.demonstrations] for rows in (erased, visible, plain)]
    assert len({tuple(row.problem_id for row in rows) for rows in single}) == 1 and len(single[0]) > 4
    assert [row.completion for row in single[0]] == [row.completion for row in single[1]]
    assert all(a.completion != b.completion for a, b in zip(single[0], single[2], strict=True))
    assert any(row.demonstrations for row in erased)


def test_deviation_o4_the_cautious_message_is_ours_in_every_erased_row(finished_run: RunDir) -> None:
    message = f"<|im_start|>system\n{orca2.Config().orca.cautious}<|im_end|>\n"
    chosen = read_json(finished_run.round(1).path / "choice.json")
    told = [one["instruction"] for one in chosen.values()]
    assert all(row.prompt.startswith(message) for number in (1, 3) for row in rows_of(finished_run, number))
    assert not any(text in row.prompt for text in told for row in rows_of(finished_run, 1))
    assert all(any(text in row.prompt for text in told) for row in rows_of(finished_run, 2))


def test_a_rows_provenance_leads_to_the_teachers_tree_and_instruction(finished_run: RunDir) -> None:
    row = rows_of(finished_run, 1)[0]
    folder, _, name = row.tree_id.rpartition(f"{row.task}/train/")
    trees = {tree.tree_id: tree for tree in read_trees(finished_run.round(1).path / folder)}
    tree = trees[f"{row.task}/train/{name}"]
    assert tree.settings["system"] == row.teacher_system and len(tree.nodes) == 2
    assert tree.nodes[row.node_ids[0]].text == row.completion


def test_rows_of_explanation_tuning_keep_their_general_messages(finished_run: RunDir) -> None:
    rows = read_rows(finished_run.round(1).path / "weaker.jsonl", SftRow)
    assert all(any(text in row.prompt for row in rows) for text in load_strategies(STRATEGIES).messages.values())


def evaluated(done: RunDir, number: int) -> dict[str, Any]:
    return dict(read_json(done.round(number).eval_json)["methods"])


def test_every_round_is_measured_under_both_system_messages(finished_run: RunDir) -> None:
    for number in range(4):
        for method in ("greedy", "cautious"):
            found = evaluated(finished_run, number)[method]["measures"]
            assert {"accuracy", "macro mean", "format-OK"} <= set(found) and found["accuracy"]["n"] == 6
            assert ("strategy" in found) == (number > 0)
    titles = [table["title"] for table in read_json(finished_run.round(3).eval_json)["tables"]]
    assert "plain rows against the first arm" in titles
    trees = list(read_trees(finished_run.round(3).eval / "cautious"))
    assert {tree.settings["system"] for tree in trees} == {orca2.Config().orca.cautious}
    assert not any(leaf.reward is not None for tree in trees for leaf in tree.answers())  # no ground truth at test time


@pytest.mark.parametrize(
    ("override", "first_refused"),
    [
        ("flan.epochs=2", "1 flan"),
        ("flan.problems.seed=9", "1 flan-rows"),
        ("weaker.epochs=2", "1 weaker"),
        ("weaker_teacher.engine.model=other", "1 weaker-rows"),
        ("teacher.engine.model=other", "1 select"),
        ("orca.development=4", "1 select"),
        ("orca.student=false", "1 select"),
        ("orca.only_correct=false", "1 weaker-rows"),
        ("orca.few_shot=0.5", "1 extract"),
        ("sft.epochs=3", "1 policy"),
        ("rounds.r3.orca.arm=visible", "3 extract"),
        ("search.temperature=0.5", "1 weaker-rows"),  # evaluations are greedy whatever it is
        ("search.c=1", ""),
        ("orca.development=3", ""),
        ("teacher.engine.concurrency=3", ""),
        ("sft.micro_batch_tokens=512", ""),
    ],
)
def test_a_changed_setting_is_refused_by_the_first_stage_that_reads_it(
    finished_run: RunDir, override: str, first_refused: str
) -> None:
    refused = []
    for stage in orca2.RECIPE.planned(tiny_config(finished_run.path, override)):
        try:
            assert stage.finished() is not None
        except UserError as error:
            refused.append((f"{stage.round.number} {stage.name}", str(error)))
    assert [name for name, _ in refused[:1]] == [first_refused] * bool(first_refused)
    assert not refused or override.partition("=")[0].removeprefix("rounds.r3.") in refused[0][1]


def test_strategies_are_compared_by_the_contents_of_their_file(finished_run: RunDir, tmp_path: Path) -> None:
    def refused() -> list[str]:
        stages = orca2.RECIPE.planned(tiny_config(finished_run.path, f"orca.strategies={tmp_path / 's.yaml'}"))
        return [
            f"{stage.round.number} {stage.name}" for stage in stages if stage.changes(stage.round.records()[stage.name])
        ]

    (tmp_path / "s.yaml").write_bytes(STRATEGIES.read_bytes())
    assert refused() == []
    (tmp_path / "s.yaml").write_text(STRATEGIES.read_text().replace("Work in small steps", "Work slowly"))
    assert {"1 weaker-rows", "1 select", "1 extract", "0 eval"} <= set(refused())
    assert not {"1 flan", "1 answers", "1 policy"} & set(refused())
