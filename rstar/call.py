"""A call of a module-level function as JSON: what a driver writes and a process of its own reads.

Stages, the ranks of torchrun and the workers of Ray Train all start from such a file, so nothing is pickled and a call
can be read by people. Arguments are sections of a config, artifacts, plain values, None, and tuples, lists or dicts of
these; the function's annotations say how they are read back.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

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
    return Call(function, {name: from_json(kinds[name], value) for name, value in found["arguments"].items()})


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


def to_json(value: Any) -> Any:
    """A value as JSON: dataclasses as objects, paths as texts."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_json(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(one) for one in value]
    return str(value) if isinstance(value, Path) else value


def from_json(kind: Any, value: Any) -> Any:
    """The value of type `kind` that `to_json` has written."""
    if value is None or kind is Any:
        return value
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        kinds = typing.get_type_hints(kind)
        return typing.cast(Any, kind)(**{name: from_json(kinds[name], one) for name, one in value.items()})
    if origin in (typing.Union, types.UnionType):  # T | None
        return from_json(next(one for one in inner if one is not types.NoneType), value)
    if origin is tuple:
        each = inner[:1] * len(value) if inner[1:] == (...,) else inner
        return tuple(from_json(one, item) for one, item in zip(each, value, strict=True))
    if origin is list:
        return [from_json(inner[0], item) for item in value]
    if origin in (dict, Mapping):
        return {key: from_json(inner[1], item) for key, item in value.items()}
    return Path(value) if kind is Path else value
