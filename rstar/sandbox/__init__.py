"""The step executor: untrusted code in a locked process tree of its own, never in ours.

Covered at level A (`levels` has the others): no network and no socket; no read outside Python's own libraries; no
write; no process, thread, signal or ptrace; no environment and no secret; bounded CPU time, wall time, memory, source
and output; no effect on other steps. Not covered: kernel exploits, side channels, `stat` of known paths, honesty of a
step about itself.

How it works: the supervisor starts a clean zygote that imports numpy, sympy and scipy, locks itself in and becomes two:
a warden, which keeps the books, and a template, which is forked. Each evaluation is such a fork; it runs the path's
steps before, then the new one. Only the standard library is imported.
"""

from rstar.sandbox.checks import Check
from rstar.sandbox.levels import NO_LOCKS, PROMISES, Host, probe
from rstar.sandbox.supervisor import Counts, Sandbox, SandboxError, Session, State, checks

__all__ = [
    "NO_LOCKS",
    "PROMISES",
    "Check",
    "Counts",
    "Host",
    "Sandbox",
    "SandboxError",
    "Session",
    "State",
    "checks",
    "probe",
]
