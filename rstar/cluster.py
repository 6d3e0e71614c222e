"""Where search workers run: in this process, or as Ray actors. The only module that imports ray.

Problems go to workers one by one and small summaries come back; the workers write their own shards, so trees never pass
through the driver. A worker that dies loses only its problems in flight: they go back into the queue and the worker is
started again, up to `cluster.max_failures` times in all.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rstar.config import ClusterSection
from rstar.engines.base import EngineError
from rstar.search.collect import ProblemSummary, SearchJob, SearchWorker, WorkItem, collect
from rstar.types import UserError

ADDRESS_VARIABLE = "RSTAR_RAY_ADDRESS"
"""Address of the Ray that a run has started or joined; its stages, in processes of their own, join it too."""

PASSIVE_WAIT = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0", "TOKENIZERS_PARALLELISM": "false"}
"""OpenMP threads that spin while they wait slow everything beside them down 10-30x; set before torch is imported."""


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
    job: SearchJob, items: Sequence[WorkItem], section: ClusterSection, on_done: Callable[[ProblemSummary], None]
) -> None:
    """Search every item; `on_done` hears of each as it finishes. Returns when all trees are on disk."""
    if not items:
        return
    if section.address == "inline":
        asyncio.run(_inline(job, items, on_done))
    else:
        _connect(section)
        asyncio.run(_on_ray(job, items, section, on_done))


def in_flight(job: SearchJob) -> int:
    """Problems that a worker of `job` searches at once."""
    return max(one.search.trees_in_flight for one in job.passes)


async def _inline(job: SearchJob, items: Sequence[WorkItem], on_done: Callable[[ProblemSummary], None]) -> None:
    worker = SearchWorker(job, "w0")
    try:
        await worker.start()
        await collect(items, worker.search_problem, in_flight=in_flight(job), on_done=on_done)
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
    try:
        ray.init(address=address, logging_level="error", log_to_driver=True, **options)
    except (ConnectionError, ValueError) as error:
        raise _no_cluster(address, str(error).splitlines()[0]) from error


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


async def _on_ray(
    job: SearchJob, items: Sequence[WorkItem], section: ClusterSection, on_done: Callable[[ProblemSummary], None]
) -> None:
    import ray
    from ray.exceptions import RayActorError, RayTaskError

    remote_worker = ray.remote(SearchWorker)
    threads = max(1, (os.cpu_count() or 1) // section.workers)  # Ray's own default is one thread per actor
    queue = deque(items)
    failures = 0

    async def keep_worker(number: int) -> None:
        nonlocal failures
        while queue:
            worker = remote_worker.options(
                num_cpus=section.cpus_per_worker,
                num_gpus=section.gpus_per_worker,
                max_concurrency=in_flight(job) + 8,
                runtime_env={"env_vars": {**PASSIVE_WAIT, "OMP_NUM_THREADS": str(threads)}},
            ).remote(job, f"w{number}")
            lost: BaseException | None = None

            async def pull(worker: object = worker) -> None:
                nonlocal lost
                while queue and lost is None:
                    item = queue.popleft()
                    try:
                        on_done(await worker.search_problem.remote(item))  # type: ignore[attr-defined]
                    except RayActorError as error:
                        queue.append(item)
                        lost = error
                    except RayTaskError as error:
                        queue.append(item)
                        if not isinstance(error.cause, EngineError):
                            raise error.cause from None
                        lost = error

            try:
                await worker.start.remote()
                await asyncio.gather(*(pull() for _ in range(in_flight(job))))
            except RayActorError as error:
                lost = error
            except RayTaskError as error:
                raise error.cause from None
            finally:
                if lost is None:
                    await worker.close.remote()
                ray.kill(worker)
            if lost is not None:
                failures += 1
                reason = str(lost).strip().splitlines()[0]
                print(f"search worker {number} was lost ({reason}); starting it again", flush=True)
                if failures > section.max_failures:
                    raise UserError(
                        f"search workers died {failures} times, last: {reason}",
                        need=f"at most cluster.max_failures={section.max_failures}",
                        how="see the worker's log; finished trees are kept, the same command resumes",
                    ) from lost

    await asyncio.gather(*(keep_worker(i) for i in range(section.workers)))
