"""rounds/study/study.sh: the rival's budget, the table of question 1, the commands of the others; `rstar` is played."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from rounds.study import study
from rstar.evaluation import Candidate, EvalRecord, bootstrap, measures
from rstar.manifest import RoundDir, RunDir
from rstar.problems import load_problems
from rstar.recipes import load_config
from rstar.store import write_json, write_rows

PROBLEMS, SEARCH_TOKENS, HELDOUT = 20, (0, 30_000, 20_000, 15_000), [f"sums/heldout/{i}" for i in range(6)]
RIGHT = {"search": (2, 4, 6, 6), "expert": (2, 3, 5, 5)}  # of the greedy answers, by round


def finish(here: RoundDir, name: str, **counts: object) -> None:
    here.finish(name, settings={}, inputs={}, outputs=[], counts=counts, seconds=1.0)


def evaluated(here: RoundDir, right: int, *, guided: bool = False) -> None:
    records = [
        EvalRecord(name, "1", "", (Candidate("1", None, 1, i < right),), 1, 40, 3, 1.0)
        for i, name in enumerate(HELDOUT)
    ]
    methods: dict[str, object] = {"greedy": {"records": [asdict(record) for record in records]}}
    if guided:
        found = {k: asdict(v) for k, v in measures("mcts", records).items()}
        methods["mcts"] = {"measures": found, "records": methods["greedy"]["records"]}  # type: ignore[index]
    write_json(here.eval_json, {"methods": methods})
    finish(here, "eval", greedy={"tokens": 240, "problems": len(HELDOUT)})  # 40 tokens a solution


def searched(here: RoundDir, samples: int, tokens: int) -> None:
    solved = {"all": [10 + here.number, PROBLEMS]}
    finish(here, "search", problems=PROBLEMS, tokens=tokens, rollouts=samples * PROBLEMS, solved_by_level=solved)
    finish(here, "extract", sft_rows=30)


def other_system(run: RunDir, recipe: str) -> None:
    """What the run of another recipe would leave: half of the first four held-out problems right, whatever is asked."""
    records = [
        EvalRecord(name, "1", "", (Candidate("1", 0.5, 8, i < 2),), 8, 400, 3, 1.0)
        for i, name in enumerate(HELDOUT[:4])
    ]
    half = asdict(bootstrap([1.0, 1.0, 0.0, 0.0]))
    one = {"measures": dict.fromkeys(("accuracy", "one sample", "oracle of 8"), half)}
    one["records"] = [asdict(record) for record in records]  # type: ignore[assignment]
    for number in (0, 1):
        here = run.round(number)
        here.path.mkdir(parents=True, exist_ok=True)
        write_json(here.eval_json, {"methods": dict.fromkeys(("greedy", "cautious", "flow", "verifier"), one)})
    finish(run.round(1), "answers", plain={"tokens": 700}, **{"chosen/sums": {"tokens": 300}})
    if recipe == "outcome_verifier":  # the ranked trees hold its tokens; they generated nothing themselves
        one["records"] = [record | {"tokens": 0} for record in one["records"]]  # type: ignore[union-attr,misc]
        finish(run.round(1), "candidates", tokens=1_600)
        write_json(run.round(1).eval_json, {"methods": {"verifier": one}})
    finish(run.round(1), "stream" if recipe == "flow_dpo" else "search", tokens=2_000)


@pytest.fixture
def played(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[study.Study, list[list[str]]]:
    """A study of two rounds whose commands are noted; runs leave the records that real ones would."""
    said: list[list[str]] = []

    def rstar(*arguments: str | Path) -> None:
        words = [str(word) for word in arguments]
        said.append(words)
        settings = dict(word.split("=", 1) for word in words if re.match(r"[a-z_0-9.]+=", word))
        recipe = next((name for name in study.OTHERS if words[0] == "evolve" and name in words[1]), None)
        if recipe:
            other_system(RunDir(Path(settings["run.dir"])), recipe)
        elif words[0] == "evolve":
            for number, tokens in enumerate(SEARCH_TOKENS[: 1 + int(settings["run.rounds"])]):
                here = RunDir(Path(settings["run.dir"])).round(number)
                here.path.mkdir(parents=True, exist_ok=True)
                if number:
                    searched(here, 4, tokens)
                evaluated(here, RIGHT["search"][number], guided=number > 0)
        if words[0] == "round" and words[1] != "0":
            here = RunDir(Path(settings["run.dir"])).round(int(words[1]))
            here.path.mkdir(parents=True, exist_ok=True)
            samples = int(settings.get(f"rounds.r{words[1]}.search.rollouts", 4))
            searched(here, samples, 30 * samples * PROBLEMS)  # cheaper than greedy solutions of the base
            evaluated(here, RIGHT["expert"][here.number])
        if words[0] == "eval":
            out = Path(words[words.index("--out") + 1])
            out.mkdir(parents=True, exist_ok=True)
            for name in ("results.json", "results.md", "accuracy_vs_tokens.svg"):
                (out / name).write_text(" ".join(words))
            models = [Path(word).name for word in words[1 : words.index("--benchmarks")]]
            half = [{"problem_id": name, "candidates": [{"correct": i < 3}]} for i, name in enumerate(HELDOUT)]
            write_rows(out / "records.jsonl", [{"model": model} | row for model in models for row in half])

    monkeypatch.setattr(study, "rstar", rstar)
    (tmp_path / "out").mkdir()
    settings = ("run.rounds=2",)
    return study.Study("configs/rstar_math/tiny.yaml", settings, 3, tmp_path / "runs", tmp_path / "out", "tiny"), said


def test_rival_generates_what_the_search_did_and_shares_its_warm_up(
    played: tuple[study.Study, list[list[str]]],
) -> None:
    one, said = played
    study.question_1(one)
    assert [words[:2] for words in said] == [
        ["evolve", one.config], ["round", "1"], ["round", "2"],
    ]  # fmt: skip
    # 30,000 tokens at 40 each for 20 problems are 37.5 samples; they cost 30 in truth, so the second round has more
    assert "rounds.r1.search.rollouts=38" in said[1] and "rounds.r2.search.rollouts=45" in said[2]
    assert all("ppm.epochs=0" in words and "rounds.r2.search.use_ppm=false" in words for words in said[1:])
    assert all({"run.seed=3", "problems.seed=4"} <= set(words) for words in said)
    found = json.loads((one.out / "1-seed3.json").read_text())
    spent = [sum(row[name]["tokens"] for row in found["rounds"][1:]) for name in ("search", "expert")]
    assert spent[0] == 50_000 and abs(spent[1] / spent[0] - 1) < 0.01


def test_table_of_question_1_has_intervals_paired_tests_and_families(
    played: tuple[study.Study, list[list[str]]],
) -> None:
    one, _ = played
    study.question_1(one)
    text = (one.out / "1-seed3.md").read_text()
    assert re.search(
        r"^\| 2 \| 60\.0 \| 20,000 \| 30 \| 100\.0 \[.* \| 100\.0 \[.*\| 45 \| 60\.0 \|", text, flags=re.MULTILINE
    )
    assert "search, round 2 against row 0: 66.7 [" in text and "4 problems won, 0 lost, McNemar p = 0.12" in text
    assert "search against expert iteration, round 2: 16.7 [" in text
    assert "| sums | 2 | 6 | 5 |" in text


def test_other_questions_compare_models_of_the_runs_and_keep_their_tables(
    played: tuple[study.Study, list[list[str]]],
) -> None:
    one, said = played
    for name in "2345":
        study.QUESTIONS[name](one)
    compared = [words for words in said if words[0] == "eval"]
    assert [("--limit" in words) for words in compared] == [True] * 6 + [False, True]
    assert all(words.count("--benchmarks") == 1 for words in compared)
    arms = [Path(word).name for word in compared[6][1:] if "/arms-s3/" in word]
    assert arms == ["base", "top-2-by-Q", "rejection-sampled", "failed-steps-kept", "official-UCT", "random-correct"]
    trained = [words for words in said if words[0] == "train"]
    assert [next(w for w in words if w.startswith(("ppm.loss", "extract"))) for words in trained] == [
        "ppm.loss=bce", "ppm.loss=mse", "extract.sft_by=random",
    ]  # fmt: skip
    assert not any(str(one.runs) in path.read_text() for path in one.out.iterdir())
    kept = {path.name for path in one.out.glob("*.md")}
    second = {f"2-ppm{n}{way}" for n in (1, 2) for way in ("", "-mcts")}
    assert kept == {f"{name}-seed3.md" for name in (*second, "3", "3-pqm", "4", "5")}


def test_the_four_systems_stand_in_one_table(played: tuple[study.Study, list[list[str]]]) -> None:
    one, said = played
    study.question_6(replace(one, size="cpu"))
    others = [
        words for words in said if "outcome_verifier" in words[1] or "flow_dpo" in words[1] or "orca2" in words[1]
    ]
    assert [words[1] for words in others] == [f"configs/study/{recipe}.yaml" for recipe in study.OTHERS]
    assert all({"run.seed=3", "problems.seed=4"} <= set(words) for words in others)
    text = (one.out / "6-seed3.md").read_text()
    # the search answered six problems, the others four: its greedy answers count where all systems have one
    assert re.search(
        r"^\| rStar-Math: warm-up \(row 0\), greedy \| 4 \| 50\.0 \[.* \| 40 \|$", text, flags=re.MULTILINE
    )
    assert re.search(r"^\| rStar-Math: round 2, greedy \| 4 \| 100\.0 \[", text, flags=re.MULTILINE)
    assert re.search(r"^\| outcome verifiers: one sample \| 4 \| 50\.0 \[.* \| 50 \|$", text, flags=re.MULTILINE)
    assert "rstar_math 50,000, outcome_verifier 3,000, flow_dpo 3,000, orca2 3,000" in text


def test_the_systems_are_given_the_same_problems() -> None:
    search = load_problems(load_config("configs/study/search.yaml", [])[1].problems)
    for recipe in study.OTHERS:
        other = load_problems(load_config(f"configs/study/{recipe}.yaml", [])[1].problems)
        assert [p.id for p in other.heldout] == [p.id for p in search.heldout][: len(other.heldout)]
        questions = {p.id: p.question for p in (*search.train, *search.heldout)}
        assert all(questions[p.id] == p.question for p in (*other.train, *other.heldout))
        assert len(other.train) == len(search.train)


def test_the_hard_families_are_question_1_with_runs_of_their_own(
    played: tuple[study.Study, list[list[str]]],
) -> None:
    one, said = played
    study.hard(one)
    assert {Path(next(w for w in words if w.startswith("run.dir="))).name for words in said} == {
        "hard-search-s3", "hard-expert-s3",
    }  # fmt: skip
    assert "# 2 rounds of search against plain expert iteration (seed 3)" in (one.out / "hard-seed3.md").read_text()
    config = load_config("configs/study/hard.yaml", [])[1]
    solvable = set(config.warmup.families)
    trained = {name for name, family in config.problems.families.items() if family["count"]}
    assert not solvable & trained and len(trained) == 6


def test_later_rounds_are_searched_again_without_the_ppm_from_the_same_models(
    played: tuple[study.Study, list[list[str]]],
) -> None:
    one, said = played
    study.no_ppm(replace(one, config="configs/study/search.yaml", settings=("run.rounds=3",)))
    assert [words[:2] for words in said] == [["evolve", "configs/study/search.yaml"], ["round", "3"]]
    assert {"rounds.r3.search.use_ppm=false", "rounds.r3.ppm.epochs=0"} <= set(said[1])
    assert all((one.runs / "no-ppm-s3" / f"round_{n:02d}" / "manifest.json").exists() for n in range(4))
    text = (one.out / "no-ppm-seed3.md").read_text()
    assert re.search(r"^\| 2 \| - \| - \| 100\.0 \[.* \| - \| - \| 100\.0 \[", text, flags=re.MULTILINE)
    assert re.search(r"^\| 3 \| 15,000 \| 65\.0 \| .* \| 2,400 \| 65\.0 \| ", text, flags=re.MULTILINE)


def test_the_same_rows_are_trained_in_three_orders_and_compared_by_their_means(
    played: tuple[study.Study, list[list[str]]],
) -> None:
    one, said = played
    study.orders(replace(one, config="configs/study/search.yaml", settings=("run.rounds=3",)))
    trained = [words for words in said if words[0] == "train"]
    assert [(Path(words[2]).parts[-3:], words[-1]) for words in trained] == [
        ((run, f"round_{number:02d}", "sft.jsonl"), f"run.seed={order}")
        for run, number in (("search-s3", 3), ("expert-s3", 3), ("search-s3", 3), ("no-ppm-s3", 3))
        for order in (13, 23)
    ]
    (compared,) = (words for words in said if words[0] == "eval")
    made = [words[words.index("--out") + 1] for words in trained]
    assert compared[1:8] == [*dict.fromkeys(made), "--benchmarks"], "a model answers twice"
    text = (one.out / "orders-seed3.md").read_text()
    assert re.search(r"^\| search, round 3 \| 100\.0 \| 50\.0 \| 50\.0 \| 66\.7 \[", text, flags=re.MULTILINE)
    assert re.search(r"^\| expert iteration, round 3 \| 83\.3 \| 50\.0 \| 50\.0 \| 61\.1 \[", text, flags=re.MULTILINE)
    assert "* search, round 3 - expert iteration, round 3, means of three: 5.6 [" in text


def test_every_size_has_its_config_and_the_gpus_has_more_problems() -> None:
    heldout = {}
    for size, (config, folder) in study.SIZES.items():
        one = study.Study(f"configs/{config}", (), 0, Path(folder), Path("out"), size)
        families = one.resolved().problems.families
        heldout[size] = sum(family["heldout"] for family in families.values())
        limit = one.some(56)
        assert limit == ["--limit", {"tiny": "4", "cpu": "56", "gpu": "560"}[size]]
    assert heldout["cpu"] == 210 and heldout["gpu"] == 700
