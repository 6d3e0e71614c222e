"""Where search workers run: in this process, or as Ray actors. With training's launcher the only code that imports ray.

Problems are leased: a worker gets some whenever it has free slots, and returns small summaries. Workers write their own
shards, so trees never pass through the driver. A slow worker asks less often and never holds more than it is searching.
When a worker dies, or its engine or sandbox does, the problems it held are requeued and another worker is started in
its place, wherever there is room. A problem that was lost with two workers is requeued last and searched alone, because
it may be what kills them.
"""

from __future__ import annotations

import asyncio
import math
import os
import signal
import socket
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from typing import Any, Protocol

from rstar.config import ClusterSection
from rstar.engines.base import EngineError
from rstar.sandbox import SandboxError
from rstar.search.failures import Failures
from rstar.search.worker import ProblemSummary, SearchJob, SearchWorker, WorkItem, finished_by
from rstar.store import index, read_head, shards, sync_path
from rstar.types import UserError

ADDRESS_VARIABLE = "RSTAR_RAY_ADDRESS"
"""Address of the Ray that a run has started or joined; its stages, in processes of their own, join it too."""

PASSIVE_WAIT = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0", "TOKENIZERS_PARALLELISM": "false"}
"""OpenMP threads that spin while they wait slow everything beside them down 10-30x; set before torch is imported."""

FIRST_LEASE = 4
"""Problems in a worker's first lease; doubled each time, so that the expensive ones, which come first, are spread."""
CLOSE_SECONDS = 10.0  # for a worker to give its engines and sandbox back
WAIT_SECONDS = 60.0  # until the driver says that a worker does not start

ALONE_AFTER = 2  # workers that died with a problem

Make = Callable[[SearchJob, str], SearchWorker]


class Worker(Protocol):
    """A search worker here or elsewhere: problems in, summaries out. `start` before use, `close` after."""

    async def start(self) -> None: ...

    async def exchange(self, items: list[WorkItem], wait: bool) -> list[ProblemSummary]:
        """Take on `items`; returns what is finished, at once or (`wait`) when there is something."""
        ...

    async def close(self) -> None: ...


class WorkerLost(RuntimeError):
    """A worker's process or node is gone."""


LOST = (EngineError, SandboxError, WorkerLost)
"""Failures of the infrastructure: another worker may well succeed."""


@contextmanager
def ray_session(section: ClusterSection) -> Iterator[None]:
    """Start or join Ray once for a whole run; stages started meanwhile join it. Nothing happens for `inline`."""
    if section.address == "inline" or ADDRESS_VARIABLE in os.environ:
        yield
        return
    _connect(section)
    import ray

    os.environ[ADDRESS_VARIABLE] = ray.get_runtime_context().gcs_address
    try:
        yield
    finally:
        del os.environ[ADDRESS_VARIABLE]
        ray.shutdown()


def search_all(
    job: SearchJob,
    items: Iterable[WorkItem],
    section: ClusterSection,
    on_done: Callable[[ProblemSummary], None],
    make_worker: Make = SearchWorker,
) -> None:
    """Search every item; `on_done` gets the summary of each as it finishes. Returns when all trees are on disk.

    `items` is read as problems are leased, so a stream of any length takes no memory here.
    """
    for name, number in (("cluster.workers", section.workers), ("search.trees_in_flight", in_flight(job))):
        if number < 1:
            raise UserError(f"{name}={number}", need="at least 1")
    if section.address == "inline":
        if section.workers > 1:
            print(f"cluster.address=inline: one search worker, not cluster.workers={section.workers}", flush=True)
        section, workers = replace(section, workers=1), _workers
    else:
        workers = _remote_workers
    leases = Leases(items, workers=section.workers, in_flight=in_flight(job))
    if not leases.finished.is_set():
        failures = Failures(job.passes[0].folder, section.max_failure_rate, on_done)
        asyncio.run(_search(job, leases, section, failures, workers(job, section, make_worker)))
    for one in job.passes:
        for path in shards(one.folder):  # a worker that died has not synced its last second
            sync_path(path)


def most_expensive_first(items: Sequence[WorkItem], folder: Path) -> list[WorkItem]:
    """`items` by what their problems cost in the trees of `folder` (the round before's), in generated tokens, so that
    the end of a search does not wait for a long one that began last. Problems without a tree there cost the mean."""
    tokens: Counter[str] = Counter()
    for ref in index(folder).values():
        tokens[ref.tree_id.rpartition("#")[0]] += read_head(ref)["tokens"]
    mean = tokens.total() / max(1, len(tokens))
    return sorted(items, key=lambda item: -tokens.get(item.problem.id, mean))


def in_flight(job: SearchJob) -> int:
    """Problems that a worker of `job` searches at once."""
    return max((one.search.trees_in_flight for one in job.passes), default=1)


def _connect(section: ClusterSection) -> None:
    if section.address != "local" and Path("~/.ray/auth_token").expanduser().exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # `ray start` asks for it then; other clusters do not mind
    import ray

    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    address = os.environ.get(ADDRESS_VARIABLE) or section.address
    options = {"include_dashboard": False} if address == "local" else {}
    if address not in ("local", "auto"):
        _probe(address)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, logging_level="error", log_to_driver=True, **options)
    except (ConnectionError, ValueError) as error:
        raise _no_cluster(address, str(error).splitlines()[0]) from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray puts its own in place, which ends without cleaning up


def _probe(address: str) -> None:
    """Ray itself waits minutes for an address where nothing listens."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, ValueError) as error:
        raise _no_cluster(address, str(error)) from error


def _no_cluster(address: str, reason: str) -> UserError:
    return UserError(
        f"no Ray cluster at {address}: {reason}",
        need="a running cluster",
        how="start one with `ray start --head`, or set cluster.address=local; if it asks for a token, copy the head's"
        " ~/.ray/auth_token",
    )


class Leases:
    """Which problems wait and how many are out. Reads its source as it goes: memory is that of what is in flight.

    Args:
        items: All problems, once.
        workers: That share them.
        in_flight: Problems that a worker can search at once.
    """

    def __init__(self, items: Iterable[WorkItem], *, workers: int, in_flight: int) -> None:
        self._source = iter(items)
        self._waiting = deque(islice(self._source, workers * in_flight))
        self._alone: deque[WorkItem] = deque()
        self._out = 0
        self._moved = asyncio.Event()
        self.slots = min(in_flight, math.ceil(len(self._waiting) / workers))  # no worker idles beside a full one
        self.finished = asyncio.Event()
        self._update()

    async def take(self, room: int, *, holds: int) -> list[WorkItem]:
        """Up to `room` problems. A worker that `holds` none waits here for those of others to come back or be done;
        it gets nothing when all are done."""
        while True:
            items = [self._waiting.popleft() for _ in range(min(room, len(self._waiting)))]
            items += islice(self._source, room - len(items))
            if self._alone and not items and not holds:
                items = [self._alone.popleft()]
            if items or holds or self.finished.is_set():
                self._out += len(items)
                return items
            self._moved.clear()
            await self._moved.wait()

    def done(self, problems: int) -> None:
        """So many of those that are out are searched."""
        self._out -= problems
        self._update()

    def requeue(self, items: Iterable[WorkItem], *, alone: Callable[[WorkItem], bool] = lambda item: False) -> None:
        """These are to be searched again: first, or, those that are to be `alone`, last and one at a time."""
        for item in items:
            self._out -= 1
            if alone(item):
                self._alone.append(item)
            else:
                self._waiting.appendleft(item)
        self._moved.set()

    def _update(self) -> None:
        if not self._out:
            self._waiting.extend(islice(self._source, 0 if self._waiting else 1))
            if not self._waiting and not self._alone:
                self.finished.set()
                self._moved.set()


class LeasedWorker:
    """A search worker that has several problems in hand."""

    def __init__(self, worker: SearchWorker) -> None:
        self._worker = worker
        self._running: set[asyncio.Task[ProblemSummary]] = set()

    async def start(self) -> None:
        await self._worker.start()

    async def exchange(self, items: list[WorkItem], wait: bool) -> list[ProblemSummary]:
        """As Worker.exchange."""
        self._running |= {asyncio.create_task(self._worker.search_problem(item)) for item in items}
        done, running = await asyncio.wait(
            self._running, timeout=None if wait else 0, return_when=asyncio.FIRST_COMPLETED
        )
        searched = {task for task in done if task.exception() is None}
        self._running = running | (done - searched)  # failures are raised when no summary is left to return
        return [task.result() for task in searched or done]

    async def close(self) -> None:
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
        with suppress(*LOST):  # what is dead has been noted
            await self._worker.close()


async def _search(
    job: SearchJob,
    leases: Leases,
    section: ClusterSection,
    failures: Failures,
    make_worker: Callable[[str], Worker],
) -> None:
    deaths: Counter[tuple[int, str]] = Counter()  # a problem -> workers that died with it; (n, "start"): of worker n

    def key(item: WorkItem) -> tuple[int, str]:
        return item.pass_index, item.problem.id

    def searched(held: dict[tuple[int, str], WorkItem], summaries: Sequence[ProblemSummary]) -> None:
        for summary in summaries:
            del held[summary.pass_index, summary.problem_id]
            failures.done(summary)
        leases.done(len(summaries))

    async def keep_worker(number: int) -> None:
        for life in count():
            # A name of its own: a worker whose node is cut off may still be writing to the shard of the one before.
            name = f"w{number}-{life}" if life else f"w{number}"
            worker = make_worker(name)
            held: dict[tuple[int, str], WorkItem] = {}
            lease = FIRST_LEASE
            try:
                if not await _started(worker, leases):
                    return
                while True:
                    asked = min(lease, leases.slots - len(held))
                    items = await leases.take(asked, holds=len(held))
                    held.update((key(item), item) for item in items)
                    if not held:
                        return
                    lease *= 2 if lease < leases.slots else 1
                    full = len(items) < asked or len(held) == leases.slots
                    searched(held, await worker.exchange(items, full))
            except LOST as error:
                lost = error
            finally:
                await worker.close()
            searched(held, finished_by(name, held.values(), job))  # on disk, but not reported before it died
            concerned = list(held) or [(number, "start")]
            deaths.update(concerned)
            leases.requeue(held.values(), alone=lambda item: deaths[key(item)] >= ALONE_AFTER)
            failures.note("worker", f"w{number}", str(lost) or type(lost).__name__)
            _note_loss(number, lost, max(deaths[one] for one in concerned), section)

    await asyncio.gather(*(keep_worker(number) for number in range(section.workers)))


async def _started(worker: Worker, leases: Leases) -> bool:
    """Wait until the worker is ready; False when the others have finished everything before it was."""
    start = asyncio.ensure_future(worker.start())
    finished = asyncio.ensure_future(leases.finished.wait())
    try:
        await asyncio.wait({start, finished}, return_when=asyncio.FIRST_COMPLETED)
        if start.done():
            start.result()
        return start.done()
    finally:
        start.cancel()
        finished.cancel()


def _workers(job: SearchJob, section: ClusterSection, make_worker: Make) -> Callable[[str], Worker]:
    return lambda name: LeasedWorker(make_worker(job, name))


def _remote_workers(job: SearchJob, section: ClusterSection, make_worker: Make) -> Callable[[str], Worker]:
    """Workers as Ray actors. Raises UserError where a Ray of our own could never start one."""
    _connect(section)
    import ray

    asked = {"CPU": section.cpus_per_worker, "GPU": section.gpus_per_worker}
    if section.address == "local":
        for name, amount in asked.items():
            if amount > (there := ray.cluster_resources().get(name, 0.0)):
                raise UserError(
                    f"a search worker asks for {amount:g} {name}, this machine has {there:g}",
                    need="a machine that has what cluster.cpus_per_worker and cluster.gpus_per_worker ask for",
                    how=f"set cluster.{name.lower()}s_per_worker={there:g}, or join a cluster (cluster.address=auto)",
                )
    # Ray's own default is one thread per actor; on a machine of our own the workers share the cores.
    threads = (os.cpu_count() or 1) // section.workers if section.address == "local" else int(section.cpus_per_worker)

    actors = ray.remote(
        num_cpus=section.cpus_per_worker,
        num_gpus=section.gpus_per_worker,
        max_concurrency=4,
        runtime_env={"env_vars": {**PASSIVE_WAIT, "OMP_NUM_THREADS": str(max(1, threads))}},
    )(_actor(job, make_worker))
    return lambda name: RemoteWorker(actors.remote(name), name, asked)


def _actor(job: SearchJob, make_worker: Make) -> type[LeasedWorker]:
    class Worker(LeasedWorker):  # what the process is called
        def __init__(self, name: str) -> None:
            super().__init__(make_worker(job, name))

    return Worker


class RemoteWorker:
    """A LeasedWorker in another process."""

    def __init__(self, actor: Any, name: str, asked: dict[str, float]) -> None:
        self._actor, self._name, self._asked = actor, name, asked

    async def start(self) -> None:
        import ray

        start = asyncio.ensure_future(_answer(self._actor.start.remote()))
        try:
            await asyncio.wait({start}, timeout=WAIT_SECONDS)
            if not start.done():
                asked = ", ".join(f"{name} {amount:g}" for name, amount in self._asked.items())
                free = ", ".join(f"{name} {amount:g}" for name, amount in sorted(ray.available_resources().items()))
                print(f"search worker {self._name} is not ready yet; it asks for {asked}; free: {free}", flush=True)
            await start
        finally:
            start.cancel()

    async def exchange(self, items: list[WorkItem], wait: bool) -> list[ProblemSummary]:
        found: list[ProblemSummary] = await _answer(self._actor.exchange.remote(items, wait))
        return found

    async def close(self) -> None:
        import ray

        with suppress(Exception):  # it is killed, whatever it says
            await asyncio.wait_for(_answer(self._actor.close.remote()), CLOSE_SECONDS)
        ray.kill(self._actor)


async def _answer(asked: Any) -> Any:
    """What an actor returned or raised, as itself."""
    from ray.exceptions import RayError, RayTaskError

    try:
        return await asked
    except RayTaskError as error:
        raise error.cause from None  # its own failure, not the worker's traceback
    except RayError as error:
        raise WorkerLost(str(error).strip() or type(error).__name__) from error


def _note_loss(number: int, lost: Exception, times: int, section: ClusterSection) -> None:
    reason = (str(lost).strip() or type(lost).__name__).splitlines()[0]
    print(f"search worker {number} was lost ({reason}); starting it again", flush=True)
    if times > section.max_failures:
        raise UserError(
            f"{times} search workers died over the same problems, the last: {reason}",
            need=f"at most cluster.max_failures={section.max_failures}",
            how="see the worker's log; finished trees are kept, the same command resumes",
        ) from lost
