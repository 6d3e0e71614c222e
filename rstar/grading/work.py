"""How much one answer may cost. Every part of the grader that can grow asks here before it starts.

Bounds on single values are not enough: a list of products of long fractions stays below all of them and takes half a
minute. So all of an answer, its elements, sums and comparisons, draws on one budget, and what it cannot pay for is not
computed.
"""

from __future__ import annotations

import threading

BUDGET = 6000  # about microseconds; of 8,273 references of MATH and GSM8K none needs 700


class Exhausted(Exception):
    """The answer costs more than its budget: left undecided here."""


class _Left(threading.local):
    """What is left of the budget of the answer that this thread grades."""

    units = BUDGET


_LEFT = _Left()


def begin() -> None:
    """A new answer, a full budget."""
    _LEFT.units = BUDGET


def charge(units: int) -> None:
    """Pay for work that is about to be done.

    Raises:
        Exhausted: it may not be done.
    """
    _LEFT.units -= units
    if _LEFT.units < 0:
        raise Exhausted
