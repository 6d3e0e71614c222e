"""Two Ray nodes on this machine: a search of the quickstart's size, a node that dies, and what is left at the end."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rstar.config import ClusterSection
from rstar.search.worker import ProblemSummary, SearchJob
from rstar.store import index, shards
from rstar.workers import PASSIVE_WAIT, search_all
from tests.benchmarks.faults import running
from tests.benchmarks.scale import UnexecutedWorker, problems, search_job
from tests.test_cluster import Together, items
from tests.test_launchers import evolve

ROOT = Path(__file__).parent.parent
QUICKSTART = list(problems(56))
NODES = {"num_cpus": 1, "object_store_memory": 80 * 2**20}

Cluster = pytest.importorskip("ray.cluster_utils").Cluster


class TogetherWorker(Together, UnexecutedWorker):
    """Runs no code, and begins when another one is ready too."""


def job(folder: Path, seconds: float = 0.0) -> SearchJob:
    """Problems that take about so long each, 16 at once in a worker."""
    from dataclasses import replace

    found = search_job(folder)
    (one,) = found.passes
    speed = 10_000.0 / seconds if seconds else 0.0  # a problem has about 250 tokens; 16 of them share the engine
    return replace(
        found,
        passes=(replace(one, search=replace(one.search, trees_in_flight=16)),),
        engine=replace(found.engine, tokens_per_second=speed),
    )


@pytest.fixture
def two_nodes() -> Iterator[object]:
    """A head and another node; this process is connected to the head."""
    import ray

    for key, value in PASSIVE_WAIT.items():
        os.environ.setdefault(key, value)
    cluster = Cluster(initialize_head=True, head_node_args={**NODES, "include_dashboard": False})
    cluster.other = cluster.add_node(**NODES)
    ray.init(address=cluster.address, logging_level="error", log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def complete(folder: Path) -> list[str]:
    return [ref.tree_id.partition("#")[0] for ref in index(folder).values() if ref.complete]


def test_workers_on_two_nodes_share_a_whole_search(tmp_path: Path, two_nodes: object) -> None:
    done: list[ProblemSummary] = []
    section = ClusterSection(address=two_nodes.address, workers=2)  # type: ignore[attr-defined]
    search_all(job(tmp_path, 0.5), items(QUICKSTART), section, done.append, make_worker=TogetherWorker)
    assert sorted(s.problem_id for s in done) == complete(tmp_path) == [p.id for p in QUICKSTART]
    assert len(shards(tmp_path)) == 2 and len({s.worker for s in done}) == 2
    assert len(two_nodes.list_all_nodes()) == 2  # type: ignore[attr-defined]


def test_search_is_complete_though_a_node_dies_in_its_middle(tmp_path: Path, two_nodes: object) -> None:
    done: list[ProblemSummary] = []
    over = threading.Event()  # so that a search that fails does not leave the killer waiting for ever

    def kill_other_node() -> None:
        while len({s.worker for s in done}) < 2:
            if over.wait(0.05):
                return
        two_nodes.remove_node(two_nodes.other, allow_graceful=False)  # type: ignore[attr-defined]

    killer = threading.Thread(target=kill_other_node, daemon=True)
    killer.start()
    section = ClusterSection(address=two_nodes.address, workers=2)  # type: ignore[attr-defined]
    try:
        search_all(job(tmp_path, 2.0), items(QUICKSTART), section, done.append, make_worker=TogetherWorker)
    finally:
        over.set()
        killer.join(60)
    assert sorted(s.problem_id for s in done) == complete(tmp_path) == [p.id for p in QUICKSTART]
    assert len(done) == 56, "a problem was counted twice"


OWN = """
import ray
from rstar.workers import ray_session
from rstar.config import ClusterSection
with ray_session(ClusterSection(address="local")):
    print("own", ray.get_runtime_context().gcs_address, len(ray.nodes()))
"""


def test_a_local_ray_is_our_own_beside_a_strangers_on_its_usual_ports(two_nodes: object) -> None:
    stranger = two_nodes.address  # type: ignore[attr-defined]
    with contextlib.ExitStack() as stack:
        for port in (6379, 8265, 10001):
            usual = stack.enter_context(socket.socket())
            with contextlib.suppress(OSError):  # taken by another already
                usual.bind(("0.0.0.0", port))
                usual.listen()
        out = subprocess.run(
            [sys.executable, "-c", OWN],
            cwd=ROOT,
            env={**os.environ, "RAY_ADDRESS": stranger},
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert out.returncode == 0, out.stderr
    _, address, nodes = next(line for line in out.stdout.splitlines() if line.startswith("own")).split()
    assert address != stranger and nodes == "1"


def without(*variables: str) -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key not in variables}


def command_line(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()


def processes(marker: str) -> dict[int, str]:
    """Processes of this machine that carry `marker` in their environment, and all their descendants: a sandbox's
    zygotes have an empty one."""
    import psutil

    found = {}
    for one in psutil.process_iter():
        try:
            if marker.encode() not in Path(f"/proc/{one.pid}/environ").read_bytes():
                continue
            family = [one, *one.children(recursive=True)]
        except (OSError, psutil.Error):
            continue  # ended meanwhile
        for child in family:
            with contextlib.suppress(OSError):  # this one ended meanwhile, the others of its family count
                found[child.pid] = command_line(child.pid)
    return found


def is_agent(name: str) -> bool:
    """One of Ray's own two helpers of a raylet."""
    return any("agent" in word.lower() for word in name.split()[:3])


def test_nothing_is_left_when_the_driver_dies(tmp_path: Path) -> None:
    """A driver with a Ray of its own, its stage, a worker and a sandbox: gone within 10 s, and the trees are whole."""
    folder, marker = tmp_path / "run", f"RSTAR_TEST_MARK={tmp_path}"
    driver = subprocess.Popen(
        [sys.executable, "-m", "rstar", *evolve(folder, "cluster=local", "cluster.cpus_per_worker=0.5")],
        cwd=ROOT,
        # with the token that Ray asks for by default: this process has no other cluster
        env={**without("RAY_AUTH_MODE"), "RSTAR_TEST_MARK": str(tmp_path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        end = time.monotonic() + 300
        while not complete(folder / "round_01"):
            assert driver.poll() is None and time.monotonic() < end
            time.sleep(0.1)
        everything = processes(marker)
    finally:
        driver.kill()
        driver.wait(timeout=60)
    for name in ("raylet", "ray::Worker", "rstar stage", "rstar.sandbox.zygote"):
        assert any(name in one for one in everything.values()), (name, everything)
    end = time.monotonic() + 10
    while left := {pid: name for pid, name in everything.items() if running(pid)}:
        if all(is_agent(name) for name in left.values()):
            break  # Ray's own two: they hold nothing of ours and end when they give their dead GCS up, a minute later
        assert time.monotonic() < end, left
        time.sleep(0.1)
    assert not {pid: name for pid, name in processes(marker).items() if running(pid) and not is_agent(name)}
    assert complete(folder / "round_01")
