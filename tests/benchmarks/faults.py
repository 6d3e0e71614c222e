"""Faults put into a small run, which must end as an undisturbed one does. One JSON object.

    python -m tests.benchmarks.faults --json [--only NAME] [--quick]

A run here is the recipe's own: search, extraction and evaluation on a few sums, with the simulated policy. Its
trainings are stand-ins that write a checkpoint's folder, and its steps run in this process, so that one run takes a
fraction of a second and nothing differs between two of them but clocks. `tests/test_faults.py` runs the same cases.

cases                what was tried: a fault at one place is one case
survived             those that ended as they should: same data, or the error that names what to mend
lost_problems        problems without a complete tree at the end
duplicated_problems  complete trees that were searched and written twice
orphans              processes that outlived their driver by 10 seconds
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import psutil

from rstar import evaluation, manifest, store
from rstar.call import Call
from rstar.config import ClusterSection, EngineSection
from rstar.engines.base import EngineError
from rstar.engines.simulated import SimulatedPolicy, arithmetic_script
from rstar.manifest import run_dir
from rstar.recipes import evaluation as recipe_evaluation
from rstar.recipes import load_config, rstar_math
from rstar.report.html import write_report
from rstar.run import Artifact, Here, Run, Stage
from rstar.sandbox import Counts, SandboxError
from rstar.search import worker as search_worker
from rstar.search.failures import infrastructure_failures
from rstar.search.worker import ProblemSummary, WorkItem
from rstar.store import complete_or_absent, file_digest, index, read_trees, scan
from rstar.types import Execution, ExecutionStatus, Generation, PromptText, SamplingParams, UserError
from rstar.workers import ray_session, search_all
from tests.benchmarks.scale import UnexecutedWorker, problems, search_job

ROOT = Path(__file__).parent.parent.parent
SUMS = ("12 + 7 - 4", "3 + 5", "8 * 2 + 1", "21 - 6")


@dataclass(frozen=True)
class Damage:
    """What a case may not leave behind."""

    lost: int = 0
    duplicated: int = 0
    orphans: int = 0


class TrustedSandbox:
    """Runs the simulated policy's code in this process: as a sandbox, in microseconds."""

    level = "none"
    root: tuple[str, ...] = ()

    def __init__(self, *_: object) -> None:
        self.counts = Counts()

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    def session(self, seed: int = 0) -> TrustedSandbox:
        return self

    def state(self, codes: Sequence[str]) -> tuple[str, ...]:
        return tuple(codes)

    async def run(self, parent: tuple[str, ...], code: str) -> tuple[tuple[str, ...], Execution]:
        names: dict[str, Any] = {}
        for earlier in parent:
            with contextlib.redirect_stdout(io.StringIO()):
                exec(earlier, names)
        try:
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(code, names)
        except Exception as error:
            return parent, Execution(ExecutionStatus.ERROR, error=repr(error))
        return (*parent, code), Execution(ExecutionStatus.OK, printed.getvalue())


# -- the run -----------------------------------------------------------------------------------------------------------


@lru_cache
def _config(problems: Path, overrides: tuple[str, ...]) -> Any:
    settings = [
        "problems.name=file", f"problems.path={problems}", "problems.heldout=1", "model.base=none", "run.rounds=1",
        "model.step_tokens=false", "warmup.enabled=false", "engine=simulated", "cluster=inline", "search.rollouts=12",
        "search.candidates=3", "extract.min_margin=0", *overrides,
    ]  # fmt: skip
    return load_config(str(ROOT / "configs" / "rstar_math" / "tiny.yaml"), settings)[1]


def configured(folder: Path, *overrides: str) -> Any:
    """The recipe's tiny config on SUMS, in `folder`/run."""
    problems = folder.parent / "sums.jsonl"
    if not problems.exists():
        rows = [{"id": f"s{n}", "question": text, "answer": str(eval(text))} for n, text in enumerate(SUMS)]
        problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = _config(problems, overrides)
    return replace(config, run=replace(config.run, dir=str(folder / "run")))


def train(here: Here, *, rows: Artifact, **_: Any) -> dict[str, Any]:
    """In place of a training: a checkpoint's folder with the digest of its rows."""
    file = rows.folder / {"policy": "sft.jsonl", "ppm": "pairs.jsonl"}[here.stage]
    with complete_or_absent(here.output(here.stage)) as temporary:
        (temporary / "weights").write_text(file_digest(file))
    return {}


class Stop(Exception):
    """Ends `evolve` before a stage."""


def evolve(config: Any, *, until: str = "") -> None:
    """What `rstar evolve` does, in this process; stops before stage `until` of round 1."""
    run = run_dir(config.run)

    def act(stage: Stage) -> Artifact:
        if stage.round.number and stage.name == until:
            raise Stop
        if stage.name in ("policy", "ppm"):
            stage = replace(stage, call=Call(train, stage.call.arguments))
        stage.execute()
        return stage.artifact()

    with _light(), contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Stop):
        run.acquire()
        try:
            rstar_math.RECIPE.function(Run(run.path, act), config)
        finally:
            run.release()


@contextlib.contextmanager
def patched(module: Any, **names: Any) -> Iterator[None]:
    """Other values for a module's names while the block runs."""
    before = {name: getattr(module, name) for name in names}
    for name, value in names.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


@contextlib.contextmanager
def _light() -> Iterator[None]:
    """What takes long and is not tried here does little."""
    few = partial(evaluation.bootstrap, resamples=10)
    with contextlib.ExitStack() as stack:
        if search_worker.Sandbox.__module__ != __name__:
            stack.enter_context(patched(search_worker, Sandbox=TrustedSandbox))
        stack.enter_context(patched(recipe_evaluation, Sandbox=TrustedSandbox))
        stack.enter_context(patched(evaluation, bootstrap=few))
        stack.enter_context(patched(manifest, this_machine=lambda: ""))
        yield


def contents(folder: Path) -> dict[str, Any]:
    """All that a run has made, without clocks and without where it lies."""
    found: dict[str, Any] = {}
    for path in sorted((folder / "run").rglob("*")):
        name = str(path.relative_to(folder))
        if path.name in ("lock", "failures.jsonl") or path.name.endswith("-call.json") or path.is_dir():
            continue
        if path.name.endswith(".zst"):
            found |= {f"{path.parent.name} {tree.tree_id}": list(tree.to_rows()) for tree in read_trees(path.parent)}
        elif path.suffix == ".json":
            found[name] = json.loads(path.read_text())
        else:
            found[name] = path.read_text()
    return json.loads(json.dumps(_timeless(found)).replace(str(folder.resolve()), ""))  # type: ignore[no-any-return]


def _timeless(value: Any) -> Any:
    # outputs and inputs, as made_from, are digests of files with clocks in them
    gone = ("seconds", "worker", "inputs", "outputs", "machine", "problem", "infrastructure", "max_failure_rate")
    if isinstance(value, dict):
        return {key: _timeless(one) for key, one in value.items() if key not in gone}
    return [_timeless(one) for one in value] if isinstance(value, list) else value


def damage(folder: Path, expected: dict[str, Any]) -> Damage:
    """What a finished run lacks, or has twice, beside the expected one. Raises AssertionError where it differs else."""
    found = contents(folder)
    frames = [
        (path.parent, frame.tree_id, frame.revision)
        for path in (folder / "run").rglob("trees-*.zst")
        for frame in scan(path).frames
        if frame.complete
    ]
    lost = sum(" " in name for name in expected.keys() - found.keys())
    if not lost:
        different = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        assert not different, f"{folder}: {different} differ from those of an undisturbed run"
    return Damage(lost, len(frames) - len(set(frames)))


@lru_cache
def undisturbed(base: Path, *overrides: str) -> dict[str, Any]:
    """Contents of a run in a folder of `base` that nothing disturbs."""
    whole = base / "undisturbed"
    whole.mkdir(exist_ok=True)
    evolve(configured(whole, *overrides))
    return contents(whole)


def resumed(folder: Path) -> Damage:
    """Damage that is left when the same command has run again."""
    evolve(configured(folder))
    return damage(folder, undisturbed(folder.parent))


def in_child(work: Callable[[], object]) -> int:
    """Exit code of a forked process that does `work`; minus the signal where one killed it."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


Point = tuple[str, str]
"""(step of a write, name of what is written)."""


def points(base: Path) -> list[Point]:
    """Every step of every write of a run, in order."""
    found: list[Point] = []
    (base / "points").mkdir(exist_ok=True)
    with patched(store, reached=lambda point, path: found.append((point, path.name))):
        evolve(configured(base / "points"))
    return found


def at(number: int, act: Callable[[str, Path], object]) -> Callable[[str, Path], None]:
    """A `store.reached` that does `act` at step `number` of the run, from 0."""
    left = [number]

    def reached(point: str, path: Path) -> None:
        left[0] -= 1
        if left[0] == -1:
            act(point, path)

    return reached


def fresh(base: Path, name: str) -> Path:
    """A folder for a run; the points' own number is part of its name."""
    folder = base / name
    folder.mkdir()
    return folder


# -- writes and processes ----------------------------------------------------------------------------------------------


def killed(base: Path, number: int) -> Damage:
    """kill -9 at step `number` of the run's writes, half a frame on disk where a tree was to be appended."""
    folder = fresh(base, f"killed-{number}")
    config = configured(folder)

    def die(point: str, path: Path) -> None:
        if point == "appending":
            with path.open("ab") as file:
                file.write((folder.parent / "undisturbed" / path.relative_to(folder)).read_bytes()[:57])
        os.kill(os.getpid(), signal.SIGKILL)

    def work() -> None:
        with patched(store, reached=at(number, die)):
            evolve(config)

    assert in_child(work) == -signal.SIGKILL
    found = resumed(folder)
    assert not list(folder.rglob(f"*{store.TEMPORARY}")), "something half written is left"
    return found


def disk_full(base: Path, number: int, code: int = errno.ENOSPC) -> Damage:
    """The disk is full, or cannot be written, at step `number` of the run's writes."""
    folder = fresh(base, f"full-{code}-{number}")
    where: list[Path] = []

    def refuse(point: str, path: Path) -> None:
        where.append(path)
        raise OSError(code, os.strerror(code))

    try:
        with patched(store, reached=at(number, refuse)):
            evolve(configured(folder))
        raise AssertionError("a full disk went unnoticed")
    except UserError as error:
        assert error.got.startswith(f"cannot write {where[0]}: {os.strerror(code)}; "), error
    return resumed(folder)


def damaged(base: Path, name: str, until: str) -> Damage:
    """A byte of file `name` is wrong when stage `until` wants to read it: refused by its name, mended by --repair."""
    folder = fresh(base, f"damaged-{name.replace('/', '-')}")
    config = configured(folder)
    evolve(config, until=until)
    path = folder / "run" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 0x10
    path.write_bytes(data)
    try:
        evolve(config)
        raise AssertionError("damage went unnoticed")
    except UserError as error:
        assert path.name in str(error) and "--repair" in error.how, error
    assert run_dir(config.run).repair()
    return resumed(folder)


def damaged_manifest(base: Path) -> Damage:
    """A manifest that was cut off: its stages are made again, the trees that are there are not."""
    folder = fresh(base, "manifest")
    evolve(configured(folder))
    path = folder / "run" / "round_01" / "manifest.json"
    path.write_bytes(path.read_bytes()[:200])
    return resumed(folder)


def two_drivers(base: Path) -> Damage:
    """A second driver is refused, with the holder's name; a holder that was killed holds nothing."""
    folder = fresh(base, "lock")
    config = configured(folder)
    ready, go = os.pipe()
    pid = os.fork()
    if not pid:
        holder = run_dir(config.run)
        holder.acquire()
        os.write(go, b"x")
        signal.pause()
    try:
        os.read(ready, 1)
        evolve(config)
        raise AssertionError("two drivers in one folder")
    except UserError as error:
        assert f"pid {pid} " in error.got and str(folder / "run" / "lock") in error.how
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return resumed(folder)


# -- infrastructure and steps ------------------------------------------------------------------------------------------


class DyingPolicy(SimulatedPolicy):
    """The simulated policy, whose calls of these numbers fail with the engine."""

    def __init__(self, dies_at: Callable[[int], bool]) -> None:
        super().__init__(arithmetic_script)
        self.dies_at = dies_at

    calls = 0

    async def generate(self, prompt: PromptText, params: SamplingParams) -> list[Generation]:
        DyingPolicy.calls += 1
        if self.dies_at(DyingPolicy.calls):
            raise EngineError("the engine died")
        return await super().generate(prompt, params)


def engine_dies(base: Path) -> Damage:
    """An engine that dies now and then is started again; its losses stand in the record."""
    folder = fresh(base, "engine")
    DyingPolicy.calls = 0
    policy = DyingPolicy(lambda call: call in (4, 30, 90))
    with patched(search_worker, build_policy=lambda *_, **__: policy):
        evolve(configured(folder))
    record = run_dir(configured(folder).run).round(1).record("search")
    assert record is not None and record.counts["infrastructure"]["worker"] >= 2
    assert "code_error" in record.counts["outcomes"], "a step that failed is no loss"
    return damage(folder, undisturbed(base))


def engine_stays_dead(base: Path) -> Damage:
    """An engine that always dies stops the search after cluster.max_failures; once it lives, the run goes on."""
    folder = fresh(base, "dead")
    with patched(search_worker, build_policy=lambda *_, **__: DyingPolicy(lambda call: True)):
        try:
            evolve(configured(folder))
            raise AssertionError("nothing stopped")
        except UserError as error:
            assert "4 search workers died over the same problems, the last: the engine died" in error.got
    return resumed(folder)


class BrokenSandbox(TrustedSandbox):
    """A sandbox that fails (twice, which is its word) in the run of a step."""

    broken = True

    async def run(self, parent: tuple[str, ...], code: str) -> tuple[tuple[str, ...], Execution]:
        if BrokenSandbox.broken:
            BrokenSandbox.broken = False
            raise SandboxError("failed twice")
        return await super().run(parent, code)


def sandbox_fails(base: Path) -> Damage:
    """A failure of the sandbox is no failed step: the problem is searched again."""
    folder = fresh(base, "sandbox")
    BrokenSandbox.broken = True
    with patched(search_worker, Sandbox=BrokenSandbox):
        evolve(configured(folder))
    assert infrastructure_failures(folder / "run" / "round_00" / "eval" / "greedy") == {"worker": 1}
    return damage(folder, undisturbed(base))


def no_secrets(base: Path) -> Damage:
    """No value of an environment variable gets into a file of a run or into its messages: not of a good run, not of one
    whose server refuses, not into the report."""
    folder = fresh(base, "secrets")
    secrets = {name: f"sk-{name.lower()}-0123456789" for name in ("HF_TOKEN", "OPENAI_API_KEY", "WANDB_API_KEY")}
    said = io.StringIO()
    with patched(os, environ={**os.environ, **secrets}), contextlib.redirect_stdout(said):
        evolve(configured(folder))
        write_report(folder / "run")
        search = search_job(folder / "run" / "server")
        nobody = EngineSection(kind="openai", url="http://127.0.0.1:9/v1", model="m", retries=0)
        search = replace(search, engine=nobody)
        try:
            search_all(search, [WorkItem(0, one) for one in problems(2)], ClusterSection(), print, UnexecutedWorker)
            raise AssertionError("a server where none is")
        except UserError as error:
            print(error, infrastructure_failures(folder / "run" / "server"))
    texts = [said.getvalue().encode(), *(path.read_bytes() for path in (folder / "run").rglob("*") if path.is_file())]
    trees = [json.dumps(list(tree.to_rows())).encode() for tree in read_trees(folder / "run" / "round_01")]
    leaked = [name for name, value in secrets.items() if any(value.encode() in text for text in [*texts, *trees])]
    assert not leaked and b"127.0.0.1:9" in texts[0] and len(texts) > 10, leaked
    return Damage()


class SlowSandbox(TrustedSandbox):
    """A sandbox of a machine on which every step takes too long, or under which every second evaluation is lost."""

    lost = False

    async def run(self, parent: tuple[str, ...], code: str) -> tuple[tuple[str, ...], Execution]:
        if self.lost:
            self.counts.infrastructure_failures += 1
            return await super().run(parent, code)
        return parent, Execution(ExecutionStatus.TIMEOUT, error="5 s of CPU time")


def garbage(base: Path, lost: bool) -> Damage:
    """A search whose steps all time out, or whose evaluations are lost again and again, is stopped."""
    folder = fresh(base, f"garbage-{lost}")
    write_sums(folder / "sums.jsonl", 100)
    with patched(search_worker, Sandbox=SlowSandbox), patched(SlowSandbox, lost=lost):
        try:
            evolve(configured(folder, f"problems.path={folder}/sums.jsonl", "eval.methods=[]"))
            raise AssertionError("training on garbage")
        except UserError as error:
            words = "of the work failed with the infrastructure" if lost else "of the steps timed out"
            assert words in error.got and "cluster.max_failure_rate=0.25" in error.need, error
    return Damage()


def nothing_solved(base: Path) -> Damage:
    """A round without a correct solution stops before anything is trained."""
    folder = fresh(base, "nothing")
    with patched(search_worker, build_policy=lambda *_, **__: SimulatedPolicy(lambda *_: "no step<end_of_answer>")):
        try:
            evolve(configured(folder))
            raise AssertionError("trained on nothing")
        except UserError as error:
            assert "round 1 found no correct trajectory" in error.got
    assert not (folder / "run" / "round_01" / "policy").exists()
    return Damage()


# -- load --------------------------------------------------------------------------------------------------------------


class FaultyWorker(UnexecutedWorker):
    """A search worker under which the first try of one problem in a hundred ends the process (where it has one of its
    own; else the sandbox), of another one in a hundred the engine, and of one in twenty is slow."""

    async def search_problem(self, item: WorkItem) -> ProblemSummary:
        chance = int.from_bytes(hashlib.sha256(item.problem.id.encode()).digest()[:4], "big") % 100
        mark = self.job.passes[0].folder / "tried" / item.problem.id
        if chance < 7 and not mark.exists():
            mark.touch()
            if chance == 0:
                if str(os.getpid()) != (mark.parent / "driver").read_text():
                    os._exit(1)
                raise SandboxError("failed twice")
            if chance == 1:
                raise EngineError("the engine died")
            time.sleep(0.005)
        return await super().search_problem(item)


def load(base: Path, count: int, workers: int = 0) -> Damage:
    """`count` problems with FaultyWorkers, inline or (`workers`) on Ray: each is done once, in bounded memory."""
    folder = fresh(base, f"load-{count}-{workers}")
    (folder / "tried").mkdir()
    (folder / "tried" / "driver").write_text(str(os.getpid()))
    job = search_job(folder)
    section = replace(job.passes[0].search, trees_in_flight=4)
    job = replace(job, passes=(replace(job.passes[0], search=section),))
    done: list[str] = []
    used: list[int] = []

    def on_done(summary: ProblemSummary) -> None:
        done.append(summary.problem_id)
        if len(done) in (count // 5, count):
            used.append(psutil.Process().memory_info().rss >> 20)

    cluster = ClusterSection(address="local" if workers else "inline", workers=max(1, workers), cpus_per_worker=0.5)
    with contextlib.redirect_stdout(io.StringIO()), ray_session(cluster):
        search_all(job, (WorkItem(0, one) for one in problems(count)), cluster, on_done, make_worker=FaultyWorker)
    trees = index(folder)
    assert len(done) == len(set(done)) == len(trees) == count and all(ref.complete for ref in trees.values())
    assert infrastructure_failures(folder)["worker"] >= count // 100
    assert used[1] - used[0] < 64, f"{used} MiB: memory grows with the problems"
    frames = sum(len(scan(path).frames) for path in folder.glob("trees-*.zst"))
    return Damage(count - len(trees), frames - len(trees))


# -- the cases ---------------------------------------------------------------------------------------------------------


def driver_killed(base: Path) -> Damage:
    """kill -9 of a real driver with its stage and sandbox in the middle of a search: nothing is left after 10 seconds,
    finished trees stay as they are, and the rest are made when the search goes on."""
    folder = fresh(base, "driver")
    config, *settings = slow_run(folder)
    rstar = [sys.executable, "-m", "rstar"]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    begin = [*rstar, "evolve", config, *settings]
    driver = subprocess.Popen(begin, cwd=ROOT, env=offline, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    shard = folder / "run" / "round_01"
    wait_for(lambda: (shard.exists() and len(index(shard)) > 1) or driver.poll() is not None, 300)
    assert driver.poll() is None, "it was to be killed in the middle"
    family = [driver.pid, *(child.pid for child in psutil.Process(driver.pid).children(recursive=True))]
    assert len(family) >= 3, "no stage with a sandbox"
    driver.kill()
    driver.wait()
    with contextlib.suppress(AssertionError):
        wait_for(lambda: not any(map(running, family)), 10)
    orphans = sum(map(running, family))
    kept = index(shard)
    go_on = [*rstar, "search", config, "--round", "1", *settings, "engine.tokens_per_second=0"]
    subprocess.run(go_on, cwd=ROOT, env=offline, check=True, capture_output=True)
    trees = index(shard)
    again = sum(trees[name] != ref for name, ref in kept.items())
    return Damage(20 - len(trees), again, orphans)


def running(pid: int) -> bool:
    """Whether there is such a process that has not ended: a dead orphan stays listed until init looks for it."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def slow_run(folder: Path) -> list[str]:
    """Config file and settings of a run of 20 problems without a model, whose search takes half a minute."""
    write_sums(folder / "problems.jsonl", 20)
    return [
        str(ROOT / "configs/rstar_math/tiny.yaml"), f"run.dir={folder}/run", "run.rounds=1", "model=none",
        "model.step_tokens=false", "cluster=inline", "problems=file", f"problems.path={folder}/problems.jsonl",
        "problems.heldout=0", "warmup.enabled=false", "engine=simulated", "engine.tokens_per_second=600",
        "search.trees_in_flight=2", "eval.methods=[]",
    ]  # fmt: skip


def write_sums(path: Path, count: int) -> None:
    sums = [{"question": f"What is {i} + {i + 3} + 4?", "answer": str(2 * i + 7)} for i in range(count)]
    path.write_text("".join(json.dumps(one) + "\n" for one in sums))


def wait_for(condition: Callable[[], object], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


CASES: dict[str, Callable[[Path], Damage]] = {
    "damaged trees": partial(damaged, name="round_01/trees-w0.jsonl.zst", until="extract"),
    "damaged rows": partial(damaged, name="round_01/sft.jsonl", until="policy"),
    "damaged checkpoint": partial(damaged, name="round_01/ppm/weights", until="eval"),
    "damaged manifest": damaged_manifest,
    "two drivers": two_drivers,
    "engine dies": engine_dies,
    "engine stays dead": engine_stays_dead,
    "sandbox fails": sandbox_fails,
    "nothing solved": nothing_solved,
    "no secrets": no_secrets,
    "all steps time out": partial(garbage, lost=False),
    "evaluations are lost": partial(garbage, lost=True),
}
SLOW: dict[str, Callable[[Path], Damage]] = {
    "driver killed": driver_killed,
    "load inline": partial(load, count=10_000),
    "load on Ray": partial(load, count=1_000, workers=2),
}
LONG = {"long load on Ray": partial(load, count=10_000, workers=2)}  # a lost worker takes seconds to be replaced


def write_cases(base: Path, *, every: bool) -> dict[str, Callable[[Path], Damage]]:
    """kill -9 and a full disk at the run's writes: at `every` step, or the first and last of each kind."""
    found = points(base)
    kinds = [(step, Path(name).suffix) for step, name in found]
    first_and_last = {*map(kinds.index, kinds), *{kind: n for n, kind in enumerate(kinds)}.values()}
    numbers = range(len(found)) if every else sorted(first_and_last)
    cases: dict[str, Callable[[Path], Damage]] = {}
    for number in numbers:
        name = f"{number} ({' '.join(found[number])})"
        cases[f"killed at {name}"] = partial(killed, number=number)
        if found[number][0] in ("opened", "written", "appending"):
            cases[f"disk full at {name}"] = partial(disk_full, number=number)
    return cases | {"read-only folder": partial(disk_full, number=0, code=errno.EROFS)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object (else one line per number)")
    parser.add_argument("--only", default="", help="cases with this text in their names")
    parser.add_argument("--quick", action="store_true", help="one step of each kind of write; no load, no real driver")
    options = parser.parse_args()
    total, survived, failed = Damage(), 0, []
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        undisturbed(base)
        cases = {**write_cases(base, every=not options.quick), **CASES, **({} if options.quick else SLOW | LONG)}
        cases = {title: case for title, case in cases.items() if options.only in title}
        for title, case in cases.items():
            try:
                found = case(base)
            except Exception as error:
                print(f"{title}: {error!r}", file=sys.stderr, flush=True)
                failed.append(title)
                continue
            survived += found == Damage()
            failed += [title] if found != Damage() else []
            total = Damage(*(a + b for a, b in zip(astuple(total), astuple(found), strict=True)))
    figures = {
        "cases": len(cases),
        "survived": survived,
        "lost_problems": total.lost,
        "duplicated_problems": total.duplicated,
        "orphans": total.orphans,
        "failed": failed,
    }
    print(json.dumps(figures) if options.json else "\n".join(f"{key:22}{value}" for key, value in figures.items()))
    return 0 if survived == len(cases) else 1


if __name__ == "__main__":
    sys.exit(main())
