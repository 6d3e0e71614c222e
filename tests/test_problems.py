import json
import math
import re
import time
from fractions import Fraction
from itertools import accumulate

import pytest

from rstar.config import ProblemsSection
from rstar.grading import normalise as answer_key
from rstar.problems import BENCHMARKS, ProblemSet, load_benchmark, load_problems, needs_image
from rstar.problems.agreement import agreeing_answer
from rstar.problems.overlap import Overlap, numbers_key, skeleton_key, text_key
from rstar.problems.worked import partial_results, worked_solution
from rstar.types import Problem, UserError

FAMILIES = {
    "sums": {
        "family": "chain_sum",
        "level": "1",
        "count": 20,
        "heldout": 8,
        "settings": {"max_terms": 3, "max_digits": 2},
    },
    "products": {"family": "products", "level": "2", "count": 20, "heldout": 8, "settings": {"max_digits": 2}},
    "words": {"family": "gsm_symbolic", "count": 10, "heldout": 4},
}
SMALL = {"sums": FAMILIES["sums"]}


def generated(**changes) -> ProblemSet:
    return load_problems(ProblemsSection(**{"families": FAMILIES, **changes}))


def file_section(path, **changes) -> ProblemsSection:
    return ProblemsSection(**{"name": "file", "path": str(path), "heldout": 0, **changes})


def write(path, rows, **options):
    path.write_text("".join(json.dumps(row, **options) + "\n" for row in rows), encoding="utf-8")
    return path


def sums(count, start=0):
    return [
        {"question": f"What is {n} plus one, asked for the number {n}?", "answer": str(n + 1)}
        for n in range(start, start + count)
    ]


def complaint(section) -> str:
    with pytest.raises(UserError) as caught:
        load_problems(section)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Generated families


def test_generated_problems_are_the_same_for_one_seed_and_others_for_another():
    assert generated() == generated()
    assert {p.question for p in generated(seed=2).train}.isdisjoint(p.question for p in generated().heldout)


def test_counts_levels_and_answers_are_as_asked():
    problems = generated()
    by_level = [(p.source, p.level) for p in problems.train]
    assert by_level.count(("chain_sum", "1")) == by_level.count(("products", "2")) == 20
    assert by_level.count(("gsm_symbolic", "words")) == 10
    assert len(problems.heldout) == 20
    assert all(eval(p.question.split(": ")[1].rstrip(" =")) == int(p.answer) for p in problems.train if p.level == "1")
    assert len({p.id for p in (*problems.train, *problems.heldout)}) == 70


def test_a_prefix_of_the_pool_holds_every_family():
    assert {p.source for p in generated(limit=6).train} == {"chain_sum", "products", "gsm_symbolic"}


def test_held_out_problems_share_no_text_and_no_numbers_with_the_pool():
    tiny = {"family": "products", "count": 18, "heldout": 12, "settings": {"max_digits": 1}}
    problems = generated(families={"a": tiny, "b": {**tiny, "settings": {"max_digits": 2}}})
    numbers = {numbers_key(p.question) for p in problems.heldout}
    assert not {text_key(p.question) for p in problems.train} & {text_key(p.question) for p in problems.heldout}
    assert not any(numbers_key(p.question) in numbers for p in problems.train)
    assert problems.dropped["same-numbers"] > 0


def test_the_held_out_set_does_not_depend_on_the_size_of_the_pool():
    more = {label: {**spec, "count": 3 * spec["count"]} for label, spec in FAMILIES.items()}
    large, small = generated(families=more), generated()
    assert large.heldout == small.heldout
    assert {p.question for p in small.train} <= {p.question for p in large.train}


def test_the_pool_repeats_no_problem_with_its_numbers():
    problems = generated(
        families={
            "sums": {"family": "chain_sum", "count": 60, "heldout": 0, "settings": {"max_terms": 2, "max_digits": 1}}
        }
    )
    assert len({skeleton_key(p.question) for p in problems.train}) == 60


def test_a_family_that_is_too_small_says_so():
    tiny = {"family": "products", "count": 500, "heldout": 0, "settings": {"max_digits": 1}}
    assert "problems.families.tiny gave" in complaint(ProblemsSection(families={"tiny": tiny}))


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"family": "chain_sums"}, "chain_sum"),
        ({"family": "chain_sum", "counts": 3}, "problems.families.x.count"),
        ({"family": "chain_sum", "count": -1}, "0 or more"),
        ({"family": "chain_sum", "settings": {"max_term": 3}}, "max_term"),
        ({"family": "chain_sum", "settings": {"min_terms": 9, "max_terms": 2}}, "do not fit"),
    ],
)
def test_a_wrong_family_entry_is_named(spec, said):
    assert said in complaint(ProblemsSection(families={"x": spec}))


def test_without_families_there_is_a_default_ladder_with_the_asked_held_out_size():
    problems = load_problems(ProblemsSection(heldout=13))
    assert len(problems.heldout) == 13
    assert len({p.source for p in problems.train}) == 5


def test_generating_takes_milliseconds_a_problem():
    generated(families=SMALL)  # imports
    start = time.process_time()
    generated(families={"sums": {"family": "chain_sum", "count": 500, "heldout": 50}})
    assert time.process_time() - start < 2.0


def test_levels_keep_only_what_is_asked_for():
    problems = generated(levels=["2"])
    assert {p.level for p in problems.train} == {p.level for p in problems.heldout} == {"2"}
    assert "levels of the pool: 1, 2, words" in complaint(ProblemsSection(families=FAMILIES, levels=["3"]))


# Files


def test_every_file_kind_reads_alike(tmp_path):
    rows = [{"question": 'a, "b"\nand\u2028c?', "answer": "1"}, {"question": "d", "answer": "2"}]
    write(tmp_path / "x.jsonl", rows, ensure_ascii=False)
    (tmp_path / "x.json").write_text(json.dumps({"data": rows}))
    (tmp_path / "x.csv").write_text(
        'question,answer\r\n"a, ""b""\nand\u2028c?",1\r\nd,2\r\n', encoding="utf-8", newline=""
    )
    parquet = pytest.importorskip("pyarrow.parquet")
    arrow = pytest.importorskip("pyarrow")
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    loaded = [load_problems(file_section(tmp_path / f"x.{kind}")).train for kind in ("jsonl", "json", "csv", "parquet")]
    assert [(p.question, p.answer) for p in loaded[0]] == [(row["question"], row["answer"]) for row in rows]
    assert all(other == loaded[0] for other in loaded)


def test_byte_order_mark_and_windows_line_ends_do_no_harm(tmp_path):
    body = '\ufeff{"question": "a", "answer": 1}\r\n\r\n{"question": "b", "answer": 2.5}\r\n'
    (tmp_path / "x.jsonl").write_bytes(body.encode())
    assert [(p.question, p.answer) for p in load_problems(file_section(tmp_path / "x.jsonl")).train] == [
        ("a", "1"),
        ("b", "2.5"),
    ]


def test_field_names_can_be_mapped_and_a_wrong_map_lists_the_fields(tmp_path):
    write(tmp_path / "x.jsonl", [{"frage": "a", "antwort": "1"}])
    assert load_problems(file_section(tmp_path / "x.jsonl", question="frage", answer="antwort")).train[0].answer == "1"
    assert "frage, antwort" in complaint(file_section(tmp_path / "x.jsonl"))


def test_gsm8k_and_boxed_answers_are_cut_to_the_final_answer(tmp_path):
    solution = "48/2 = <<48/2=24>>24\n#### 1,024"
    rows = [
        {"question": "a", "answer": solution},
        {"question": "b", "answer": "So $\\boxed{\\frac{1}{2}}$."},
        {"question": "c", "answer": ["1", "2"]},
        {"question": "d", "answer": "7 * 2 = 14\n#### 15\nThe answer is: 15"},  # MetaMath's kinds of records
        {"question": "e", "answer": "So it is $\\boxed{14}$. The answer is: 14"},
        {"question": "f", "answer": "Half of 28 is 14.\nThe answer is: 14"},
    ]
    train = load_problems(file_section(write(tmp_path / "x.jsonl", rows))).train
    assert [p.answer for p in train] == ["1024", "\\frac{1}{2}", "1, 2", "15", "14", "14"]
    assert train[0].solution == solution


def test_a_tab_that_was_a_latex_command_is_mended(tmp_path):
    rows = [{"question": "a", "answer": "\tfrac32"}]  # written as "\tfrac32" instead of "\\tfrac32"
    assert load_problems(file_section(write(tmp_path / "x.jsonl", rows))).train[0].answer == "\\tfrac32"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "holds no records"),
        (b'{"question": "a", "answer": "1"}\n{"question": "b"}\n', "x.jsonl:2 has no answer"),
        (b'{"question": "a", "answer": "1"}\n{"question": "b", "answer": ""}\n', "x.jsonl:2 has no answer"),
        (b'{"question": "a", "answer": null}\n', "x.jsonl:1 has no answer"),
        (b'{"question": " ", "answer": "1"}\n', "x.jsonl:1 has no question"),
        (b'{"question": "a", "answer": "1"}\n{"question": "\xe9", "answer": "1"}\n', "x.jsonl:2 is not UTF-8"),
        (b'{"question": "a", "answer": "1"}\n{"question": \n', "x.jsonl:2 is not JSON"),
        (b"[1, 2]\n", "x.jsonl:1 is a list"),
        (b"[" * 100_000, "x.jsonl:1"),
        (b'{"question": "' + b"a" * 10_000_000 + b'", "answer": "1"}\n', "x.jsonl:1 is longer than 4 MiB"),
    ],
)
def test_a_bad_line_is_named(tmp_path, content, said):
    (tmp_path / "x.jsonl").write_bytes(content)
    assert said in complaint(file_section(tmp_path / "x.jsonl"))


def test_other_file_kinds_name_what_is_wrong(tmp_path):
    (tmp_path / "x.csv").write_bytes(b"question,answer\na,1\n\xff,2\n")
    assert "x.csv:3 is not UTF-8" in complaint(file_section(tmp_path / "x.csv"))
    (tmp_path / "x.json").write_text('"a text"')
    assert "holds no list" in complaint(file_section(tmp_path / "x.json"))
    (tmp_path / "x.parquet").write_bytes(b"PAR1 not really")
    assert "not a readable parquet" in complaint(file_section(tmp_path / "x.parquet"))
    (tmp_path / "x.txt").write_text("a")
    assert "unknown kind" in complaint(file_section(tmp_path / "x.txt"))
    assert "no file" in complaint(file_section(tmp_path / "missing.jsonl"))
    assert "problems.path=FILE" in complaint(ProblemsSection(name="file"))


def test_one_id_with_two_texts_is_an_error_and_with_one_text_a_duplicate(tmp_path):
    same = [{"id": "7", "question": "a?", "answer": "1"}, {"id": "7", "question": " A? ", "answer": "1"}]
    problems = load_problems(file_section(write(tmp_path / "x.jsonl", same)))
    assert len(problems.train) == 1
    assert problems.dropped == {"duplicate": 1}
    other = [same[0], {"id": "7", "question": "b?", "answer": "1"}]
    assert "'7'" in complaint(file_section(write(tmp_path / "y.jsonl", other)))


def test_the_last_problems_are_held_out(tmp_path):
    path = write(tmp_path / "x.jsonl", sums(10))
    problems = load_problems(file_section(path, heldout=3, limit=5))
    assert [p.answer for p in problems.heldout] == ["8", "9", "10"]
    assert len(problems.train) == 5
    assert problems.dropped["limit"] == 2
    assert "held-out" in complaint(file_section(path, heldout=10))


def test_a_held_out_file_replaces_the_split(tmp_path):
    path, held = write(tmp_path / "x.jsonl", sums(5)), write(tmp_path / "h.jsonl", sums(4, 3))
    problems = load_problems(file_section(path, heldout_path=str(held)))
    assert [p.answer for p in problems.heldout] == ["4", "5", "6", "7"]
    assert [p.answer for p in problems.train] == ["1", "2", "3"]
    assert problems.dropped == {"contaminated": 2}
    assert {name for _, name in problems.contaminated} == {"heldout"}


def test_what_a_held_out_file_loses_is_counted(tmp_path):
    held = write(tmp_path / "h.jsonl", [*sums(2, 8), sums(1, 8)[0]])
    problems = load_problems(file_section(write(tmp_path / "x.jsonl", sums(3)), heldout_path=str(held)))
    assert len(problems.heldout) == 2 and problems.dropped == {"held-out duplicate": 1}


def test_problems_that_overlap_with_a_named_set_are_removed_and_listed(tmp_path):
    shared = "a train leaves the station at noon and travels north at forty miles per hour for"
    pool = [{"question": f"{shared} two hours. How far?", "answer": "80"}, *sums(3)]
    bench = [
        {"question": f"Once {shared} nine hours; where is it?", "answer": "360"},
        {"question": "WHAT is 0 plus one, asked for the number 0", "answer": "1"},
    ]
    problems = load_problems(
        file_section(write(tmp_path / "x.jsonl", pool), decontaminate=[str(write(tmp_path / "b.jsonl", bench))])
    )
    assert [p.answer for p in problems.train] == ["2", "3"]
    assert problems.dropped == {"contaminated": 2}
    assert [ident for ident, _ in problems.contaminated] == ["x/0", "x/1"]
    assert "math500" in complaint(file_section(tmp_path / "x.jsonl", decontaminate=["math50"]))


def test_thirteen_shared_words_overlap_and_twelve_do_not():
    words = [f"word{n}" for n in range(13)]
    overlap = Overlap("b", [Problem("1", " ".join(words) + " end", "1")])
    assert overlap.touches("start " + " ".join(words))
    assert not overlap.touches("start " + " ".join(words[:12]) + " other")
    assert not Overlap("b", [Problem("1", "x+1", "1")]).touches("x-1")


def test_image_dependent_problems_are_counted_not_trained_on(tmp_path):
    rows = [
        *sums(1),
        {"question": "Find x in ![figure](a.png).", "answer": "1"},
        {"question": "As shown in the figure below, find y.", "answer": "1"},
    ]
    assert load_problems(file_section(write(tmp_path / "x.jsonl", rows))).dropped == {"image": 2}
    assert not needs_image("The figure below [asy] draw((0,0)--(1,1)); [/asy] shows a line.")
    assert not needs_image("Below is a list of figures in a museum. How many are shown?")


def test_references_that_no_answer_can_equal_are_counted_with_an_example(tmp_path):
    essay = "Each day the number of lilies doubles, which we can write as a power of two. Hence the answer is 64."
    answers = [
        {"value": 3},
        float("nan"),
        essay,
        "B) 72 apples",
        "\\boxed{5} because of the second line above",
        7,
        [1, 2],
    ]
    prose = "We show by induction over the number of edges that every graph of this kind has a path."
    rows = [{"question": f"{n}?", "answer": answer} for n, answer in enumerate([*answers, prose])]
    problems = load_problems(file_section(write(tmp_path / "x.jsonl", rows)))
    assert [p.answer for p in problems.train] == ["64", "B) 72 apples", "5", "7", "1, 2"]
    assert problems.train[0].solution == essay
    assert problems.dropped == {"unreadable answer": 3}
    assert problems.left_out() == ["left out: 3 unreadable answer, the first is x/0: an object (\"{'value': 3}\")"]
    (tmp_path / "y.csv").write_text("question,answer\na,NaN\n")
    assert "1 unreadable answer; unreadable answer: y/0: no value ('NaN')" in complaint(
        file_section(tmp_path / "y.csv")
    )
    held = file_section(write(tmp_path / "z.jsonl", sums(2)), heldout_path=str(tmp_path / "x.jsonl"))
    assert load_problems(held).dropped == {"held-out unreadable answer": 3}


# Synthetic problems


@pytest.mark.parametrize(
    ("answers", "agreed"),
    [
        (["3"] * 3 + ["4"] * 2 + ["5"] * 5, "5"),
        (["3", "3", "4", "5", "6", "7", "8", "9", "10", "11"], None),
        (["1/2", "0.5", "\\frac{1}{2}", "2"], "1/2"),
        (["\\dfrac12", "$\\frac{1}{2}$", " 1/2 ", "7", "7"], "\\dfrac12"),
        (["1,000", "1000", "1000.0"], "1,000"),
        (["x+1", "x + 1", "x+1.", "x-1"], "x+1"),
        (["2"] * 3 + ["3"] * 3, None),  # no majority
        (["", " ", ""], None),
        ([], None),
        (["1/0", "1/0", "1/0"], "1/0"),
        (["9" * 4000] * 3, "9" * 4000),
    ],
)
def test_a_synthetic_answer_needs_three_that_agree(answers, agreed):
    assert agreeing_answer(answers, 3) == agreed


def test_different_numbers_never_agree():
    values = ["0.5", "-0.5", "5", "0.05", "1/3", "0.333", "12", "1.2", "\\frac{12}{5}", "(1,2)", "12/50"]
    assert len({answer_key(value) for value in values}) == len(values)
    assert answer_key("\\frac{12}{5}") == answer_key("2.4") == answer_key("12/5")


def test_synthetic_problems_whose_solutions_disagree_are_dropped_and_counted(tmp_path):
    agree = ["so \\boxed{4}", "it is \\boxed{4.0}", "\\boxed{4}", "\\boxed{5}"]
    rows = [
        {"question": "agreed?", "solutions": agree, "level": "made"},
        {"question": "split?", "solutions": ["\\boxed{1}", "\\boxed{2}", "\\boxed{3}"]},
        {"question": "against its own answer?", "answer": "5", "solutions": agree},
        {"question": "with its own answer?", "answer": "4", "solutions": agree},
        {"question": "not synthetic?", "answer": "9"},
        {"question": "not synthetic either?", "answer": "9", "solutions": []},
    ]
    path = write(tmp_path / "x.jsonl", rows)
    problems = load_problems(file_section(path, answers="solutions"))
    assert [(p.question, p.answer, p.source) for p in problems.train] == [
        ("agreed?", "4", "synthetic"),
        ("with its own answer?", "4", "synthetic"),
        ("not synthetic?", "9", "x"),
        ("not synthetic either?", "9", "x"),
    ]
    assert problems.dropped == {"disagreement": 2} and problems.train[0].level == "made"
    assert len(load_problems(file_section(path, answers="solutions", min_agreement=4)).train) == 2
    assert "is no synthetic problem" in complaint(
        file_section(write(tmp_path / "y.jsonl", [{"question": "a", "solutions": "text"}]), answers="solutions")
    )


def test_a_field_of_the_file_can_serve_as_level(tmp_path):
    rows = [{"question": f"{n}?", "answer": "1", "kind": "olympiads" if n else "school"} for n in range(3)]
    section = file_section(write(tmp_path / "x.jsonl", rows), level="kind", levels=["olympiads"])
    assert len(load_problems(section).train) == 2 and load_problems(section).dropped == {"level": 1}


def test_levels_of_the_pool_leave_a_held_out_file_alone(tmp_path):
    train = write(tmp_path / "x.jsonl", [{"question": f"{n}?", "answer": "1", "level": "olympiads"} for n in range(3)])
    heldout = write(tmp_path / "math500.jsonl", [{"question": "own?", "answer": "1", "level": "5"}])
    problems = load_problems(file_section(train, levels=["olympiads"], heldout_path=str(heldout)))
    assert [problem.question for problem in problems.heldout] == ["own?"]


# Benchmarks


def test_the_paper_s_benchmarks_are_known():
    assert {b.column for b in BENCHMARKS.values() if b.column} == {
        "MATH",
        "AIME24",
        "AMC23",
        "Olympiad",
        "College",
        "GSM8K",
        "Gaokao",
    }
    paper = {name: b for name, b in BENCHMARKS.items() if b.column}
    assert all(b.size > 0 and (b.hub_id or name == "collegemath") for name, b in paper.items())


def test_a_benchmark_reads_from_a_local_file_in_either_layout(tmp_path):
    paper = write(tmp_path / "aime.jsonl", [{"index": 3, "question": "q", "answer": "033"}])
    hub = write(tmp_path / "hub.jsonl", [{"problem": "q", "answer": 33, "solution": "s"}])
    assert load_benchmark("aime24", path=str(paper))[0] == Problem("aime24/3", "q", "033", "aime24")
    assert load_benchmark("aime24", path=str(hub))[0].answer == "33"
    train = load_problems(ProblemsSection(name="aime24", path=str(paper), heldout=0)).train
    assert train[0].source == "aime24"


def test_an_unknown_name_gets_the_nearest_one():
    assert "the nearest name is gsm8k" in complaint(ProblemsSection(name="gsm-8k"))
    with pytest.raises(UserError, match="math500"):
        load_benchmark("math-500")


def test_a_benchmark_without_network_names_the_local_way(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def unreachable(*_, **__):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    said = complaint(ProblemsSection(name="gsm8k"))
    assert "problems.path=FILE" in said
    assert "no route" in said
    assert "problems.path=FILE" in complaint(ProblemsSection(name="collegemath"))


def test_a_benchmark_reads_the_hub_s_records(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def served(hub_id, config, split):
        asked.append((hub_id, config, split))
        return [{"problem": f"{config}?", "solution": "so \\boxed{3}", "level": "Level 5"}]

    monkeypatch.setattr(datasets, "load_dataset", served)
    problems = load_benchmark("math")
    assert len(problems) == len(asked) == 7
    assert (problems[0].answer, problems[0].level, problems[0].solution) == ("3", "5", "so \\boxed{3}")
    assert len({p.id for p in problems}) == 7


# Worked solutions


def word_problem(question, solution, answer, source="file"):
    return Problem("w", question, answer, source, solution=solution)


def test_calculator_annotations_become_named_steps_that_use_earlier_results():
    worked = worked_solution(
        word_problem(
            "Natalia sold clips to 48 friends in April, and half as many in May. How many altogether?",
            "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n"
            "She sold 48+24 = <<48+24=72>>72 clips altogether.\n#### 72",
            "72",
        )
    )
    assert worked is not None
    assert worked.steps[0] == ("Natalia sold clips in May", "clips_may = 48 / 2")
    assert worked.steps[1][1] == "clips_altogether = 48 + clips_may"
    assert (worked.result, worked.printed) == ("clips_altogether", "72.0")


def test_thoughts_never_tell_a_result():
    for problem in generated(families={"words": {"family": "gsm_symbolic", "count": 60, "heldout": 0}}).train:
        worked = worked_solution(problem)
        assert worked is None or not any(c.isdigit() for thought, _ in worked.steps for c in thought)


@pytest.mark.parametrize(
    ("solution", "answer", "steps"),
    [
        ("125 students - 64 girls = 61 boys\n61 boys - 5 absent = 56 boys", "56", 2),
        ("7 days/week * 5 weeks/month = 35 days/month\n€100/day * 35 days/month = €3500/month", "3500", 2),
        ("He pays 50 x €3 = €150.", "150", 1),
        ("<<2,000*3=6000>>6,000 in all", "6000", 1),
        ("20% of it: <<50*20%=10>>10", "10", 1),
        ("It is <<.5*10=5>>5 and <<05+5=10>>10", "10", 1),
    ],
)
def test_calculations_are_read_with_their_units(solution, answer, steps):
    worked = worked_solution(word_problem("Some question.", solution, answer))
    assert worked is not None
    assert len(worked.steps) == steps
    assert float(worked.printed) == float(answer)


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        ("<<2+2=4>>4", "5"),  # prints something else
        ("<<2+2=5>>5", "5"),  # does not come out
        ("It is obvious.", "5"),
        ("<<0.1*3=0.3>>0.3", "0.3"),  # a float prints 0.30000000000000004
        ("<<9**9**9=5>>5 __import__('os') = 5", "5"),
        ("<<1/0=5>>5", "5"),
    ],
)
def test_a_program_that_does_not_print_the_answer_is_not_kept(solution, answer):
    assert worked_solution(word_problem("Some question.", solution, answer)) is None


def test_two_results_never_share_a_name():
    lines = "\n".join(f"He has <<{n}+100={n + 100}>>{n + 100} apples." for n in range(10, 16))
    worked = worked_solution(word_problem("Q", lines, "115"))
    names = [code.partition(" = ")[0] for _, code in worked.steps]
    assert len(set(names)) == 6 and all(name.isidentifier() for name in names)


@pytest.mark.parametrize("family", ["chain_sum", "products", "basic_arithmetic", "lcm", "gcd", "simple_equations"])
def test_templates_solve_their_family_and_python_agrees(family):
    problems = generated(families={"f": {"family": family, "count": 60, "heldout": 0}}).train
    worked = [worked_solution(problem) for problem in problems]
    assert sum(w is not None for w in worked) >= 58
    for w in filter(None, worked):
        names: dict[str, object] = {}
        exec("\n".join(code for _, code in w.steps), names)  # our own generated arithmetic
        assert str(names[w.result]) == w.printed


def test_most_generated_word_problems_get_a_program():
    problems = generated(families={"words": {"family": "gsm_symbolic", "count": 150, "heldout": 0}}).train
    worked = [worked_solution(problem) for problem in problems]
    assert sum(w is not None for w in worked) >= 120
    assert sum(len(w.steps) >= 2 for w in worked if w is not None) >= 80


EVERY_FAMILY = {
    name: {"family": name, "count": 30, "heldout": 10, "settings": settings}
    for name, settings in {
        "chain_sum": {"min_terms": 2, "max_terms": 6, "min_digits": 1, "max_digits": 2},
        "products": {"min_terms": 2, "max_terms": 3, "max_digits": 2},
        "basic_arithmetic": {"min_terms": 3, "max_terms": 5, "max_digits": 1},
        "lcm": {"max_numbers": 3},
        "gcd": {"max_numbers": 3},
        "simple_equations": {},
        "gsm_symbolic": {},
    }.items()
}


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_no_generated_problem_is_answered_by_half_a_solution_or_a_number_of_its_question(seed: int) -> None:
    problems = generated(families=EVERY_FAMILY, seed=seed)
    assert (len(problems.train), len(problems.heldout)) == (30 * 7, 10 * 7) and problems.dropped["partial-result"]
    for problem in (*problems.train, *problems.heldout):
        answer, shown = Fraction(problem.answer), [Fraction(n) for n in re.findall(r"[0-9]+", problem.question)]
        assert answer not in partial_results(problem) and answer not in shown, problem
        match problem.source:
            case "chain_sum":  # told apart here by other means than partial_results does
                terms = re.search(r"[0-9]+(?: [-+] [0-9]+)+", problem.question)
                assert terms is not None
                sums = list(accumulate(int(term) for term in re.findall(r"[-+]?[0-9]+", terms[0].replace(" ", ""))))
                assert sums[-1] == answer and answer not in sums[:-1], problem
            case "products":
                assert answer not in accumulate(shown[:-1], lambda a, b: a * b), problem
            case "lcm":
                assert answer != math.prod(int(n) for n in shown), problem
            case "gcd":
                assert len(shown) < 3 or answer != math.gcd(int(shown[0]), int(shown[1])), problem


@pytest.mark.parametrize(
    ("family", "question", "answer", "values"),
    [
        ("chain_sum", "State the final answer: 79 + 40 + 78 + 31 - 31 =", "197", {79, 119, 197, 228}),
        ("basic_arithmetic", "Calculate 2 + 3 * 4 - 1.", "13", {2, 5, 14, 20, 12}),
        ("basic_arithmetic", "Calculate 9 - ( 6 + 4 ) / 2.", "4", {3, 5, 10}),
        ("basic_arithmetic", "Calculate -( 3 - 8 ) * 1.", "5", {-3, -11, -5, 5}),
        ("products", "Solve: 6 * 3 * 10.", "180", {18, 6}),
        ("lcm", "Find the Least Common Multiple (LCM) of these numbers: 6, 35", "210", {210, 6, 35}),
        ("lcm", "Find the Least Common Multiple (LCM) of these numbers: 4, 6, 3", "12", {12, 72}),
        ("gcd", "Find the Greatest Common Divisor (GCD) of these numbers: 12, 18, 10", "2", {6}),
        ("gcd", "Find the Greatest Common Divisor (GCD) of these numbers: 12, 36", "12", {12, 36}),
        ("simple_equations", "Solve for k: 5*k - 10 = 40", "10", {5, 50, 40, 10}),
    ],
)
def test_partial_results_of_generated_families(family: str, question: str, answer: str, values: set[int]) -> None:
    assert values <= partial_results(Problem("p", question, answer, family))


def test_partial_results_of_word_problems_are_those_of_their_solution_and_of_pairs_of_numbers() -> None:
    solution = "He eats 4 + 8 + 2 = 14 tacos a day.\nThat is 14 * 30 = 420 tacos.\n#### 420"
    problem = Problem("p", "4, 8 and 2 tacos a day. How many in a month?", "420", "gsm_symbolic", solution=solution)
    found = partial_results(problem)
    assert {14, 12, 4, 8, 2, 30, 4 * 8, 8 - 4, Fraction(1, 2)} <= found and 420 not in found
    one_step = Problem("p", "4 and 8 tacos. How many?", "12", "gsm_symbolic", solution="4 + 8 = 12\n#### 12")
    assert partial_results(one_step) == {4, 8}


def test_problems_of_other_sources_have_no_partial_results_that_are_known() -> None:
    assert partial_results(Problem("p", "What is 1 + 1?", "2", "letter_counting")) == set()
