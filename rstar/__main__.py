"""`python -m rstar` and the `rstar` command."""

from __future__ import annotations

import os
import sys


def main() -> None:
    # OpenMP threads that spin while they wait slow everything beside them; this must stand before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")  # weights load in seconds; the progress lines are ours
    # torch counts physical cores; on virtual machines that is half of what there is.
    os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    from rstar.cli import run

    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
