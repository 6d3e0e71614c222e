"""A training in several processes of this node, through torchrun; what `processes` of a training section does.

The call travels as a pickle, the result comes back as one; progress is read from the run's metrics file. On clusters
torchrun or Ray Train starts the processes, and each simply calls the training function.
"""

from __future__ import annotations

import ctypes
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, cast

from rstar.types import TrainProgress, UserError

R = TypeVar("R")

POLL_SECONDS = 0.5
SHOWN_LOG_CHARS = 4000
PR_SET_PDEATHSIG = 1


def must_launch(processes: int) -> bool:
    """Whether to start processes: several are asked for and this is not one of them."""
    return processes > 1 and "WORLD_SIZE" not in os.environ


def in_processes(
    count: int, call: Callable[[], R], *, metrics: Path, on_progress: Callable[[TrainProgress], None]
) -> R:
    """Run `call` in `count` processes that find each other, and return what the first one returned.

    `call` must be picklable. A UserError of any process is raised here; other failures raise RuntimeError with the end
    of the processes' log. The processes end with this one.
    """
    with tempfile.TemporaryDirectory(prefix="rstar-processes-") as name:
        folder = Path(name)
        (folder / "call").write_bytes(pickle.dumps(call))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", _threads(count))}
        with (folder / "log").open("wb") as log:
            processes = subprocess.Popen(
                [*command, "-m", __name__, name], stdout=log, stderr=log, env=environment, preexec_fn=end_with_parent
            )
            try:
                _follow(processes, metrics, on_progress)
            finally:
                processes.terminate()  # torchrun hands it on; nothing happens where it has ended
                processes.wait()
        for path in sorted(folder.glob("mistake-*")):
            raise UserError(**json.loads(path.read_text()))
        if not (folder / "result").is_file():
            text = (folder / "log").read_text(errors="replace")
            raise RuntimeError(f"training processes failed with {processes.returncode}:\n{text[-SHOWN_LOG_CHARS:]}")
        return cast(R, pickle.loads((folder / "result").read_bytes()))


def _threads(count: int) -> str:
    return str(max(1, len(os.sched_getaffinity(0)) // count)) if hasattr(os, "sched_getaffinity") else "1"


def end_with_parent() -> None:
    """For a new process (`preexec_fn`): it is terminated when the process that started it dies, however that is."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _follow(processes: subprocess.Popen[bytes], metrics: Path, on_progress: Callable[[TrainProgress], None]) -> None:
    """Report the last line of the metrics file whenever it is a new one, until the processes end."""
    before = shown = _last_line(metrics)
    while True:
        ended = processes.poll() is not None
        line = _last_line(metrics)
        if line not in (before, shown):
            shown, found = line, json.loads(line)
            names = ("step", "steps", "loss", "tokens", "seconds")
            on_progress(TrainProgress(**{key: found[key] for key in names}))
        if ended:
            return
        time.sleep(POLL_SECONDS)


def _last_line(metrics: Path) -> str:
    text = metrics.read_text(encoding="utf-8") if metrics.is_file() else ""
    return text[: text.rfind("\n") + 1].rpartition("\n")[0].rpartition("\n")[2]  # a line is whole with its line break


def main() -> None:
    """One of the processes."""
    folder = Path(sys.argv[1])
    call = pickle.loads((folder / "call").read_bytes())
    try:
        result = call()
    except UserError as error:
        told = {"got": error.got, "need": error.need, "how": error.how}
        (folder / f"mistake-{os.environ['RANK']}").write_text(json.dumps(told))
        raise
    if os.environ["RANK"] == "0":
        (folder / "result").write_bytes(pickle.dumps(result))


if __name__ == "__main__":
    main()
