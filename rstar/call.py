"""A call of a module-level function as JSON: what a driver writes and a process of its own reads.

Stages, the ranks of torchrun and the workers of Ray Train all start from such a file, so nothing is pickled and a call
can be read by people. Arguments are sections of a config, artifacts, plain values, None, and tuples, lists or dicts of
these; the function's annotations say how they are read back.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import TypeAdapter

from rstar.config import to_json
from rstar.store import read_json, write_json


@dataclass(frozen=True)
class Call:
    """A function and its arguments by parameter name."""

    function: Callable[..., Any]
    arguments: Mapping[str, Any]

    def __call__(self, *before: Any) -> Any:
        """Call the function; `before` stand for its first parameters, which are not part of the call."""
        return self.function(*before, **self.arguments)

    def write(self, path: Path, **more: Any) -> None:
        """Write the call to a file, with further keys beside it."""
        plain = {name: to_json(value) for name, value in self.arguments.items()}
        write_json(path, {"function": function_name(self.function), "arguments": plain, **more})


def call_of(function: Callable[..., Any], arguments: Sequence[Any], *, skip: int = 0) -> Call:
    """The call of `function` with positional arguments, the first `skip` parameters of which are given later."""
    names = list(inspect.signature(function).parameters)[skip:]
    if len(names) != len(arguments):
        raise TypeError(f"{function.__name__} takes {', '.join(names)}; got {len(arguments)} arguments")
    return Call(function, dict(zip(names, arguments, strict=True)))


def read_call(path: Path) -> Call:
    """The call in a file. Imports the function's module."""
    found = read_json(path)
    function = _function(found["function"])
    kinds = typing.get_type_hints(function)
    return Call(
        function, {name: TypeAdapter(kinds[name]).validate_python(one) for name, one in found["arguments"].items()}
    )


def function_name(function: Callable[..., Any]) -> str:
    """module:name, or path.py:name where the module is the script that runs."""
    module = sys.modules[function.__module__]
    spec = getattr(module, "__spec__", None)
    place = function.__module__ if function.__module__ != "__main__" else spec.name if spec else module.__file__
    return f"{place}:{function.__qualname__}"


def _function(name: str) -> Callable[..., Any]:
    place, _, function = name.rpartition(":")
    module = _from_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    return getattr(module, function)  # type: ignore[no-any-return]


def _from_file(path: Path) -> ModuleType:
    """The module of a script outside the installed packages; imports beside it work as they do where it is run."""
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def from_json(kind: Any, value: Any) -> Any:
    """The value of type `kind` that `to_json` has written."""
    return TypeAdapter(kind).validate_python(value)
