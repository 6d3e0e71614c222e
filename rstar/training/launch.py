"""A training in several processes, through torchrun on this node or Ray Train on a cluster's.

The processes read their call from a file (rstar.call) and their rows from others beside it; the first one's result
comes back as JSON, progress is read from the run's metrics file. A training function that was started by torchrun
itself (several nodes) finds its processes there and starts none.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from rstar.call import call_of, from_json, read_call
from rstar.config import TrainSection, to_json
from rstar.stopping import end_with_parent
from rstar.store import read_json, write_json, write_rows
from rstar.types import TrainProgress, UserError

R = TypeVar("R")

POLL_SECONDS = 0.5
SHOWN_LOG_CHARS = 4000
CALL, RESULT = "call.json", "result.json"  # in the folder that the processes share


def must_launch(section: TrainSection) -> bool:
    """Whether to start processes: several are asked for and this is not one of them."""
    if section.launcher not in ("torchrun", "ray"):
        raise UserError(f"launcher {section.launcher!r}", need="torchrun or ray")
    return section.processes > 1 and "WORLD_SIZE" not in os.environ


def in_processes(
    section: TrainSection,
    function: Callable[..., R],
    rows: Mapping[str, Sequence[Any]],
    arguments: Sequence[Any],
    *,
    returns: type[R],
    metrics: Path,
    on_progress: Callable[[TrainProgress], None],
) -> R:
    """Run a module-level `function(*files of rows, *arguments)` in the section's processes, which find each other.

    Args:
        section: How many processes, and what starts them.
        function: Its annotations say how its arguments are read from JSON.
        rows: Name -> rows of one kind, written to files that the processes read.
        arguments: Those behind the files.
        returns: What the function returns, a dataclass; the first process's is returned here.
        metrics: Where the first process writes its progress.
        on_progress: Called with each new line of that.

    A UserError of any process is raised here; other failures raise RuntimeError with the end of the processes' log. The
    processes end with this one.
    """
    if section.launcher == "torchrun":
        _check_gpus(section.processes)
    metrics.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".processes-", dir=metrics.parent) as name:  # where all nodes see it
        folder = Path(name).resolve()
        files = [folder / f"{kind}.jsonl" for kind in rows]
        for file, some in zip(files, rows.values(), strict=True):
            write_rows(file, some)
        call_of(function, [*files, *arguments]).write(folder / CALL)
        ended = threading.Event()
        following = threading.Thread(target=_follow, args=(ended, metrics, on_progress))
        following.start()
        failure = ""
        try:
            if section.launcher == "ray":
                from rstar.ray_training import in_ray_train

                in_ray_train(section.processes, partial(run_process, folder), folder)
            else:
                failure = _torchrun(section.processes, folder)
        except RuntimeError as error:
            failure = str(error)
        finally:
            ended.set()
            following.join()
        for path in sorted(folder.glob("mistake-*")):
            raise UserError(**json.loads(path.read_text()))
        if not (folder / RESULT).is_file():
            raise RuntimeError(f"training processes failed: {failure[-SHOWN_LOG_CHARS:]}")
        return cast(R, from_json(returns, read_json(folder / RESULT)))


def _check_gpus(count: int) -> None:
    """Two processes on one GPU would fail deep inside NCCL; without any GPU they share the CPU's cores."""
    gpus = torch.cuda.device_count()
    if 0 < gpus < count:
        raise UserError(
            f"processes={count} with torchrun, where this node has {gpus} GPUs", need="a GPU for each process",
            how=f"set processes={gpus} (sft.processes, ppm.processes, ...), or launcher=ray (sft.launcher, ...) for the"
            " GPUs of a cluster's other nodes",
        )  # fmt: skip


def _torchrun(count: int, folder: Path) -> str:
    """Run the call of `folder` in `count` processes of this node; returns their log."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", _threads(count))}
    with (folder / "log").open("wb") as log:
        processes = subprocess.Popen(
            [*command, "-m", __name__, str(folder)], stdout=log, stderr=log, env=environment, preexec_fn=end_with_parent
        )
        try:
            processes.wait()
        finally:
            processes.terminate()  # torchrun hands it on; nothing happens where it has ended
            processes.wait()
    return (folder / "log").read_text(errors="replace")


def _threads(count: int) -> str:
    return str(max(1, len(os.sched_getaffinity(0)) // count)) if hasattr(os, "sched_getaffinity") else "1"


def _follow(ended: threading.Event, metrics: Path, on_progress: Callable[[TrainProgress], None]) -> None:
    """Report the last line of the metrics file whenever it is a new one, until the processes have ended."""
    before = shown = _last_line(metrics)
    last = False
    while not last:
        last = ended.wait(POLL_SECONDS)
        line = _last_line(metrics)
        if line and line not in (before, shown):  # empty: the run has begun its file anew
            shown, found = line, json.loads(line)
            names = ("step", "steps", "loss", "tokens", "seconds")
            on_progress(TrainProgress(**{key: found[key] for key in names}))


def _last_line(metrics: Path) -> str:
    text = metrics.read_text(encoding="utf-8") if metrics.is_file() else ""
    return text[: text.rfind("\n") + 1].rpartition("\n")[0].rpartition("\n")[2]  # a line is whole with its line break


def run_process(folder: Path) -> None:
    """One of the processes: make the call of `folder`, leave its result or its mistake there."""
    rank = os.environ["RANK"]
    try:
        result = read_call(folder / CALL)()
    except UserError as error:
        write_json(folder / f"mistake-{rank}", {"got": error.got, "need": error.need, "how": error.how})
        raise
    if rank == "0":
        write_json(folder / RESULT, to_json(result))


if __name__ == "__main__":
    run_process(Path(sys.argv[1]))
