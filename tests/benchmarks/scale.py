"""Scale of a search on Ray: many small problems, several workers, one driver. One JSON object.

    python -m tests.benchmarks.scale --problems 100000 --json [--workers 2] [--folder DIR]

Simulated engine, instant; 2 rollouts x 2 candidates; answers are graded, steps are not run (the sandbox's speed is
tests.benchmarks.sandbox's business). Problems are a stream, trees go to disk in the real format. The same is run with a
tenth of the problems, each in a process of its own, to compare the drivers' peaks.

problems_per_second     finished trees on disk, from the first lease to the last
driver_peak_mb          resident memory of the driver's process, Ray's client library included
driver_growth           that over the same of the run with a tenth of the problems; 1: flat
driver_ms_per_problem   CPU time of the driver; its inverse bounds what one driver can serve
worker_ms_per_expansion time of a worker's process, which has a share of the cores with the driver and Ray
bytes_per_tree          in the shards, compressed
resume_ms_per_tree      until a restarted driver knows what is left
extrapolation           to the paper's 747,000 problems x 16 rollouts x 8 candidates, with its assumptions
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from rstar.config import ClusterSection, EngineSection, ModelSection, SandboxSection, SearchSection
from rstar.sandbox import Counts
from rstar.search.worker import ProblemSummary, SearchJob, SearchTask, SearchWorker, WorkItem, unfinished
from rstar.store import shards
from rstar.types import Execution, ExecutionStatus, Problem
from rstar.workers import PASSIVE_WAIT, ray_session, search_all

PAPER_PROBLEMS, PAPER_ROLLOUTS, PAPER_CANDIDATES = 747_000, 16, 8
ASSUMED_TOKENS_PER_SECOND = 2_500  # of one worker's engine: a 7B policy and a PPM sharing one H100-class GPU
ASSUMED_STEP_TOKENS = 60  # a thought and a few lines of code


class NoSandbox:
    """Stands in for the sandbox: every step succeeds, a print gives a number."""

    level = "none"
    counts = Counts()
    root: tuple[str, ...] = ()

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    def session(self, seed: int = 0) -> NoSandbox:
        return self

    def state(self, codes: list[str]) -> tuple[str, ...]:
        return tuple(codes)

    async def run(self, parent: tuple[str, ...], code: str) -> tuple[tuple[str, ...], Execution]:
        return (*parent, code), Execution(ExecutionStatus.OK, stdout="7\n" if "print(" in code else "", cpu_ms=0.1)


class UnexecutedWorker(SearchWorker):
    """A search worker that runs no code."""

    def __init__(self, job: SearchJob, name: str) -> None:
        super().__init__(job, name)
        self.sandbox = NoSandbox()  # type: ignore[assignment]


def problems(count: int) -> Iterator[Problem]:
    """Sums of three terms, made as they are asked for."""
    for i in range(count):
        yield Problem(id=f"sum-{i:07d}", question=f"What is {i} + {i + 3} + 4?", answer=str(2 * i + 7), level="1")


def search_job(folder: Path) -> SearchJob:
    section = SearchSection(rollouts=2, candidates=2, trees_in_flight=32)
    return SearchJob(
        passes=(SearchTask(folder, section),),
        engine=EngineSection(kind="simulated"),
        sandbox=SandboxSection(),
        model=ModelSection(base="none", template="slm"),
        policy="",
    )


def measure(count: int, workers: int, folder: Path) -> dict[str, float]:
    """One search of `count` problems; this process is its driver."""
    job, totals = search_job(folder), Counter[str]()
    first = 0.0

    def on_done(summary: ProblemSummary) -> None:
        nonlocal first
        first = first or time.perf_counter()
        totals.update(problems=1, rollouts=summary.rollouts, calls=summary.engine_calls, tokens=summary.tokens)
        totals.update(nodes=sum(summary.outcomes.values()))

    section = ClusterSection(address="local", workers=workers, cpus_per_worker=(os.cpu_count() or 1) / workers)
    with ray_session(section):
        cpu = time.process_time()
        search_all(job, (WorkItem(0, p) for p in problems(count)), section, on_done, make_worker=UnexecutedWorker)
        seconds, cpu = time.perf_counter() - first, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    begun = time.perf_counter()
    left = unfinished(problems(count), job, 0)
    assert totals["problems"] == count and not left, f"{totals['problems']} finished, {len(left)} not on disk"
    size = sum(path.stat().st_size for path in shards(folder))
    return {
        "problems_per_second": count / seconds,
        "driver_peak_mb": peak,
        "driver_ms_per_problem": 1e3 * cpu / count,
        "worker_ms_per_expansion": 1e3 * seconds * workers / totals["calls"],
        "bytes_per_tree": size / count,
        "bytes_per_node": size / totals["nodes"],
        "resume_ms_per_tree": 1e3 * (time.perf_counter() - begun) / count,
        "resume_peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "expansions_per_rollout": totals["calls"] / totals["rollouts"],
    }


def extrapolate(one: dict[str, float]) -> dict[str, object]:
    """The paper's data generation of one round, from what was measured and what is assumed."""
    expansions = PAPER_PROBLEMS * PAPER_ROLLOUTS * one["expansions_per_rollout"]
    nodes = expansions * PAPER_CANDIDATES
    tokens = nodes * ASSUMED_STEP_TOKENS
    engine_hours = tokens / ASSUMED_TOKENS_PER_SECOND / 3600
    search_hours = one["worker_ms_per_expansion"] / 1e3 * (PAPER_CANDIDATES / 2) * expansions / 3600
    capacity = 1e3 / one["driver_ms_per_problem"]
    return {
        "problems": PAPER_PROBLEMS,
        "rollouts": PAPER_ROLLOUTS,
        "tokens": tokens,
        "engine_worker_hours": engine_hours,
        "search_worker_hours": search_hours,
        "hours_on_workers": {str(n): engine_hours / n for n in (8, 64, 512)},
        "driver_problems_per_second_needed": {str(n): PAPER_PROBLEMS / (engine_hours / n * 3600) for n in (8, 64, 512)},
        "driver_problems_per_second_possible": capacity,
        "disk_gb": nodes * one["bytes_per_node"] / 1e9,
        "resume_minutes": one["resume_ms_per_tree"] * PAPER_PROBLEMS / 60e3,
        "assumptions": [
            f"{PAPER_CANDIDATES} candidates an expansion and {one['expansions_per_rollout']:.1f} expansions a rollout,"
            " the latter as in this run; no early end of a solved or exhausted tree, no escalation",
            f"{ASSUMED_STEP_TOKENS} generated tokens a step, {ASSUMED_TOKENS_PER_SECOND} tokens/s of a worker's engine",
            "the search's own time runs beside the engine's, not on top of it: search_worker_hours is what must hide"
            " under engine_worker_hours; it grows with the candidates and was measured on shared cores",
            "bytes a node as in this run, whose steps are shorter (about 30 tokens)",
            "workers do not fail, problems are of equal size, the storage takes the shards' writes",
        ],
    }


def run_alone(count: int, workers: int, folder: Path) -> dict[str, float]:
    """`measure` in a fresh process, so that its peak is its own."""
    command = [sys.executable, "-m", "tests.benchmarks.scale", "--one", "--problems", str(count)]
    command += ["--workers", str(workers), "--folder", str(folder / str(count))]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env={**PASSIVE_WAIT, **os.environ})
    found: dict[str, float] = json.loads(out.stdout.splitlines()[-1])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where the trees go (default: a temporary folder)")
    parser.add_argument("--json", action="store_true", help="print one JSON object (else one line per number)")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.problems, options.workers, options.folder)))
        return 0
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        tenth = run_alone(max(1, options.problems // 10), options.workers, Path(name))
        whole = run_alone(options.problems, options.workers, Path(name))
    found: dict[str, object] = {
        "problems": options.problems,
        "workers": options.workers,
        "cores": os.cpu_count(),
        **{key: round(value, 3) for key, value in whole.items()},
        "driver_peak_mb_of_a_tenth": round(tenth["driver_peak_mb"], 1),
        "driver_growth": round(whole["driver_peak_mb"] / tenth["driver_peak_mb"], 3),
        "extrapolation": _rounded(extrapolate(whole)),
    }
    print(json.dumps(found) if options.json else "\n".join(f"{key:28}{value}" for key, value in found.items()))
    return 0


def _rounded(value: object) -> object:
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    return round(value, 2) if isinstance(value, float) else value


if __name__ == "__main__":
    sys.exit(main())
