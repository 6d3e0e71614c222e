"""Where search workers run: in this process, or as Ray actors. With training's launcher the only code that imports ray.

Problems are leased: a worker is given a handful whenever it has places free, and small summaries come back; workers
write their own shards, so trees never pass through the driver. A slow worker asks less often and never holds more than
it is searching, so there is nothing to take away from it; an idle one takes what comes next. When a worker dies, the
problems it held are leased again and another worker is started in its place, wherever there is room.
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
from itertools import count, islice
from pathlib import Path
from typing import Any

from rstar.config import ClusterSection
from rstar.engines.base import EngineError
from rstar.search.collect import ProblemSummary, SearchJob, SearchWorker, WorkItem, collect
from rstar.store import index, read_head, shards, sync_path
from rstar.types import UserError

ADDRESS_VARIABLE = "RSTAR_RAY_ADDRESS"
"""Address of the Ray that a run has started or joined; its stages, in processes of their own, join it too."""

PASSIVE_WAIT = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0", "TOKENIZERS_PARALLELISM": "false"}
"""OpenMP threads that spin while they wait slow everything beside them down 10-30x; set before torch is imported."""

HANDFUL = 4  # problems in a worker's first lease, doubled each time: the dear ones, which come first, are spread out
CLOSE_SECONDS = 10.0  # for a worker to give its engines and sandbox back
WAIT_SECONDS = 60.0  # until the driver says that a worker does not start

Make = Callable[[SearchJob, str], SearchWorker]


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
    """Search every item; `on_done` hears of each as it finishes. Returns when all trees are on disk.

    On Ray `items` is read as problems are leased, so a stream of any length takes no memory here.
    """
    if section.address == "inline":
        if todo := list(items):
            asyncio.run(_inline(make_worker(job, "w0"), todo, in_flight(job), on_done))
    else:
        leases = Leases(items, workers=section.workers, in_flight=in_flight(job))
        if not leases.finished.is_set():
            _connect(section)
            asyncio.run(_on_ray(job, leases, section, on_done, make_worker))
    for one in job.passes:
        for path in shards(one.folder):  # a worker that died has not synced its last second
            sync_path(path)


def dear_first(items: Sequence[WorkItem], folder: Path) -> list[WorkItem]:
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


async def _inline(
    worker: SearchWorker, items: list[WorkItem], places: int, on_done: Callable[[ProblemSummary], None]
) -> None:
    try:
        await worker.start()
        await collect(items, worker.search_problem, in_flight=places, on_done=on_done)
    finally:
        await worker.close()


def _connect(section: ClusterSection) -> None:
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
        how="start one with `ray start --head`, or set cluster.address=local",
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
        self._out = 0
        self._moved = asyncio.Event()
        self.places = min(in_flight, math.ceil(len(self._waiting) / workers))  # no worker idles beside a full one
        self.finished = asyncio.Event()
        self._look()

    async def take(self, room: int, *, holds: int) -> list[WorkItem]:
        """Up to `room` problems. A worker that `holds` none waits here for those of others to come back or be done;
        it gets nothing when all are done."""
        while True:
            items = [self._waiting.popleft() for _ in range(min(room, len(self._waiting)))]
            items += islice(self._source, room - len(items))
            if items or holds or self.finished.is_set():
                self._out += len(items)
                return items
            self._moved.clear()
            await self._moved.wait()

    def done(self, problems: int) -> None:
        """So many of those that are out are searched."""
        self._out -= problems
        self._look()

    def back(self, items: Iterable[WorkItem]) -> None:
        """These are to be searched again; they go first."""
        returned = list(items)
        self._out -= len(returned)
        self._waiting.extendleft(returned)
        self._moved.set()

    def _look(self) -> None:
        if not self._out:
            self._waiting.extend(islice(self._source, 0 if self._waiting else 1))
            if not self._waiting:
                self.finished.set()
                self._moved.set()


class LeasedWorker:
    """A search worker as a Ray actor: problems in, summaries out."""

    def __init__(self, worker: SearchWorker) -> None:
        self._worker = worker
        self._running: set[asyncio.Task[ProblemSummary]] = set()

    async def start(self) -> None:
        await self._worker.start()

    async def exchange(self, items: list[WorkItem], wait: bool) -> list[ProblemSummary]:
        """Take on `items`; returns what is finished, at once or (`wait`) when there is something."""
        self._running |= {asyncio.create_task(self._worker.search_problem(item)) for item in items}
        done, self._running = await asyncio.wait(
            self._running, timeout=None if wait else 0, return_when=asyncio.FIRST_COMPLETED
        )
        return [task.result() for task in done]

    async def close(self) -> None:
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
        await self._worker.close()


async def _on_ray(
    job: SearchJob,
    leases: Leases,
    section: ClusterSection,
    on_done: Callable[[ProblemSummary], None],
    make_worker: Make,
) -> None:
    import ray
    from ray.exceptions import RayError, RayTaskError

    # Ray's own default is one thread per actor; on a machine of our own the workers share the cores.
    threads = (os.cpu_count() or 1) // section.workers if section.address == "local" else int(section.cpus_per_worker)
    remote_worker = ray.remote(
        num_cpus=section.cpus_per_worker,
        num_gpus=section.gpus_per_worker,
        max_concurrency=4,
        runtime_env={"env_vars": {**PASSIVE_WAIT, "OMP_NUM_THREADS": str(max(1, threads))}},
    )(_remote(job, make_worker))
    deaths: Counter[tuple[int, str]] = Counter()  # a problem -> workers that died with it; ("start", of worker n)

    def key(item: WorkItem) -> tuple[int, str]:
        return item.pass_index, item.problem.id

    async def keep_worker(number: int) -> None:
        for life in count():
            # A name of its own: a worker whose node is cut off may still be writing to the shard of the one before.
            actor = remote_worker.remote(f"w{number}-{life}" if life else f"w{number}")
            held: dict[tuple[int, str], WorkItem] = {}
            handful = HANDFUL
            try:
                if not await _started(actor, number, section, leases):
                    return
                while True:
                    asked = min(handful, leases.places - len(held))
                    items = await leases.take(asked, holds=len(held))
                    held.update((key(item), item) for item in items)
                    if not held:
                        return
                    handful *= 2 if handful < leases.places else 1
                    full = len(items) < asked or len(held) == leases.places
                    summaries = await actor.exchange.remote(items, full)
                    for summary in summaries:
                        del held[summary.pass_index, summary.problem_id]
                        on_done(summary)
                    leases.done(len(summaries))
            except RayTaskError as error:
                if not isinstance(error.cause, EngineError):
                    raise error.cause from None
                lost: Exception = error.cause  # its own message, not the worker's traceback
            except RayError as error:
                lost = error
            finally:
                with suppress(RayError, TimeoutError):
                    await asyncio.wait_for(actor.close.remote(), CLOSE_SECONDS)
                ray.kill(actor)
            leases.back(held.values())
            concerned = list(held) or [(number, "start")]
            deaths.update(concerned)
            _note_loss(number, lost, max(deaths[one] for one in concerned), section)

    await asyncio.gather(*(keep_worker(number) for number in range(section.workers)))


def _remote(job: SearchJob, make_worker: Make) -> type:
    class Worker(LeasedWorker):
        def __init__(self, name: str) -> None:
            super().__init__(make_worker(job, name))

    return Worker


async def _started(actor: Any, number: int, section: ClusterSection, leases: Leases) -> bool:
    """Wait until the worker is ready; False when the others have finished everything before it was."""
    import ray

    start = asyncio.ensure_future(actor.start.remote())
    finished = asyncio.ensure_future(leases.finished.wait())
    try:
        done, _ = await asyncio.wait({start, finished}, timeout=WAIT_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        if not done:
            asked = f"{section.cpus_per_worker:g} CPUs and {section.gpus_per_worker:g} GPUs"
            free = ", ".join(f"{name} {amount:g}" for name, amount in sorted(ray.available_resources().items()))
            print(f"search worker {number} is not ready yet; it asks for {asked}; free now: {free}", flush=True)
            await asyncio.wait({start, finished}, return_when=asyncio.FIRST_COMPLETED)
        if start.done():
            start.result()
        return bool(start.done())
    finally:
        start.cancel()
        finished.cancel()


def _note_loss(number: int, lost: Exception, times: int, section: ClusterSection) -> None:
    reason = (str(lost).strip() or type(lost).__name__).splitlines()[0]
    print(f"search worker {number} was lost ({reason}); starting it again", flush=True)
    if times > section.max_failures:
        raise UserError(
            f"{times} search workers died over the same problems, the last: {reason}",
            need=f"at most cluster.max_failures={section.max_failures}",
            how="see the worker's log; finished trees are kept, the same command resumes",
        ) from lost
