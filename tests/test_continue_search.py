"""`rstar search --continue, --unsolved, --seeds, --rescore`: finished trees taken up again by the command line."""

from __future__ import annotations

import json
import random
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from rstar import cli
from rstar import run as run_module
from rstar.engines.simulated import SimulatedPolicy, SimulatedScorer
from rstar.manifest import RoundDir
from rstar.recipes import load_config
from rstar.run import Stage
from rstar.sandbox import Counts
from rstar.search import worker as search_worker
from rstar.store import TreeWriter, read_trees
from rstar.tree import Tree
from rstar.types import TerminalReason
from tests.fakes import LiteralSession, branching

CONFIG = """
model: {base: none, template: slm}
engine: {kind: simulated}
problems: {name: file, path: PROBLEMS, heldout: 0}
search: {rollouts: 3, candidates: 3, max_depth: 6}
rounds: {r1: {search: {c: 1.5}}}
"""
ANSWERS = {"p0": "1", "p1": "7", "p2": "1", "p3": "7"}  # nobody finds a 7


class FakeSandbox:
    """Literal sessions instead of processes."""

    level = "fake"
    counts = Counts()

    def __init__(self, _: object) -> None:
        pass

    async def start(self) -> None:
        pass

    async def close(self) -> None:
        pass

    def session(self, seed: int) -> LiteralSession:
        return LiteralSession()


class Policy(SimulatedPolicy):
    """Counts its calls; a search is interrupted at the call `stop_at`."""

    calls = 0
    stop_at = -1

    async def generate(self, prompt, params):
        type(self).calls += 1
        if type(self).calls == type(self).stop_at:
            raise RuntimeError("killed")
        return await super().generate(prompt, params)


def script(prompt: str, seed: int, index: int) -> str:
    text = branching(3, lambda made: sum(made) % 2 == 0)(prompt, seed, index)
    luck = random.Random(f"{prompt}{seed}{index}").random()
    return text.replace("x", "boom", 1) if luck < 0.2 and "x" in text else text


def scorer(_: object, folder: str, **__: object) -> SimulatedScorer:
    name = Path(folder).name
    return SimulatedScorer(lambda text: random.Random(name + text).uniform(-1, 1))


Rstar = Callable[..., int]


@pytest.fixture
def rstar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rstar:
    """The command line on a run whose round 1 is searched, with scripted engines; stages run in this process."""
    rows = [json.dumps({"id": name, "question": f"q {name}", "answer": a}) for name, a in ANSWERS.items()]
    (tmp_path / "problems.jsonl").write_text("\n".join(rows))
    (tmp_path / "config.yaml").write_text(CONFIG.replace("PROBLEMS", str(tmp_path / "problems.jsonl")))
    monkeypatch.setattr(search_worker, "Sandbox", FakeSandbox)
    monkeypatch.setattr(search_worker, "build_policy", lambda *_, **__: Policy(script))
    monkeypatch.setattr(search_worker, "build_scorer", scorer)
    monkeypatch.setattr(Policy, "calls", 0)
    monkeypatch.setattr(Policy, "stop_at", -1)

    monkeypatch.setattr(run_module, "run_process", Stage.execute)

    def run(command: str, *arguments: str, name: str = "run") -> int:
        where = [str(tmp_path / "config.yaml"), f"run.dir={tmp_path / name}"]
        return cli.run([command, *where, "--round", "1", *arguments])

    for name in ("run", "other"):
        recipe, config = load_config(str(tmp_path / "config.yaml"), [f"run.dir={tmp_path / name}"])
        recipe.stages(config, 0)[0].execute()
    assert run("search") == 0 and run("extract") == 0
    return run


@pytest.fixture
def folder(tmp_path: Path) -> RoundDir:
    return RoundDir(tmp_path / "run", 1)


def trees(folder: RoundDir) -> dict[str, Tree]:
    return {tree.tree_id: tree for tree in read_trees(folder.path)}


def contents(tree: Tree) -> list[dict]:
    """Its rows without clocks, names and what describes the search."""
    head, *nodes = tree.to_rows()
    kept = {k: head[k] for k in ("tree_id", "seed", "prompt", "rollouts_done", "tokens", "engine_calls", "complete")}
    return [kept, *nodes]


def settings(out: str) -> list[str]:
    """The overrides of the command that the search has printed last."""
    return [word for word in shlex.split(out.strip().splitlines()[-1]) if word.startswith("rounds.")]


def test_continued_trees_are_those_of_one_search_and_nothing_is_generated_again(
    rstar: Rstar, folder: RoundDir, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rstar("search", "--continue", "9") == 0
    out = capsys.readouterr().out
    assert "to be made again from the new trees: extract" in out
    assert settings(out) == ["rounds.r1.search.rollouts=9"]
    calls, Policy.calls = Policy.calls, 0
    assert rstar("search", "rounds.r1.search.rollouts=9", name="other") == 0
    assert calls == Policy.calls
    whole = trees(RoundDir(folder.root.parent / "other", 1))
    grown = trees(folder)
    assert {k: contents(t) for k, t in grown.items()} == {k: contents(t) for k, t in whole.items()}
    assert all(t.settings["rollouts"] == 9 and t.revision == 1 for t in grown.values())
    assert any(t.rollouts_done == 9 for t in grown.values())


def test_run_goes_on_with_the_new_settings_and_refuses_the_old_ones(
    rstar: Rstar, folder: RoundDir, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rstar("search", "--continue", "9") == 0
    assert list(folder.records()) == ["search"]
    assert rstar("search", "rounds.r1.search.rollouts=9") == 0
    assert rstar("search", "--continue", "9") == 0  # asked for once more
    assert capsys.readouterr().out.count("all done") == 2
    assert rstar("search") == 2
    error = capsys.readouterr().err
    assert "search.rollouts: 9 -> 3" in error and "(rounds.r1.search.rollouts=9)" in error
    calls = Policy.calls
    assert rstar("extract") == 0 and Policy.calls == calls


def test_only_unsolved_problems_grow_where_that_is_asked_for(
    rstar: Rstar, folder: RoundDir, capsys: pytest.CaptureFixture[str]
) -> None:
    before = trees(folder)
    assert rstar("search", "--continue", "8", "--unsolved") == 0
    assert settings(capsys.readouterr().out) == ["rounds.r1.search.escalate=[5]"]
    for name, tree in trees(folder).items():
        if before[name].solved:
            assert contents(tree) == contents(before[name])
        else:
            assert tree.rollouts_done == 8 and len(tree.nodes) > len(before[name].nodes)
    assert rstar("search", "--continue", "10", "--unsolved", "rounds.r1.search.escalate=[5]") == 0
    assert settings(capsys.readouterr().out)[-1] == "rounds.r1.search.escalate=[5,7]"
    assert trees(folder)["p1#0"].rollouts_done == 10
    assert rstar("search", "--continue", "6", "rounds.r1.search.escalate=[5,7]") == 0
    assert settings(capsys.readouterr().out)[-2:] == ["rounds.r1.search.rollouts=6", "rounds.r1.search.escalate=[2,4]"]
    assert trees(folder)["p1#0"].rollouts_done == 10 and trees(folder)["p0#0"].rollouts_done == 6


def test_trees_of_other_seeds_join_and_the_old_ones_stay(
    rstar: Rstar, folder: RoundDir, capsys: pytest.CaptureFixture[str]
) -> None:
    before = trees(folder)
    assert rstar("search", "--seeds", "0,2,5") == 0
    assert settings(capsys.readouterr().out) == ["rounds.r1.search.seeds=[0,2,5]"]
    after = trees(folder)
    assert set(after) == {f"{name}#{seed}" for name in ANSWERS for seed in (0, 2, 5)}
    for name, tree in before.items():
        assert contents(after[name]) == contents(tree)
    assert contents(after["p0#2"]) != contents(after["p0#5"])
    assert rstar("search", "--seeds", "7", "--continue", "5", "rounds.r1.search.seeds=[0,2,5]") == 0
    assert {tree.rollouts_done for tree in trees(folder).values()} == {5} and len(trees(folder)) == 16


def checkpoint(path: Path) -> str:
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    return str(path)


def test_rescoring_asks_the_scorer_only(
    rstar: Rstar, folder: RoundDir, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before, calls = trees(folder), Policy.calls
    ppm = checkpoint(tmp_path / "ppm_a")
    with monkeypatch.context() as patch:
        patch.setattr(LiteralSession, "run", None)  # nothing is executed
        assert rstar("search", "--rescore", ppm) == 0
    described = settings(capsys.readouterr().out)
    assert described == ["rounds.r1.search.use_ppm=true", f"rounds.r1.search.ppm={ppm}"]
    assert Policy.calls == calls
    first = trees(folder)
    assert all(tree.ppm == ppm and tree.settings["use_ppm"] and tree.complete for tree in first.values())
    for name, tree in first.items():
        for old, node in zip(before[name].nodes, tree.nodes, strict=True):
            assert (node.text, node.terminal, node.reward) == (old.text, old.terminal, old.reward)
            assert node.visit_count == old.visit_count + (node.ppm_value is not None)
    other = checkpoint(tmp_path / "ppm_b")
    assert rstar("search", "--rescore", other, "--continue", "6", *described) == 0
    assert Policy.calls > calls
    for name, tree in trees(folder).items():
        for old, node in zip(first[name].nodes[1:], tree.nodes[1:], strict=False):
            if old.ppm_value is not None:
                assert node.ppm_value not in (None, old.ppm_value)
        assert tree.rollouts_done == 6 and tree.ppm == other


def test_trees_of_the_second_pass_are_taken_up_with_the_others(
    rstar: Rstar, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RoundDir(tmp_path / "other", 1)
    assert rstar("search", "search.second_pass=2", name="other") == 0
    assert {name: tree.rollouts_done for name, tree in trees(folder).items() if name.endswith("#1")} == {
        "p1#1": 2, "p3#1": 2,
    }  # fmt: skip
    ppm = checkpoint(tmp_path / "ppm")
    assert rstar("search", "search.second_pass=2", "--rescore", ppm, "--continue", "5", name="other") == 0
    assert "rounds.r1.search.second_pass=5" in settings(capsys.readouterr().out)
    assert len(trees(folder)) == 6
    assert all((tree.ppm, tree.rollouts_done, tree.revision) == (ppm, 5, 1) for tree in trees(folder).values())


def test_what_the_second_pass_has_solved_is_not_grown_with_the_unsolved(rstar: Rstar, tmp_path: Path) -> None:
    folder = RoundDir(tmp_path / "other", 1)
    assert rstar("search", "search.second_pass=2", name="other") == 0
    lucky = trees(folder)["p1#1"]
    next(node for node in lucky.nodes if node.terminal is TerminalReason.ANSWER).reward = 1.0
    with TreeWriter(folder.path / "trees-z.jsonl.zst") as writer:
        writer.append(lucky)
    assert rstar("search", "search.second_pass=2", "--continue", "8", "--unsolved", name="other") == 0
    grown = {name: tree.rollouts_done for name, tree in trees(folder).items()}
    assert grown == {"p0#0": 3, "p1#0": 3, "p1#1": 2, "p2#0": 3, "p3#0": 8, "p3#1": 2}


def test_ppm_that_the_trees_will_train_again_is_refused(
    rstar: Rstar, folder: RoundDir, capsys: pytest.CaptureFixture[str]
) -> None:
    before = folder.manifest.read_bytes()
    assert rstar("search", "--rescore", checkpoint(folder.ppm)) == 2
    assert "cp -r" in capsys.readouterr().err and folder.manifest.read_bytes() == before


def test_interrupted_change_is_resumed_by_the_same_command_and_by_evolve_settings(
    rstar: Rstar, folder: RoundDir, capsys: pytest.CaptureFixture[str]
) -> None:
    Policy.stop_at = Policy.calls + 12
    grow = ("search", "--continue", "9", "search.trees_in_flight=1", "search.checkpoint_rollouts=1")
    with pytest.raises(RuntimeError, match="killed"):
        rstar(*grow)
    capsys.readouterr()
    assert rstar("search") == 2 and "search.rollouts: 9 -> 3" in capsys.readouterr().err  # not in the middle of it
    assert rstar(*grow) == 0
    done = trees(folder)
    assert {tree.rollouts_done for tree in done.values()} == {9} and {t.revision for t in done.values()} == {1}
    calls, Policy.calls, Policy.stop_at = Policy.calls, 0, -1
    assert rstar("search", "rounds.r1.search.rollouts=9", name="other") == 0
    assert calls <= Policy.calls + 1  # the expansion that was cut short
    whole = trees(RoundDir(folder.root.parent / "other", 1))
    assert {k: contents(t)[1:] for k, t in done.items()} == {k: contents(t)[1:] for k, t in whole.items()}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--unsolved"], "--continue ROLLOUTS"),
        (["--continue", "3"], "more than the 3 rollouts"),
        (["--seeds", "0"], "others than [0]"),
        (["--rescore", "nowhere"], "nowhere is no checkpoint"),
        (["--continue", "9", "search.c=7", "rounds.r1.search.c=7"], "search.c: 1.5 -> 7"),
    ],
)
def test_mistakes_change_nothing(
    rstar: Rstar, folder: RoundDir, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    before = folder.manifest.read_bytes()
    assert rstar("search", *arguments) == 2
    assert words in capsys.readouterr().err
    assert folder.manifest.read_bytes() == before and not folder.note("search").get("notes")


def test_search_that_is_not_finished_is_not_taken_up_again(rstar: Rstar, capsys: pytest.CaptureFixture[str]) -> None:
    assert rstar("search", "--continue", "9", name="other") == 2
    assert "has no finished search" in capsys.readouterr().err
