"""The dry run, and the shipped paper configs: every number as ALGORITHMS has it, every number with its source."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from rstar.cli import run as rstar
from rstar.config import ProblemsSection, SearchSection, for_round
from rstar.manifest import RunDir
from rstar.recipes import load_config
from rstar.recipes.evaluation import problem_limit
from rstar.recipes.plan import Rates, measured, plan, problem_counts, search_cost
from rstar.tokens import load_few_shot

CONFIGS = Path(__file__).parent.parent / "configs" / "rstar_math"
MODELS = {
    "qwen2.5-math-7b": "Qwen/Qwen2.5-Math-7B",
    "qwen2.5-math-1.5b": "Qwen/Qwen2.5-Math-1.5B",
    "qwen2-math-7b": "Qwen/Qwen2-Math-7B",
    "phi3-mini": "microsoft/Phi-3-mini-4k-instruct",
}
ROUNDS: dict[int, dict[str, Any]] = {
    1: {"rollouts": 8, "candidates": 5, "use_ppm": False, "temperature": 0.7, "seeds": [0], "escalate": []},
    2: {"rollouts": 16, "candidates": 8, "use_ppm": False, "temperature": 1.0, "seeds": [0], "escalate": []},
    3: {"rollouts": 16, "candidates": 8, "use_ppm": True, "temperature": 1.0, "seeds": [0], "escalate": []},
    4: {"rollouts": 16, "candidates": 16, "use_ppm": True, "temperature": 1.0, "seeds": [0, 1], "escalate": [64, 128]},
}
COMMON = {
    "run": {"rounds": 4},
    "search": {"c": 2.0, "max_depth": 16, "second_pass": 16, "top_p": 1.0, "max_step_tokens": 2048},
    "extract": {"sft_top": 2, "positives": 2, "negatives": 2, "min_margin": 0.5, "min_edit_distance": 20,
                "min_synthetic_accuracy": 0.5, "answer_pairs": True},
    "sft": {"epochs": 2, "batch_size": 128, "max_length": 4096, "weight_decay": 0.1, "warmup_ratio": 0.0},
    "ppm": {"epochs": 1, "batch_size": 512, "learning_rate": 7e-6, "max_length": 4096, "score_scale": 5.0,
            "loss": "pairwise", "heldout": 0.05, "tanh_in_loss": False},
    "eval": {"candidates": 32, "trajectories": 8, "rollouts": 12},
    "problems": {"limit": 747_000, "min_agreement": 3},
    "warmup": {"enabled": False},
    "bootstrap": {"enabled": True},
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_paper_configs_have_the_papers_numbers(name: str) -> None:
    _, config = load_config(str(CONFIGS / f"{name}.yaml"), [])
    assert config.model.base == MODELS[name] and config.model.template == "slm"
    for number in range(1, 5):
        one = for_round(config, number)
        assert {key: getattr(one.search, key) for key in ROUNDS[number]} == ROUNDS[number], f"round {number}"
        for section, values in COMMON.items():
            found = {key: getattr(getattr(one, section), key) for key in values}
            assert found == values, f"round {number}: {section}"
        phi = name == "phi3-mini"
        assert (one.sft.learning_rate, one.sft.schedule) == ((5e-6, "cosine") if phi else (7e-6, "linear"))
    assert config.bootstrap.engine.kind == "openai" and "DeepSeek-Coder-V2-Instruct" in config.bootstrap.engine.model
    assert len(load_few_shot(CONFIGS / "few_shot.yaml")) == 2 and config.bootstrap.model.few_shot.endswith(
        "few_shot.yaml"
    )


@pytest.mark.parametrize("name", ["paper", *MODELS])
def test_every_number_of_a_paper_config_names_its_source(name: str) -> None:
    """A number in a value is followed by P (paper, section), C (code, file) or O (ours)."""
    for line in (CONFIGS / f"{name}.yaml").read_text().splitlines():
        key, _, rest = line.partition(": ")
        value, _, comment = rest.partition("  # ")
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError:
            continue
        numbers = parsed if isinstance(parsed, list) else [parsed]
        if not line.startswith("#") and any(type(n) in (int, float) for n in numbers):
            assert re.match(r"(P (\d|A\.1|Eq|table)|C[ :]|O\b)", comment), f"{name}.yaml: {key.strip()} has no source"


def test_worked_examples_run_and_print_what_they_show() -> None:
    for _, solution in load_few_shot(CONFIGS / "few_shot.yaml"):
        code = solution.split("<code>")[1].split("<end_of_code>")[0].replace("<end_of_step>", "")
        shown = solution.split("<output>")[1].split("<end_of_output>")[0]
        printed: list[str] = []
        exec(code, {"print": lambda value, out=printed: out.append(str(value))})  # our own examples
        assert printed == [shown]


@pytest.mark.parametrize("name", MODELS)
def test_dry_run_prints_four_rounds_without_model_network_or_data(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert rstar(["evolve", str(CONFIGS / f"{name}.yaml"), "--dry-run", f"run.dir={run}"]) == 0
    text = capsys.readouterr().out
    assert not run.exists()
    rounds = re.split(r"\nround \d", text)
    assert len(rounds) == 6  # what is before, 0 to 4 and the sum
    for number, words in {
        2: ["DeepSeek-Coder-V2-Instruct (openai)", "8 rollouts, 5 candidates, T 0.7", "terminals only", "pass of 16"],
        3: ["16 rollouts, 8 candidates", "policy: round 1", "terminals only"],
        4: ["PPM of round 2", "PPM scores"],
        5: [
            "2 seeds [0, 1] x 16 rollouts, 16 candidates",
            "unsolved: up to +64, then up to +128",
            "PPM of round 3",
            "to do",
        ],
    }.items():
        assert all(word in rounds[number] for word in words), rounds[number]
    assert "747,000 training problems by problems.limit" in text and "500 held out" in text
    assert text.count("search     to do") == text.count("ppm        to do") == 4 and "at most" in text


@pytest.mark.parametrize(
    ("config", "override", "said"),
    [
        ("rstar_math/quickstart", "ppm.epochs=0", "round 3 searches with a PPM, round 2 trains none"),
        ("outcome_verifier/tiny", "eval.voters=[1]", "two numbers of voters"),
        ("flow_dpo/tiny", "engine=simulated", "need hf or vllm"),
        ("orca2/tiny", "rounds.r2.orca.arm=seen", "orca.arm=seen; need erased, visible, plain"),
    ],
)
def test_dry_run_refuses_settings_that_do_not_go_together(
    config: str, override: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rstar(["evolve", str(CONFIGS.parent / f"{config}.yaml"), "--dry-run", override]) == 2
    captured = capsys.readouterr()
    assert said in captured.err and not captured.out


def test_cost_counts_rollouts_seeds_escalation_and_the_second_pass() -> None:
    search = SearchSection(rollouts=10, candidates=4, seeds=[0, 1], escalate=[20, 40], second_pass=30)
    cost = search_cost(search, 100, Rates(expansions=3, tokens=50, unsolved=0.5, source=""))
    rollouts = 100 * (2 * (10 + 0.5 * 40) + 0.5 * 30)
    assert (cost.calls, cost.samples, cost.tokens) == (rollouts * 3, rollouts * 12, rollouts * 600)
    assert search_cost(replace(search, method="sample"), 1, Rates(1, 1, 0, "")).samples == 20


def test_plan_tells_done_from_to_do_and_estimates_from_what_was_measured(tmp_path: Path) -> None:
    recipe, config = load_config(str(CONFIGS / "tiny.yaml"), [f"run.dir={tmp_path}"])
    here = RunDir(tmp_path).round(1)
    here.path.mkdir()
    RunDir(tmp_path).round(0).path.mkdir()
    RunDir(tmp_path).round(0).finish("base", settings={}, inputs={}, outputs=[], counts={}, seconds=1)
    stage = next(s for s in recipe.stages(config, 1) if s.name == "search")
    counts = {"calls": 300, "rollouts": 100, "tokens": 24_000, "solved_by_level": {"all": [15, 20]}}
    here.finish("search", settings=stage.settings, inputs=stage.inputs, outputs=[], counts=counts, seconds=1)
    assert measured(RunDir(tmp_path), 2) == Rates(3.0, 20.0, 0.25, "as in round 1")
    text = plan(recipe, config)
    assert "search     done" in text and "measured: 24,000 tokens in 300 engine calls" in text
    second = text.split("\nround 2")[1]
    assert "search     to do" in second
    rollouts = 20 * (2 * (3 + 0.25 * 2) + 0.25 * 2)  # two seeds, +2 for the unsolved quarter, then a second pass of 2
    assert f"as in round 1: {round(rollouts * 3 * 4 * 20):,} tokens" in second  # expansions x candidates x tokens
    _, other = load_config(str(CONFIGS / "tiny.yaml"), [f"run.dir={tmp_path}", "rounds.r1.search.c=1"])
    assert "search     refused" in plan(recipe, other) and "search.c: 2.0 -> 1.0" in plan(recipe, other)


def test_fewer_problems_for_searches_hold_for_every_search_and_for_nothing_else(tmp_path: Path) -> None:
    settings = ["eval.methods=[greedy,sample,beam,mcts]", "eval.problems=6", "eval.search_problems=3"]
    recipe, config = load_config(str(CONFIGS / "tiny.yaml"), [f"run.dir={tmp_path}", *settings])
    lines = re.findall(r"(\d+) problems by (\w+)", plan(recipe, config).split("\nround 2")[1])
    assert lines == [("6", "greedy"), ("6", "sample"), ("3", "beam"), ("3", "mcts")]
    assert [problem_limit(method, config.eval) for method in config.eval.methods] == [6, 6, 3, 3]
    assert problem_limit("greedy", replace(config.eval, problems=0)) is None


def test_problem_counts_of_sources_that_are_not_there(tmp_path: Path) -> None:
    counts = problem_counts(ProblemsSection(name="gsm8k", split="test", heldout=7))
    assert counts[:2] == (1319, 7) and "hub" in counts[2]
    assert problem_counts(ProblemsSection(name="gsm8k"))[0] == 0, "1,319 is the size of another split"
    assert problem_counts(ProblemsSection(name="gsm8k", limit=50))[0] == 50
    assert "set problems.limit" in problem_counts(ProblemsSection(name="file", path=str(tmp_path / "no.jsonl")))[2]
    path = tmp_path / "x.jsonl"
    path.write_text('{"question": "a", "answer": "1"}\n{"question": "b", "answer": "2"}\n')
    section = ProblemsSection(name="file", path=str(path), heldout=1, decontaminate=["math500"])
    assert problem_counts(section)[:2] == (1, 1)


def test_the_bootstrap_s_worked_examples_are_found_from_the_repository() -> None:
    _, config = load_config(str(CONFIGS / "phi3-mini.yaml"), [])
    assert (CONFIGS.parent.parent / config.bootstrap.model.few_shot).is_file()
