"""Search workers, inline and on Ray: same trees, every problem once, resumed and killed."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from rstar.config import ClusterSection, EngineSection, ModelSection, SandboxSection, SearchSection
from rstar.engines.base import EngineError
from rstar.recipes.evaluation import unsolved
from rstar.sandbox import Sandbox, Session
from rstar.search.worker import ProblemSummary, SearchJob, SearchTask, SearchWorker, WorkItem, finished_by, unfinished
from rstar.store import TreeWriter, index, read_trees, scan, shards
from rstar.tree import Tree
from rstar.types import Execution, ExecutionStatus, Problem, TerminalReason, UserError
from rstar.workers import PASSIVE_WAIT, LeasedWorker, Leases, _note_loss, most_expensive_first, search_all
from tests.fakes import LiteralSession

PROBLEMS = [
    Problem(id=f"sum-{i:02d}", question=f"What is {i} + {i + 3} + 4?", answer=str(2 * i + 7), level="1")
    for i in range(10)
]


def job(folder: Path, **search: object) -> SearchJob:
    section = SearchSection(rollouts=3, candidates=3, trees_in_flight=4, **search)  # type: ignore[arg-type]
    return SearchJob(
        passes=(SearchTask(folder, section),),
        engine=EngineSection(kind="simulated"),
        sandbox=SandboxSection(processes=1),
        model=ModelSection(base="none", template="slm"),
        policy="",
    )


def items(problems: list[Problem] = PROBLEMS) -> list[WorkItem]:
    return [WorkItem(0, p) for p in problems]


def contents(folder: Path) -> list[list[dict]]:
    """Trees without what differs between workers: clocks and names."""
    found = []
    for tree in read_trees(folder):
        rows = list(tree.to_rows())
        for key in ("seconds", "worker"):
            rows[0].pop(key)
        for row in rows[1:]:
            row.pop("cpu_ms")
        found.append(rows)
    return found


@pytest.fixture(scope="module")
def inline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inline")
    done: list[ProblemSummary] = []
    search_all(job(folder), items(), ClusterSection(), done.append)
    assert sorted(s.problem_id for s in done) == [p.id for p in PROBLEMS]
    assert sum(s.tokens for s in done) == sum(tree.tokens for tree in read_trees(folder))
    return folder


def test_inline_search_runs_code_and_solves_some(inline: Path) -> None:
    trees = list(read_trees(inline))
    assert len(trees) == len(PROBLEMS) and all(tree.complete for tree in trees)
    assert sum(tree.solved for tree in trees) > 0
    assert any(node.stdout for tree in trees for node in tree.nodes), "no code was run"
    assert all(tree.worker for tree in trees)


def test_finished_problems_are_not_searched_again(inline: Path) -> None:
    assert unfinished(PROBLEMS, job(inline), 0) == []
    more = [*PROBLEMS, Problem(id="new", question="1 + 1", answer="2")]
    assert [item.problem.id for item in unfinished(more, job(inline), 0)] == ["new"]
    assert len(unfinished(PROBLEMS, job(inline, seeds=[0, 1]), 0)) == len(PROBLEMS)


def test_interrupted_tree_is_continued_from_its_checkpoint(inline: Path, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    async def cut_short() -> None:
        worker = SearchWorker(job(tmp_path, checkpoint_rollouts=1), "w0")
        await worker.start()
        append = worker._writers[0].append

        def once(tree: object) -> None:
            append(tree)  # type: ignore[arg-type]
            raise Stop

        worker._writers[0].append = once  # type: ignore[method-assign,assignment]
        with pytest.raises(Stop):
            await worker.search_problem(items()[0])
        await worker.close()

    asyncio.run(cut_short())
    (ref,) = index(tmp_path).values()
    assert not ref.complete
    search_all(job(tmp_path), items(PROBLEMS[:1]), ClusterSection(), lambda s: None)
    (whole,), expected = contents(tmp_path), contents(inline)[0]
    for rows in (whole, expected):
        rows[0].pop("settings")
    assert whole == expected


def test_escalation_cut_off_after_its_first_answer_is_carried_to_its_end(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def escalating(folder: Path) -> SearchJob:
        whole = job(folder, escalate=[10], checkpoint_rollouts=1)
        (one,) = whole.passes
        return replace(whole, passes=(replace(one, search=replace(one.search, rollouts=1)),))

    search_all(escalating(tmp_path / "whole"), items(), ClusterSection(), lambda s: None)
    whole = {rows[0]["tree_id"]: rows for rows in contents(tmp_path / "whole")}
    (tmp_path / "cut").mkdir()
    cut: list[str] = []

    async def cut_short() -> None:
        worker = SearchWorker(escalating(tmp_path / "cut"), "w0")
        await worker.start()
        append = worker._writers[0].append

        def until_solved(tree: Tree) -> None:
            append(tree)
            if tree.solved and 1 < tree.rollouts_done < 11:
                cut.append(tree.tree_id)
                raise Stop

        worker._writers[0].append = until_solved  # type: ignore[method-assign]
        for item in items():
            with suppress(Stop):
                await worker.search_problem(item)
        await worker.close()

    asyncio.run(cut_short())
    assert cut, "no problem was first solved in its escalation"
    search_all(escalating(tmp_path / "cut"), items(), ClusterSection(), lambda s: None)
    resumed = {rows[0]["tree_id"]: rows for rows in contents(tmp_path / "cut")}
    assert all(resumed[name] == whole[name] for name in cut)


class PlainSandbox(Sandbox):
    """Runs the scripted policy's sums in this process: some hundred searches in seconds."""

    async def start(self) -> None:
        self.level = "none"

    async def close(self) -> None:
        """Nothing was started."""

    def session(self, seed: int) -> Session:
        return PlainSession()  # type: ignore[return-value]


class PlainSession(LiteralSession):
    async def run(self, parent: tuple[str, ...], code: str) -> tuple[tuple[str, ...], Execution]:
        printed: list[str] = []
        names: dict[str, object] = {"print": lambda value: printed.append(f"{value}\n")}
        for earlier in parent:
            exec(earlier, names)
        printed.clear()
        try:
            exec(code, names)
        except NameError as error:
            return parent, Execution(ExecutionStatus.ERROR, error=str(error))
        return (*parent, code), Execution(ExecutionStatus.OK, stdout="".join(printed))


@pytest.mark.parametrize("revision", [0, 1])
@pytest.mark.parametrize(("in_flight", "checkpoint"), [(1, 0), (1, 2), (3, 3)])
def test_search_killed_at_any_write_ends_with_the_trees_of_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, revision: int, in_flight: int, checkpoint: int
) -> None:
    """Three seeds, two escalations; `revision` 1: their finished trees are taken up again and grow further.

    A kill leaves the first trees that were written.
    """
    monkeypatch.setattr("rstar.search.worker.Sandbox", PlainSandbox)
    problems = [Problem(f"long-{i}", f"What is {i} + {i + 3} * 2 - 4 + 9 * {i}?", str(12 * i + 2)) for i in range(10)]

    def search(folder: Path, revision: int) -> None:
        settings = {"seeds": [0, 1, 2], "escalate": [2, 5], "checkpoint_rollouts": checkpoint}
        (one,) = job(folder, rollouts_in_flight=in_flight, **settings).passes
        section = replace(one.search, rollouts=4 if revision else 2, candidates=2)
        whole = replace(job(folder), passes=(replace(one, search=section, revision=revision),))
        search_all(whole, unfinished(problems, whole, 0), ClusterSection(), lambda summary: None)

    whole = tmp_path / "whole"
    if revision:
        search(whole, 0)
    begun = sum(path.stat().st_size for path in shards(whole))
    search(whole, revision)
    (shard,) = shards(whole)
    expected, data = contents(whole), shard.read_bytes()
    reached = {rows[0]["rollouts_done"] for rows in expected if any(row.get("reward") == 1.0 for row in rows)}
    assert len(reached) > 2, "problems are solved before their escalations, in one and in the other"
    ends = [ref.offset + ref.length for ref in scan(shard).frames]
    for number, end in enumerate(end for end in ends if end > begun):
        killed = tmp_path / f"killed-{number}" / shard.name
        killed.parent.mkdir()
        killed.write_bytes(data[:end])
        search(killed.parent, revision)
        assert contents(killed.parent) == expected, f"killed after write {number}"


def test_problem_that_is_taken_up_again_stays_unsolved_until_all_its_trees_are(tmp_path: Path) -> None:
    def trees(revision: int, *seeds: int, right: bool) -> None:
        with TreeWriter(tmp_path / "trees-w0.jsonl.zst") as writer:
            for seed in seeds:
                tree = Tree(tree_id=f"p#{seed}", problem=problem, prompt=("q",), seed=seed, complete=True)
                tree.add_child(tree.root, terminal=TerminalReason.ANSWER, answer="1", reward=1.0 if right else -1.0)
                writer.append(replace(tree, revision=revision))

    problem = Problem("p", "q", "1")
    trees(0, 0, 1, right=False)
    assert unsolved([problem], tmp_path, 1) == [problem]
    trees(1, 0, right=True)
    assert unsolved([problem], tmp_path, 1) == [problem] and unsolved([problem], tmp_path, 2) == []


def test_escalation_goes_on_with_unsolved_problems_only(tmp_path: Path) -> None:
    wrong = [Problem(id=p.id, question=p.question, answer="-1") for p in PROBLEMS[:2]]
    done: list[ProblemSummary] = []
    search_all(job(tmp_path, escalate=[4]), items([*wrong, *PROBLEMS[2:4]]), ClusterSection(), done.append)
    for tree in read_trees(tmp_path):
        if not tree.solved:
            assert tree.rollouts_done == 7 or tree.root.exhausted
        else:
            assert tree.rollouts_done <= 7
    assert all(
        tree.rollouts_done > 3 or tree.root.exhausted for tree in read_trees(tmp_path) if tree.problem.answer == "-1"
    )


class Together(SearchWorker):
    """Begins when another one is ready too: else one may have searched everything before the other has started. One
    that is started again finds both files there and does not wait."""

    async def start(self) -> None:
        await super().start()
        folder = self.job.passes[0].folder
        (folder / f"ready-{self.name}").touch()
        end = time.monotonic() + 300
        while len(list(folder.glob("ready-*"))) < 2 and time.monotonic() < end:
            await asyncio.sleep(0.05)


@pytest.fixture(scope="module")
def ray_address() -> object:
    ray = pytest.importorskip("ray")
    for key, value in PASSIVE_WAIT.items():
        os.environ.setdefault(key, value)
    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="error", log_to_driver=False)
    yield
    ray.shutdown()


def test_ray_workers_grow_the_same_trees_as_inline(inline: Path, tmp_path: Path, ray_address: object) -> None:
    done: list[ProblemSummary] = []
    section = ClusterSection(address="local", workers=2)
    search_all(job(tmp_path), items(), section, done.append, make_worker=Together)
    assert contents(tmp_path) == contents(inline)
    assert len({s.worker for s in done}) == 2 and len(list(tmp_path.glob("trees-*"))) == 2


def test_killed_ray_worker_loses_only_its_problems_in_flight(tmp_path: Path, ray_address: object) -> None:
    slow = job(tmp_path)
    slow = SearchJob(
        slow.passes, EngineSection(kind="simulated", tokens_per_second=400.0), slow.sandbox, slow.model, ""
    )
    done: list[ProblemSummary] = []
    over = threading.Event()  # so that a search that fails does not leave the killer waiting for ever

    def kill_one() -> None:
        while len(done) < 3:
            if over.wait(0.05):
                return
        os.kill(int(done[0].worker.split(":")[1]), signal.SIGKILL)

    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    try:
        search_all(slow, items(), ClusterSection(address="local", workers=1), done.append)
    finally:
        over.set()
        killer.join(60)
    assert sorted(s.problem_id for s in done) == [p.id for p in PROBLEMS]
    assert [tree.problem.id for tree in read_trees(tmp_path)] == [p.id for p in PROBLEMS]
    assert len({s.worker for s in done}) == 2, "the worker was not started again"


def taken(leases: Leases, room: int, holds: int = 0) -> list[str]:
    return [item.problem.id for item in asyncio.run(leases.take(room, holds=holds))]


def test_leases_are_read_as_they_are_taken_and_shared_fairly() -> None:
    read: list[str] = []

    def stream() -> Iterator[WorkItem]:
        for item in items([Problem(id=str(i), question="", answer="") for i in range(100)]):
            read.append(item.problem.id)
            yield item

    leases = Leases(stream(), workers=2, in_flight=3)
    assert taken(leases, 2) == ["0", "1"] and len(read) <= 8, "problems are read long before they are searched"
    assert leases.slots == 3
    assert Leases(items(PROBLEMS), workers=4, in_flight=32).slots == 3, "one worker takes what four could share"
    assert Leases(iter(()), workers=4, in_flight=32).finished.is_set()


def test_lost_problems_are_leased_again_and_the_end_waits_for_them() -> None:
    async def scene() -> None:
        leases = Leases(items(PROBLEMS[:2]), workers=2, in_flight=4)
        lost = await leases.take(2, holds=0)
        idle = asyncio.create_task(leases.take(2, holds=0))
        await asyncio.sleep(0)
        assert not idle.done() and not leases.finished.is_set(), "an idle worker left before all was done"
        assert await leases.take(2, holds=1) == [], "a busy worker must not wait for others"
        leases.requeue(lost)
        again = await idle
        assert sorted(item.problem.id for item in again) == ["sum-00", "sum-01"]
        end = asyncio.create_task(leases.take(1, holds=0))
        leases.done(2)
        assert await end == [] and leases.finished.is_set()

    asyncio.run(asyncio.wait_for(scene(), 10))


def test_problems_that_were_dear_a_round_ago_go_first(inline: Path) -> None:
    cost = {tree.problem.id: tree.tokens for tree in read_trees(inline)}
    new = Problem(id="new", question="", answer="")
    order = [item.problem.id for item in most_expensive_first(items([new, *PROBLEMS]), inline)]
    known = [cost[name] for name in order if name != "new"]
    assert known == sorted(known, reverse=True) and len(set(known)) > 1
    mean = sum(known) / len(known)
    assert all(cost[name] >= mean for name in order[: order.index("new")])
    assert most_expensive_first(items(), inline / "nothing") == items()


def test_problem_that_kills_every_worker_stops_the_search(tmp_path: Path, ray_address: object) -> None:
    with pytest.raises(UserError, match="2 search workers died over the same problems"):
        section = ClusterSection(address="local", workers=1, max_failures=1)
        search_all(job(tmp_path), items(PROBLEMS[:2]), section, lambda s: None, make_worker=DyingWorker)


class DyingWorker(SearchWorker):
    """A worker that a problem kills, as one would that runs out of memory."""

    async def start(self) -> None: ...

    async def search_problem(self, item: WorkItem) -> ProblemSummary:
        os._exit(1)


def test_cluster_that_is_not_there_is_a_user_error() -> None:
    code = (
        "from rstar.workers import _connect\nfrom rstar.config import ClusterSection\n"
        "from rstar.types import UserError\n"
        "try: _connect(ClusterSection(address='127.0.0.1:1'))\nexcept UserError as e: print('USER', e)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert "USER no Ray cluster" in out.stdout


def test_lost_worker_is_reported_by_the_first_line_of_its_failure_or_by_its_kind(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for failure, words in ((EngineError("vLLM died\nat length"), "vLLM died"), (EngineError(""), "EngineError")):
        _note_loss(1, failure, 1, ClusterSection(max_failures=1))
        assert f"search worker 1 was lost ({words})" in capsys.readouterr().out
    with pytest.raises(UserError, match="2 search workers"):
        _note_loss(1, EngineError(""), 2, ClusterSection(max_failures=1))


def test_results_are_told_before_the_failure_beside_them() -> None:
    class Half:
        async def search_problem(self, item: WorkItem) -> str:
            if item.problem.id == "sum-01":
                raise EngineError("died")
            return item.problem.id

        async def close(self) -> None: ...

    async def scene() -> None:
        worker = LeasedWorker(Half())  # type: ignore[arg-type]
        asked = asyncio.create_task(worker.exchange(items(PROBLEMS[:3]), True))
        assert sorted(await asked) == ["sum-00", "sum-02"]  # type: ignore[type-var]
        with pytest.raises(EngineError, match="died"):
            await worker.exchange([], True)
        await worker.close()

    asyncio.run(scene())


def test_problem_that_two_workers_died_with_comes_last_and_alone() -> None:
    async def scene() -> None:
        leases = Leases(items(PROBLEMS[:4]), workers=1, in_flight=4)
        held = await leases.take(4, holds=0)
        leases.requeue(held[:1], alone=lambda item: True)
        leases.requeue(held[1:2])
        assert await leases.take(4, holds=2) == held[1:2], "a suspect is searched beside others"
        leases.done(3)
        assert not leases.finished.is_set()
        assert await leases.take(4, holds=0) == held[:1]
        leases.done(1)
        assert leases.finished.is_set()

    asyncio.run(asyncio.wait_for(scene(), 10))


def test_worker_that_a_ray_of_our_own_could_never_start_is_refused(tmp_path: Path, ray_address: object) -> None:
    section = ClusterSection(address="local", gpus_per_worker=64)
    with pytest.raises(UserError, match=r"asks for 64 GPU, this machine has \d.*cluster.gpus_per_worker"):
        search_all(job(tmp_path), items(), section, lambda s: None)


def test_inline_is_one_worker_whatever_the_cluster_would_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    search_all(job(tmp_path), items(PROBLEMS[:2]), ClusterSection(workers=8), lambda s: None)
    assert [path.name for path in tmp_path.glob("trees-*")] == ["trees-w0.jsonl.zst"]
    assert "one search worker, not cluster.workers=8" in capsys.readouterr().out


def test_trees_that_a_lost_worker_had_on_disk_are_not_searched_again(inline: Path, tmp_path: Path) -> None:
    shutil.copy(inline / "trees-w0.jsonl.zst", tmp_path / "trees-w7.jsonl.zst")
    new = Problem(id="new", question="1 + 1", answer="2")
    found = finished_by("w7", items([new, *PROBLEMS[:3]]), job(tmp_path))
    assert [summary.problem_id for summary in found] == [one.id for one in PROBLEMS[:3]]
    assert all(summary.trees == 1 and summary.tokens for summary in found)
    assert finished_by("w7", items(), job(tmp_path, seeds=[0, 1])) == [] == finished_by("w8", items(), job(tmp_path))


class LateWorker(SearchWorker):
    """Its engine dies when one problem is on disk, before anybody hears of that."""

    died = False

    async def search_problem(self, item: WorkItem) -> ProblemSummary:
        summary = await super().search_problem(item)
        if not LateWorker.died:
            LateWorker.died = True
            raise EngineError("died")
        return summary


def test_search_goes_on_behind_a_loss_without_double_work(tmp_path: Path) -> None:
    done: list[ProblemSummary] = []
    search_all(job(tmp_path), items(PROBLEMS[:4]), ClusterSection(), done.append, make_worker=LateWorker)
    assert sorted(s.problem_id for s in done) == [p.id for p in PROBLEMS[:4]]
    assert sum(len(scan(path).frames) for path in tmp_path.glob("trees-*")) == 4


@pytest.mark.parametrize("wrong", ["cluster.workers=0", "search.trees_in_flight=0"])
def test_nobody_to_search_or_nothing_at_once_is_refused(wrong: str, tmp_path: Path) -> None:
    none = job(tmp_path)
    if "trees" in wrong:
        none = replace(
            none, passes=(replace(none.passes[0], search=replace(none.passes[0].search, trees_in_flight=0)),)
        )
    section = ClusterSection(workers=0 if "workers" in wrong else 1)
    with pytest.raises(UserError, match=f"^{wrong}; need at least 1"):
        search_all(none, items(), section, print)
