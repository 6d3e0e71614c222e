"""`rstar eval MODEL...`: every method on a simulated engine, resume, tables, plot; a PPM measured by itself."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from rstar.cli import run
from rstar.comparison import ppm_quality
from rstar.comparison.methods import Line, Records, equal_tokens, lines, rows
from rstar.comparison.ppm_quality import best_threshold, calibration, first_errors, on_trees
from rstar.comparison.published import COLUMNS, PUBLISHED
from rstar.comparison.run import (
    _READ,
    Contender,
    Questions,
    Settings,
    _pass,
    _scored,
    load_questions,
    measured,
    read_records,
    read_settings,
    usable,
)
from rstar.comparison.write import write_comparison
from rstar.config import ExtractSection, ModelSection, ProblemsSection, SearchSection
from rstar.engines.base import ContextOverflow
from rstar.engines.simulated import SimulatedScorer, arithmetic_score
from rstar.evaluation import Candidate, EvalRecord
from rstar.search.mcts import Mcts
from rstar.search.worker import SearchTask
from rstar.store import TreeWriter, index
from rstar.tree import Tree
from rstar.types import Problem, PromptText, UserError
from tests.fakes import branching, grow

SIMULATED = (
    "engine=simulated", 'model.template="{question}\n"', "sandbox.processes=1", "search.trees_in_flight=8",
    "search.beam_width=2", "eval.candidates=2", "eval.rollouts=1",
)  # fmt: skip
METHODS = "greedy,sample,maj,bon,beam,dvts,mcts"
CONFIGS = Path(__file__).parent.parent / "configs"


def sums(path: Path, count: int) -> Path:
    questions = ["12 + 7 =", "9 * 9 - 1 =", "5 + 25 - 2 ="][:count]
    records = [{"question": q, "answer": str(eval(q.rstrip(" =")))} for q in questions]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


# -- the whole command -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A finished comparison of two models (the same one, twice) and the command that made it."""
    folder = tmp_path_factory.mktemp("eval")
    made = ["eval", "one", "two", "--benchmarks", str(sums(folder / "sums.jsonl", 2)), "--ppm", "P", "--orm", "O"]
    made += ["--methods", METHODS, "--trajectories", "1,2", "--out", str(folder / "out"), *SIMULATED]
    assert run(made) == 0
    shutil.copy(folder / "out" / "records.jsonl", folder)  # a test that goes on from here writes others
    return made


def out_of(command: Sequence[str]) -> Path:
    return Path(command[command.index("--out") + 1])


def test_every_method_has_a_row_with_interval_cost_and_paired_test(command: list[str]) -> None:
    found = json.loads((out_of(command) / "results.json").read_text())
    labels = [f"{row['method']} @{row['trajectories']}" for row in found["rows"] if row["model"] == "one"]
    assert labels == [
        "greedy @1", "pass @1", "pass @2", "majority @2", "weighted majority PPM @2", "weighted majority ORM @2",
        "best-of-n PPM @2", "best-of-n ORM @2", "beam @1", "beam @2", "dvts @1", "dvts @2", "mcts top score @1",
        "mcts top score @2", "mcts majority of top 8 @2", "mcts weighted @2",
    ]  # fmt: skip
    for row in found["rows"]:
        accuracy = row["accuracy"]
        assert 0 <= accuracy["low"] <= accuracy["mean"] <= accuracy["high"] <= 1 and accuracy["n"] == 2
        assert row["tokens"] > 0 and row["engine_calls"] > 0 and row["seconds"] > 0
        assert (row["against_first"] is None) == (row is found["rows"][0])
    one, two = ([r["accuracy"] | {"t": r["tokens"]} for r in found["rows"] if r["model"] == m] for m in ("one", "two"))
    assert one == two  # the simulated policy does not know its name


def test_tokens_are_those_of_the_trees(command: list[str]) -> None:
    found = json.loads((out_of(command) / "results.json").read_text())
    cost = {(r["method"], r["trajectories"]): r["tokens"] for r in found["rows"] if r["model"] == "one"}
    assert cost["pass", 1] * 2 == pytest.approx(cost["pass", 2]) == cost["best-of-n ORM", 2] == cost["majority", 2]
    assert cost["mcts top score", 1] < cost["mcts top score", 2] == cost["mcts weighted", 2]
    records = [json.loads(line) for line in (out_of(command) / "records.jsonl").read_text().splitlines()]
    mine = [r for r in records if (r["model"], r["answers"], r["trajectories"]) == ("one", "mcts", 2)]
    assert sum(r["tokens"] for r in mine) / 2 == cost["mcts top score", 2]


def test_verifiers_score_the_same_samples(command: list[str]) -> None:
    records = [json.loads(line) for line in (out_of(command) / "records.jsonl").read_text().splitlines()]
    by_way = {way: [r for r in records if r["answers"] == way] for way in ("sample", "sample PPM", "sample ORM")}
    answers = [[[(c["answer"], c["count"]) for c in r["candidates"]] for r in found] for found in by_way.values()]
    assert answers[0] == answers[1] == answers[2] and any(answers[0])
    assert all(c["score"] is None for r in by_way["sample"] for c in r["candidates"])
    assert all(-1 <= c["score"] <= 1 for r in by_way["sample ORM"] for c in r["candidates"])


def test_the_same_command_searches_nothing_again(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    out = out_of(command)
    before, shards = (out / "results.json").read_bytes(), sorted((out / "trees").rglob("*.zst"))
    sizes = [shard.stat().st_size for shard in shards]
    assert run(command) == 0
    assert (out / "results.json").read_bytes() == before and [shard.stat().st_size for shard in shards] == sizes
    counts = re.findall(r"(\d+) problems, (\d+) already done", capsys.readouterr().out)
    assert counts == [("10", "10"), ("2", "2"), ("2", "2")] * 2


def test_more_searches_and_problems_add_to_what_is_there(command: list[str], tmp_path: Path) -> None:
    made = [*command]
    made[1:3] = ["one"]
    made[made.index("--methods") + 1] = "greedy,beam"
    made[made.index("--trajectories") + 1] = "1,3"
    folder = next((out_of(command) / "trees" / "one" / "sums").glob("beam-*"))
    assert {ref.tree_id for ref in index(folder).values()} == {f"sums/{i}#{seed}" for i in (0, 1) for seed in (0, 1)}
    assert run([*made, "--limit", "1"]) == 0
    assert set(index(folder)) == {"sums/0#0", "sums/0#1", "sums/0#2", "sums/1#0", "sums/1#1"}
    found = json.loads((out_of(command) / "results.json").read_text())
    assert found["benchmarks"][0]["problems"] == 1 and {r["trajectories"] for r in found["rows"]} == {1, 3}


def test_a_model_is_known_again_beside_another_of_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Named after its folder alone it is "policy", beside another run's policy "a/policy"."""
    models = [str(tmp_path / run_ / "policy") for run_ in ("a", "b")]
    rest = [
        "--benchmarks",
        str(sums(tmp_path / "sums.jsonl", 2)),
        "--methods",
        "greedy",
        "--out",
        str(tmp_path / "out"),
    ]
    assert run(["eval", models[0], *rest, *SIMULATED]) == 0
    capsys.readouterr()
    assert run(["eval", *models, *rest, *SIMULATED]) == 0
    assert re.findall(r"(\d+) problems(, \d+ already done)?", capsys.readouterr().out) == [
        ("2", ", 2 already done"), ("2", ""),
    ]  # fmt: skip


def test_other_examples_in_the_prompt_are_answered_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shots = tmp_path / "shots.yaml"
    made = ["eval", "one", "--benchmarks", str(sums(tmp_path / "sums.jsonl", 2)), "--methods", "greedy"]
    made += ["--out", str(tmp_path / "out"), *SIMULATED, f"model.few_shot={shots}"]
    for question in ("1 + 1?", "2 + 2?"):
        shots.write_text(f"- {{question: '{question}', solution: 'The answer is 2.'}}\n")
        capsys.readouterr()
        assert run(made) == 0
        assert "already done" not in capsys.readouterr().out


def test_answers_made_under_other_limits_are_made_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = ["eval", "one", "--benchmarks", str(sums(tmp_path / "sums.jsonl", 2)), "--methods", "greedy"]
    made += ["--out", str(tmp_path / "out"), *SIMULATED]
    said = []
    for limit in ("engine.max_context=512", "engine.max_context=2048", "engine.threads=2"):
        assert run([*made, limit]) == 0
        said.append("already done" in capsys.readouterr().out)
    assert said == [False, False, True]  # threads limit nothing


@pytest.mark.parametrize("methods", ["greedy,sample", "beam,dvts", "mcts"])
def test_settings_that_a_method_is_said_not_to_read_change_no_answer_of_it(
    methods: str, command: list[str], tmp_path: Path
) -> None:
    ways = methods.split(",")
    unread = set(OTHER) - set.union(*(set(_READ[way]) for way in ways)) - {"seeds", "rollouts", "candidates"}
    made = [*command, *(f"search.{key}={OTHER[key]}" for key in sorted(unread))]
    made += [] if ways == ["mcts"] else ["eval.rollouts=3"]
    made += ["eval.candidates=3"] if "greedy" in ways else []
    made[1:3] = ["one"]
    made[made.index("--methods") + 1], made[made.index("--out") + 1] = methods, str(tmp_path / "out")
    assert run(made) == 0

    def answers(folder: Path) -> list[dict[str, Any]]:
        records = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
        mine = [r for r in records if r["model"] == "one" and r["answers"].split()[0] in ways]
        return [{key: value for key, value in r.items() if key != "seconds"} for r in mine]

    assert answers(tmp_path / "out") == answers(out_of(command).parent) != []


def test_plot_and_markdown_are_whole(command: list[str]) -> None:
    svg = ElementTree.parse(out_of(command) / "accuracy_vs_tokens.svg").getroot()
    assert svg.tag.endswith("svg") and len(list(svg.iter("{http://www.w3.org/2000/svg}polyline"))) >= 2
    text = (out_of(command) / "results.md").read_text()
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("| ")]
    assert all(len({line.replace("\\|", "").count("|") for line in table}) == 1 for table in tables)
    assert tables[0][0].split(" | ")[2:9] == list(COLUMNS)
    assert "(paper," not in text  # a file of one's own has no figures of the paper beside it


def test_samples_alone_are_plotted_though_nothing_chooses_among_them(tmp_path: Path) -> None:
    q = Questions("q", tuple(Problem(f"p{i}", "?", "7") for i in range(2)), "", "")
    found = measured([Contender("m", "m")], [q], ["sample"], [1, 4], {("m", "q"): by_hand()}, top_k=8)
    write_comparison(found, Settings(model=ModelSection(base="m")), tmp_path)
    assert "polyline" in (tmp_path / "accuracy_vs_tokens.svg").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["m"], "--benchmarks"),
        (["m", "--benchmarks", "gsm9k"], "gsm8k"),
        (["m", "--benchmarks", "none.jsonl"], "none.jsonl"),
        (["m", "--benchmarks", "gsm8k=none.jsonl"], "none.jsonl"),
        (["m", "--benchmarks", "{sums}", "--methods", "mcts"], "--ppm"),
        (["m", "--benchmarks", "{sums}", "--methods", "best"], "bon"),
        (["m", "--benchmarks", "{sums}", "--trajectories", "4,x"], "--trajectories"),
        (["m", "--benchmarks", "{sums}", "--methods", "maj", "--trajectories", "1"], "nothing to choose"),
        (["m", "m", "--benchmarks", "{sums}"], "twice"),
        (["a", "b", "c", "--ppm", "p", "--ppm", "q", "--benchmarks", "{sums}"], "one for each"),
        (["m", "--benchmarks", "{sums}", "serch.c=1"], "search"),
        (["m", "--ppm-quality", "{tmp}"], "no trees"),
    ],
)
def test_mistakes_are_answered_in_one_line(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = sums(tmp_path / "sums.jsonl", 1)
    made = [text.replace("{sums}", str(file)).replace("{tmp}", str(tmp_path)) for text in arguments]
    assert run(["eval", *made, "--out", str(tmp_path / "out"), *SIMULATED]) == 2
    said = capsys.readouterr().err.strip()
    assert words in said and len(said.splitlines()) == 1


# -- what is asked -----------------------------------------------------------------------------------------------------


def test_benchmarks_come_by_name_from_a_copy_or_from_a_file(tmp_path: Path) -> None:
    copy = tmp_path / "copy.json"
    copy.write_text(json.dumps([{"question": "two and two?", "answer": "#### 4", "index": i} for i in range(3)]))
    own = tmp_path / "mine.jsonl"
    own.write_text('{"ask": "What is shown in the figure below?", "key": "3"}\n')
    section = ProblemsSection(question="question", answer="answer")
    (part,) = load_questions(f"gsm8k={copy}", section, 2)
    assert part.name == "gsm8k" and len(part.problems) == 2 and part.problems[0].answer == "4"
    assert part.column == ""  # three problems are not the paper's GSM8K
    (mine,) = load_questions(str(own), ProblemsSection(question="ask", answer="key"), 0)
    assert mine.name == "mine" and mine.problems[0].answer == "3"
    with pytest.raises(UserError, match="different"):
        load_questions(f"{own},{own}", ProblemsSection(question="ask", answer="key"), 0)


def test_methods_without_their_verifier_are_left_out_unless_they_were_asked_for() -> None:
    bare, judged = Contender("a", "a"), Contender("b", "b", orm="o")
    assert usable(["greedy", "bon", "mcts"], [bare], asked=False) == ["greedy"]
    assert usable(["greedy", "bon", "mcts"], [judged], asked=False) == ["greedy", "bon"]
    with pytest.raises(UserError, match="--ppm"):
        usable(["bon"], [bare, judged], asked=True)


# -- which settings start a folder of their own ------------------------------------------------------------------------

OTHER = {
    "method": "beam", "rollouts": "3", "escalate": "[2]", "second_pass": "4", "candidates": "3",
    "answer_candidates": "1", "temperature": "0.5", "top_p": "0.5", "max_depth": "5", "max_step_tokens": "99",
    "form": "text", "calculator": "true", "chain_temperature": "0.5", "deviations": "false", "c": "0.3",
    "selection": "puct", "unvisited_first": "false",
    "drop_failed_steps": "false", "use_ppm": "true", "ppm": "elsewhere",
    "beam_width": "4", "ppm_prior_visits": "0", "rollouts_in_flight": "3", "trees_in_flight": "3", "seeds": "[5]",
    "checkpoint_rollouts": "1",
}  # fmt: skip
"""A value for every key of the search section that is not its default."""
SAMPLING = {"top_p", "max_depth", "max_step_tokens", "form", "calculator", "drop_failed_steps"}
EXPANSION = SAMPLING | {"answer_candidates"}
WAYS = ("greedy", "sample", "beam", "dvts", "mcts")


def folders(*overrides: str, engine: str = "hf") -> dict[str, str]:
    """The folder of each way of making answers, and of the samples' scores, under these settings."""
    settings = read_settings("m", "", [f"engine.kind={engine}", *overrides])
    one, q = Contender("m", "m", ppm="p"), Questions("q", (), "", "")
    made = {way: _pass(one, q, way, settings.eval, settings, Path("out")) for way in WAYS}
    made["scores"] = _scored(made["sample"], "p", settings.engine)
    return {way: found.folder.name for way, found in made.items()}


def anew(*overrides: str, engine: str = "hf") -> set[str]:
    """What is made again under these settings."""
    usual, found = folders(engine=engine), folders(*overrides, engine=engine)
    return {way for way in usual if found[way] != usual[way]}


def test_a_search_setting_starts_new_folders_for_the_methods_that_read_it_alone() -> None:
    assert set(OTHER) == {f.name for f in fields(SearchSection)}
    by_key = {key: anew(f"search.{key}={value}") - {"scores"} for key, value in OTHER.items()}
    read = {way: {key for key, found in by_key.items() if way in found} for way in WAYS}
    assert read == {
        "greedy": SAMPLING - {"top_p"},
        "sample": SAMPLING,
        "beam": EXPANSION | {"beam_width"},
        "dvts": EXPANSION | {"beam_width"},
        "mcts": EXPANSION | {"c", "selection", "unvisited_first", "rollouts_in_flight", "ppm_prior_visits"},
    }
    assert anew("eval.rollouts=3") == {"mcts"} and anew("eval.candidates=3") == {"beam", "dvts", "mcts"}


@pytest.mark.parametrize(
    "limit",
    ["engine.max_context=512", "engine.dtype=bfloat16", "sandbox.cpu_seconds=1", "sandbox.wall_seconds=9",
     "sandbox.memory_mib=99", "sandbox.output_kib=1"],
)  # fmt: skip
def test_a_limit_on_answers_starts_new_folders_for_all(limit: str) -> None:
    assert anew(limit) == {*WAYS, "scores"}


@pytest.mark.parametrize(
    "setting",
    ["engine.threads=2", "engine.cache_mib=64", "engine.max_batch=2", "engine.device=cpu", "engine.scorer_device=cpu",
     "engine.gpu_memory=0.2", "engine.concurrency=2", "engine.timeout=9", "engine.retries=1",
     "engine.score_batch_tokens=512", "sandbox.processes=2", "cluster.workers=2"],
)  # fmt: skip
def test_how_answers_are_made_starts_no_new_folder(setting: str) -> None:
    assert anew(setting) == set()


def test_a_server_has_an_address_and_limits_of_its_own() -> None:
    """What it wrote is paid for: the verifier's limits ask for new searches and scores, not for new samples."""
    assert anew("engine.url=http://b/v1", engine="openai") == {*WAYS, "scores"}
    assert anew("engine.max_context=512", engine="openai") == {"beam", "dvts", "mcts", "scores"}
    assert anew("engine.url=http://b/v1") == set()  # nobody else reads it


# -- measuring ---------------------------------------------------------------------------------------------------------


def record(problem: int, candidates: Sequence[tuple[str, float, int]], samples: int, tokens: int) -> EvalRecord:
    found = tuple(Candidate(answer, score, count, answer == "7") for answer, score, count in candidates)
    return EvalRecord(f"p{problem}", "", "", found, samples, tokens, 4, 1.0)


def by_hand() -> dict[str, Records]:
    """Two problems: the first is solved by everybody, the second by the best-scored sample and by two searches."""
    return {
        "greedy": {1: [record(0, [("7", 0, 1)], 1, 100), record(1, [("5", 0, 1)], 1, 100)]},
        "sample PPM": {4: [record(0, [("7", 0.5, 4)], 4, 400), record(1, [("5", 0.1, 3), ("7", 0.9, 1)], 4, 400)]},
        "sample": {4: [record(0, [("7", 0, 4)], 4, 400), record(1, [("5", 0, 3), ("7", 0, 1)], 4, 400)]},
        "mcts": {
            1: [record(0, [("7", 0.5, 1)], 1, 300), record(1, [("5", 0.5, 1)], 1, 300)],
            2: [record(0, [("7", 0.5, 1)] * 2, 2, 600), record(1, [("5", 0.5, 1), ("7", 0.9, 1)], 2, 700)],
        },
    }


def test_rows_are_compared_with_the_first_one() -> None:
    made = lines(by_hand(), ["greedy", "sample", "maj", "bon", "mcts"], top_k=8)
    found, first = rows("m", "b", made, [1, 4], None)
    accuracy = {row.label: row.accuracy.mean for row in found}
    assert accuracy["greedy"] == accuracy["majority @4"] == accuracy["mcts top score @1"] == 0.5 and first == [1.0, 0.0]
    assert accuracy["pass @1"] == pytest.approx(0.625) and accuracy["best-of-n PPM @4"] == 1.0
    best = next(row for row in found if row.label == "best-of-n PPM @4")
    assert best.against_first is not None and (best.against_first.wins, best.against_first.losses) == (1, 0)
    again, _ = rows("n", "b", made, [1], first)
    assert again[0].against_first is not None and again[0].against_first.difference.mean == 0.0


def test_methods_are_compared_at_equal_tokens() -> None:
    made = lines(by_hand(), ["greedy", "sample", "maj", "mcts"], top_k=8)
    table = equal_tokens(made, [50, 100, 320, 650])
    assert "pass" not in table  # nobody can choose by the reference
    assert table["greedy"] == [None, (1, 0.5), (1, 0.5), (1, 0.5)]
    assert [cell and cell[0] for cell in table["majority"]] == [None, 1, 3, 4]
    assert [cell and cell[0] for cell in table["mcts top score"]] == [None, None, 1, 2]
    assert table["mcts top score"][3] == (2, 1.0)


def test_searches_are_counted_off_by_seed(tmp_path: Path) -> None:
    q = Questions("q", tuple(Problem(f"p{i}", "?", "7") for i in (1, 0)), "", "")
    with TreeWriter(tmp_path / "trees-w0.jsonl.zst") as writer:
        for problem in (*q.problems, Problem("other", "?", "7")):
            for seed in range(12):  # as text "#10" comes before "#2"
                writer.append(Tree(f"{problem.id}#{seed}", problem, ("Q",), seed=seed, tokens=10**seed, complete=True))
    made = SearchTask(tmp_path, SearchSection(seeds=list(range(12))), test_time=True)
    (found,) = read_records([(q, made, [1, 3, 12])], Settings(model=ModelSection(base="m")))
    assert [record.problem_id for record in found[3]] == ["p1", "p0"]
    assert [record.tokens for k in (1, 3) for record in found[k]] == [1, 1, 111, 111]


def test_the_papers_figures_stand_only_beside_the_same_benchmark(tmp_path: Path) -> None:
    problems = tuple(Problem(f"p{i}", "Which number is shown in the figure below?", "7") for i in range(2))
    one = Contender("m", "m", ppm="p")
    for column, other in (("GSM8K", "MATH"), ("", "GSM8K")):
        q = Questions("gsm8k", problems, column, "")
        found = measured([one], [q], ["greedy", "mcts"], [1, 2], {("m", "gsm8k"): by_hand()}, top_k=8)
        write_comparison(found, Settings(model=ModelSection(base="m")), tmp_path)
        paper = json.loads((tmp_path / "results.json").read_text())["paper"]
        assert bool(paper) == bool(column) and not any(other in row["accuracy"] for row in paper)
        text = (tmp_path / "results.md").read_text()
        assert text.count("(paper, Table") == len(paper) and "2 problems need a picture" in text
    assert {row.system for row in PUBLISHED if row.accuracy.get("MATH") == 90.0} == {
        "rStar-Math 7B SLM + 7B PPM",
        "OpenAI o1-mini",
    }


# -- a PPM by itself ---------------------------------------------------------------------------------------------------


async def graded(score: Any) -> dict[str, Any]:
    expander = grow(branching(2, lambda made: made[0] == 0), candidates=2)
    await Mcts(expander).search(12)
    section = ExtractSection(min_margin=0.0, min_edit_distance=0)
    return await on_trees([[expander.tree]], SimulatedScorer(score), section)


async def test_pair_accuracy_of_a_perfect_a_blind_and_a_perverse_ppm() -> None:
    right = {"perfect": 0.9, "blind": 0.0, "perverse": -0.9}
    found = {name: await graded(lambda text, v=v: v if "x1 = 0" in text else -v) for name, v in right.items()}
    accuracy = {name: one["pair_accuracy"]["all"]["mean"] for name, one in found.items()}
    assert accuracy == {"perfect": 1.0, "blind": 0.5, "perverse": 0.0}
    assert found["perfect"]["pairs"]["step"] >= 1 and found["perfect"]["pairs"]["answer"] >= 1
    assert found["perfect"]["calibration"]["answers"]["error"] == pytest.approx(0.05)
    assert found["perverse"]["calibration"]["answers"]["error"] == pytest.approx(0.95)


async def test_trees_without_grades_are_refused() -> None:
    expander = grow(branching(1, lambda made: True), test_time=True, score=lambda text: 0.5)
    await Mcts(expander).search(2)
    with pytest.raises(UserError, match="no graded answers"):
        await on_trees([[expander.tree]], SimulatedScorer(lambda text: 0.0), ExtractSection())


class ShortContext(SimulatedScorer):
    """Takes no more than 600 characters."""

    async def score(self, prompt: PromptText, completions: Sequence[Sequence[str]]) -> list[float]:
        if (longest := max(len(prompt.text + "".join(texts)) for texts in completions)) > 600:
            raise ContextOverflow.of(longest, 600)
        return await super().score(prompt, completions)


async def test_paths_too_long_for_the_ppm_are_left_out_of_its_figures_and_counted() -> None:
    made = branching(2, lambda made: made == [0, 0])
    long = "# Step 1: " + "long " * 200
    expander = grow(lambda *one: made(*one).replace("# Step 1: s\nx1 = 1", f"{long}\nx1 = 1"))
    await Mcts(expander).search(12)
    section = ExtractSection(min_margin=0.0, min_edit_distance=0)
    whole, short = [
        await on_trees([[expander.tree]], scorer(lambda text: 0.9 if long not in text else -0.9), section)
        for scorer in (SimulatedScorer, ShortContext)
    ]
    assert set(whole["too_long"].values()) == {0} and all(short["too_long"].values())
    assert 1 <= short["pairs"]["all"] == whole["pairs"]["all"] - short["too_long"]["pairs"]
    assert short["pair_accuracy"]["all"]["mean"] == 0.5 < whole["pair_accuracy"]["all"]["mean"]
    for kind in ("steps", "answers"):
        whole_bins, short_bins = ([b["count"] for b in one["calibration"][kind]["bins"]] for one in (whole, short))
        assert whole_bins == [short["too_long"][kind], *short_bins]  # what scored -0.9 is what is left out


async def test_a_ppm_that_takes_no_path_at_all_has_counts_and_no_figures() -> None:
    expander = grow(branching(1, lambda made: made[0] == 0))
    expander.tree.prompt = ("Q: " + "long " * 200, *expander.tree.prompt[1:])
    await Mcts(expander).search(4)
    found = await on_trees([[expander.tree]], ShortContext(lambda text: 0.0), ExtractSection())
    assert found["too_long"]["answers"] >= 2 and found["calibration"] == found["pair_accuracy"] == {}


def test_pairs_are_those_that_the_run_trains_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each seed alone has one outcome; merged by prefix, as the recipe reads them, the two give a pair."""
    made = branching(1, lambda made: made == [0])
    with TreeWriter(tmp_path / "trees-w0.jsonl.zst") as writer:
        for seed in (0, 1):
            expander = grow(lambda prompt, seed, index: made(prompt, seed, seed), candidates=1, seed=seed)
            asyncio.run(Mcts(expander).search(1))
            expander.tree.complete = True
            writer.append(expander.tree)
    config = tmp_path / "mine.yaml"
    config.write_text("model: {base: m}\nextract: {min_margin: 0.0, min_edit_distance: 1, answer_pairs: false}\n")
    command = ["eval", "P", "--ppm-quality", str(tmp_path), "--config", str(config), "--out", str(tmp_path / "out")]
    pairs = {}
    for setting in ("extract.answer_pairs=false", "extract.merge_seeds=false", "extract.min_edit_distance=20"):
        assert run([*command, *SIMULATED, setting]) == 0
        found = json.loads((tmp_path / "out" / "ppm_quality.json").read_text())
        key, _, value = setting.removeprefix("extract.").partition("=")
        assert json.dumps(found["extract"][key]) == value
        pairs[key] = found["pairs"]
    assert pairs["answer_pairs"] == {"step": 1, "answer": 0, "all": 1}
    assert pairs["merge_seeds"]["all"] == pairs["min_edit_distance"]["all"] == 0
    assert "pairs ranked right, step" in capsys.readouterr().out


def test_a_recipe_without_an_extract_section_leaves_the_usual_pairs() -> None:
    assert read_settings("m", str(CONFIGS / "flow_dpo/tiny.yaml"), []).extract == ExtractSection()
    assert read_settings("m", str(CONFIGS / "rstar_math/tiny.yaml"), []).extract.min_edit_distance == 1


def test_calibration_error_is_zero_where_scores_are_frequencies() -> None:
    scored = [(0.5, 1.0)] * 3 + [(0.5, 0.0)] + [(-1.0, 0.0)] * 5
    found = calibration(scored)
    assert found.error == pytest.approx(0) and [one.count for one in found.bins] == [5, 4]
    assert calibration([(1.0, 0.0)]).error == pytest.approx(1.0)


def test_first_errors_are_counted_as_processbench_does() -> None:
    scores = [[0.5, -0.1, 0.9], [0.5, 0.4], [0.2, 0.3, -0.5], [-0.1, 0.2]]
    found = first_errors(scores, [1, -1, 1, -1], 0.0)
    assert (found.on_wrong, found.on_right, found.wrong, found.right) == (0.5, 0.5, 2, 2)
    assert found.f1 == pytest.approx(0.5)
    assert first_errors([[0.5]], [0], 0.0).f1 == 0.0
    assert best_threshold([[0.5, 0.2], [0.6, 0.5]], [1, -1]).f1 == 1.0  # 0.2 < threshold <= 0.5


def test_step_labelled_file_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = ["total = + 12", "total = total + 7", "print(total)\n<end_of_code>"]
    solutions = [
        {"problem": "12 + 7 =", "steps": steps, "outputs": ["", "", "19\n"], "label": -1},
        {"problem": "12 + 7 =", "steps": [steps[0], "total = total + 8", steps[2]], "label": 1},
    ]
    file = tmp_path / "steps.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in solutions))
    made = ["eval", "P", "--ppm-quality", str(file), "--out", str(tmp_path / "out"), *SIMULATED]
    assert run(made) == 0
    assert "first errors (scores below 0.00): F1 100.0, 100.0% of 1 wrong, 100.0% of 1 right" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "ppm_quality.json").read_text())
    assert found["solutions"] == 2 and [len(values) for values in found["scores"]] == [3, 3]
    assert run([*made, "--limit", "1"]) == 0 and "of 0 wrong" in capsys.readouterr().out
    file.write_text(json.dumps(solutions[0] | {"label": 3}) + "\n")
    assert run(made) == 2 and f"{file}:1" in capsys.readouterr().err


def test_a_solution_too_long_for_the_ppm_is_left_out_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = ["total = + 12", "total = total + 8", "print(total)\n<end_of_code>"]
    solutions = [
        {"problem": "12 + 7 =", "steps": [steps[0], f"# {'long ' * 200}\n{steps[1]}", steps[2]], "label": 1},
        {"problem": "12 + 7 =", "steps": steps, "label": 1},
    ]
    file = tmp_path / "steps.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in solutions))
    monkeypatch.setattr(ppm_quality, "build_scorer", lambda section, folder: ShortContext(arithmetic_score))
    assert run(["eval", "P", "--ppm-quality", str(file), "--out", str(tmp_path / "out"), *SIMULATED]) == 0
    said = capsys.readouterr().out
    assert "left out: 1 of the solutions" in said and "100.0% of 1 wrong" in said
    found = json.loads((tmp_path / "out" / "ppm_quality.json").read_text())
    assert found["too_long"] == {"solutions": 1} and found["solutions"] == 2
    assert found["scores"][0] is None and len(found["scores"][1]) == 3


def test_a_line_uses_the_smallest_set_of_searches_that_is_enough() -> None:
    line = Line("mcts", by_hand()["mcts"], lambda record, k: float(len(record.candidates)))
    assert line.limit == 2 and line.values(1) == [1.0, 1.0] and line.values(2) == [2.0, 2.0]
    assert line.cost(2, "tokens") == 650
