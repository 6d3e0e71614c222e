"""Several coroutines at once, of which none outlives the others' failure."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def gather(*work: Coroutine[Any, Any, T]) -> list[T]:
    """Run all of `work` at once and return the results in order.

    Where one fails, or all are cancelled, the others are cancelled and awaited first: with `asyncio.gather` they would
    go on asking the engine for a tree that is given up. The failure is raised as it is, in no group.
    """
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in work]
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]
