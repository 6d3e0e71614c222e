"""The processes of one training on a Ray cluster, through Ray Train: the counterpart of torchrun on one node."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rstar.types import UserError


def in_ray_train(count: int, work: Callable[[], None], folder: Path) -> None:
    """Run `work` in `count` Ray Train workers (a GPU each where the cluster has any), a torch process group around it.

    Joins the Ray of the run where there is one, else starts one on this machine for the time being. `work` travels as a
    pickle; `folder` is one that all nodes see. Raises RuntimeError with the first worker's failure.
    """
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    started = not ray.is_initialized()
    if started:
        address = os.environ.get("RSTAR_RAY_ADDRESS", "local")  # of the run, see rstar.workers
        options = {"include_dashboard": False, "num_cpus": max(count, os.cpu_count() or 1)}
        ray.init(address=address, logging_level="error", **(options if address == "local" else {}))
    try:
        gpus = ray.cluster_resources().get("GPU", 0)
        if 0 < gpus < count:
            raise UserError(f"processes={count} on a Ray cluster with {gpus:g} GPUs", need="a GPU for each process")
        trainer = TorchTrainer(
            _in_folder(work, os.getcwd()),
            scaling_config=ScalingConfig(num_workers=count, use_gpu=gpus > 0),
            torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
            run_config=RunConfig(storage_path=str(folder), failure_config=FailureConfig(max_failures=0)),
        )
        try:
            trainer.fit()
        except Exception as error:  # Ray's own families of errors; the worker's is in their text
            raise RuntimeError(f"Ray Train failed: {error}") from error
    finally:
        if started:
            ray.shutdown()


def _in_folder(work: Callable[[], None], folder: str) -> Callable[[], Any]:
    def run() -> None:
        os.chdir(folder)  # relative paths mean the same as in the process that asked
        work()

    return run
