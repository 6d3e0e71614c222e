"""The kinds of failure in a search, kept apart: a step that failed is data, infrastructure that failed is tried again.

Neither may pass unseen: trees of an overloaded machine, whose steps all time out, look like those of a bad policy.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from rstar.search.worker import ProblemSummary
from rstar.store import append_line, read_lines
from rstar.types import ExecutionStatus, UserError

FAILURES = "failures.jsonl"
JUDGED_FROM = 50  # evaluations; of so few, a tenth that time out pass a limit of a quarter once in 1,000 searches


class Failures:
    """Counts of what failed in a search: steps (model errors), and infrastructure (engines, sandboxes, workers).

    Infrastructure failures are written to `folder`/failures.jsonl; the stage's record counts them.

    Args:
        folder: Of the search.
        limit: Share of steps that may time out, and of evaluations and workers that may be lost, in [0, 1].
        on_done: Called with the summary of each finished problem.
    """

    def __init__(self, folder: Path, limit: float, on_done: Callable[[ProblemSummary], None]) -> None:
        self.folder, self.limit, self.on_done = folder, limit, on_done
        self.executions: Counter[str] = Counter()
        self.problems = self.infrastructure = 0

    def done(self, summary: ProblemSummary) -> None:
        """Count a finished problem. Raises UserError where the limit is passed."""
        self.executions.update(summary.executions)
        self.problems += 1
        self.on_done(summary)
        if summary.restarted:
            self.note("sandbox", summary.worker, "evaluations started again", summary.restarted)
        self._check(self.executions[ExecutionStatus.TIMEOUT], self.executions.total(), "of the steps timed out")

    def note(self, kind: str, worker: str, reason: str, times: int = 1) -> None:
        """Write down a failure of the infrastructure. Raises UserError where the limit is passed."""
        self.infrastructure += times
        line = {"kind": kind, "worker": worker, "reason": reason, "times": times, "time": round(time.time())}
        append_line(self.folder / FAILURES, line)
        tried = self.problems + self.executions.total() + self.infrastructure  # recipes without code have problems only
        self._check(self.infrastructure, tried, f"of the work failed with the infrastructure (see {FAILURES})")

    def _check(self, failed: int, tried: int, words: str) -> None:
        if tried >= JUDGED_FROM and failed > self.limit * tried:
            raise UserError(
                f"{failed / tried:.0%} {words}, {failed} of {tried}: its trees are not worth training on",
                need=f"at most cluster.max_failure_rate={self.limit:g}",
                how="mend the cause (an overloaded machine? sandbox.cpu_seconds?), remove "
                f"{self.folder}/trees-* to search their problems again, run the same command; or raise the limit",
            )


def infrastructure_failures(folder: Path) -> dict[str, int]:
    """How often each kind of infrastructure has failed in the searches of a folder."""
    found: Counter[str] = Counter()
    for line in read_lines(folder / FAILURES):
        found[line["kind"]] += line["times"]
    return dict(found)
