"""Speed of the sandbox, as one JSON object.

    python -m tests.benchmarks.sandbox --json [--seconds 5] [--trees RUN]

steps_per_second        arithmetic steps, enough in flight to fill every zygote
bare_forks_per_second   locked fork + exit on the same zygotes in the same run: the floor under every step; taken in
                        turn with the steps, medians of both
p50_ms, p99_ms          one arithmetic step after another, nothing else in flight
prefix10_p50_ms         the same step at the end of a path of ten arithmetic steps
sympy_path_speedup      a ten-step path with two dear sympy calls: time of running every node from the root in a fresh
                        interpreter state, over ours
kill_late_ms_p99        CPU time that an endless loop got past its limit
parked_mb_per_state     memory of a state between runs; 0: states are recipes, nothing is kept alive
latency_growth_1000     p50 with 1,000 live states over p50 with one
start_seconds           from nothing to the first step, self-checks included

With --trees RUN (a folder with trees anywhere below it): what running prefixes again costs the searches of that run,
and so the most that keeping states alive could save.

executed_nodes          nodes whose code was run
prefix_ms_median, ...   CPU time of the steps before such a node, by the times logged with each of them
prefix_over_10ms_share  share of the nodes where it is more than 10 ms
replay_of_step_cpu      share of replay in the CPU time of step code, replay included
replay_of_all_cpu       the same with a fork for every node counted in, at what a bare fork costs here and now
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

from rstar.config import SandboxSection
from rstar.sandbox import Sandbox, Session, State
from rstar.sandbox.supervisor import EXPENSIVE_MS
from rstar.store import read_trees
from rstar.tree import Tree
from rstar.types import ExecutionStatus

TURNS = 8
ARITHMETIC = "a = 48 / 2\nb = 48 + a\nprint(b)"
SYMPY_PATH = [
    "from sympy import *\nx, y = symbols('x y')",
    "a = 3",
    "roots_ = solve(x**4 - 10*x**2 + 9, x)",
    "b = a * 2",
    "s = sum(roots_)",
    "area = integrate(x**2 * exp(-x) * sin(x), (x, 0, pi))",
    "c = simplify(area + s)",
    "d = c + b",
    "e = N(d)",
    "print(e)",
]


async def timed(action: Callable[[], Awaitable[object]]) -> float:
    started = time.perf_counter()
    await action()
    return time.perf_counter() - started


async def latencies(session: Session, states: list[State], count: int) -> list[float]:
    """Milliseconds of `count` runs, one after another, over the states in turn."""
    found = []
    for number in range(count):
        state = states[number % len(states)]
        started = time.perf_counter()
        await session.run(state, ARITHMETIC)
        found.append(1e3 * (time.perf_counter() - started))
    return found


async def throughput(session: Session, seconds: float, width: int) -> float:
    end, done = time.perf_counter() + seconds, 0

    async def stream() -> None:
        nonlocal done
        while time.perf_counter() < end:
            _, execution = await session.run(session.root, ARITHMETIC)
            assert execution.stdout == "72.0\n"
            done += 1

    spent = await timed(lambda: asyncio.gather(*(stream() for _ in range(width))))
    return done / spent


async def path_times(session: Session) -> tuple[float, float]:
    """Seconds to build the path of SYMPY_PATH node by node: every node from the root, and as the sandbox does it."""

    async def from_root() -> None:
        for depth in range(1, len(SYMPY_PATH) + 1):
            _, execution = await session.run(session.root, "\n".join(SYMPY_PATH[:depth]))
            assert execution.status is ExecutionStatus.OK, execution

    async def ours() -> None:
        state = session.root
        for code in SYMPY_PATH:
            state, execution = await session.run(state, code)
            assert execution.status is ExecutionStatus.OK, execution

    return await timed(from_root), await timed(ours)


async def lateness(sandbox: Sandbox, count: int) -> list[float]:
    late = []
    for _ in range(count):
        execution = await sandbox.run_limited("while True: pass", 0.2)
        assert execution.status is ExecutionStatus.TIMEOUT
        late.append(max(0.0, execution.cpu_ms - 200.0))
    return late


async def measure(seconds: float) -> dict[str, float | str]:
    sandbox = Sandbox(SandboxSection())
    start_seconds = await timed(sandbox.start)
    try:
        session = sandbox.session()
        width = 2 * sandbox.processes
        await throughput(session, seconds / 4, width)
        turns = []  # in turn, so that what else the machine does weighs on both
        for _ in range(TURNS):
            forks = await sandbox.bare_forks(int(100 * seconds / TURNS))
            turns.append((await throughput(session, seconds / TURNS, width), forks))
        steps, forks = (statistics.median(column) for column in zip(*turns, strict=True))
        alone = await latencies(session, [session.root], 200)
        prefix = session.state([f"x{i} = {i} * 3 + 1\nprint(x{i})" for i in range(10)])
        deep = await latencies(session, [prefix], 100)
        states = [(await session.run(session.root, f"n = {i}"))[0] for i in range(1000)]
        crowded = await latencies(session, states, 200)
        from_root, ours = await path_times(session)
        late = await lateness(sandbox, 20)
        return {
            "steps_per_second": steps,
            "bare_forks_per_second": forks,
            "steps_per_bare_fork": steps / forks,
            "p50_ms": statistics.median(alone),
            "p99_ms": statistics.quantiles(alone, n=100)[98],
            "prefix10_p50_ms": statistics.median(deep),
            "sympy_path_speedup": from_root / ours,
            "kill_late_ms_p99": statistics.quantiles(late, n=100, method="inclusive")[98],
            "parked_mb_per_state": 0.0,
            "latency_growth_1000": statistics.median(crowded) / statistics.median(alone),
            "start_seconds": start_seconds,
            "processes": float(sandbox.processes),
            "level": sandbox.level,
        }
    finally:
        await sandbox.close()


def prefix_costs(tree: Tree) -> Iterator[tuple[float, float]]:
    """(CPU ms of the steps before it, CPU ms of its own) of every executed node."""
    before = [0.0] * len(tree.nodes)  # a parent is created before its children
    for node in tree.nodes[1:]:
        assert node.parent is not None
        parent = tree.nodes[node.parent]
        before[node.id] = before[parent.id] + parent.cpu_ms
        if node.status:
            yield before[node.id], node.cpu_ms


def parking(trees: Iterator[Tree], fork_ms: float) -> dict[str, float | str]:
    """What running prefixes again costs those searches. `fork_ms`: CPU time of a bare fork."""
    costs = [cost for tree in trees for cost in prefix_costs(tree)]
    if len(costs) < 2:
        raise SystemExit("no executed nodes in these trees")
    prefixes = [prefix for prefix, _ in costs]
    percentiles = statistics.quantiles(prefixes, n=100, method="inclusive")
    replay, own = sum(prefixes), sum(own for _, own in costs)
    return {
        "executed_nodes": float(len(costs)),
        "prefix_ms_median": percentiles[49],
        "prefix_ms_p90": percentiles[89],
        "prefix_ms_p99": percentiles[98],
        "prefix_over_10ms_share": sum(prefix > EXPENSIVE_MS for prefix in prefixes) / len(prefixes),
        "replay_of_step_cpu": replay / (replay + own),
        "replay_of_all_cpu": replay / (replay + own + fork_ms * len(costs)),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object (else one line per number)")
    parser.add_argument("--seconds", type=float, default=5.0, help="length of the throughput measurement")
    parser.add_argument("--trees", type=Path, metavar="RUN", help="also the cost of replay in the trees below RUN")
    arguments = parser.parse_args()
    found = asyncio.run(measure(arguments.seconds))
    if arguments.trees is not None:
        folders = sorted({shard.parent for shard in arguments.trees.rglob("trees-*.jsonl.zst")})
        fork_ms = 1e3 * float(found["processes"]) / float(found["bare_forks_per_second"])
        found |= parking((tree for folder in folders for tree in read_trees(folder, complete_only=False)), fork_ms)
    rounded = {name: round(value, 3) if isinstance(value, float) else value for name, value in found.items()}
    print(json.dumps(rounded) if arguments.json else "\n".join(f"{name:24}{value}" for name, value in rounded.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
