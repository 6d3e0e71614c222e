"""YAML files and `key=value` overrides laid over a schema of dataclasses; a mistake is answered with the key's name."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from pathlib import Path
from typing import Any, TypeVar, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from rstar.types import UserError

T = TypeVar("T")

SHORTHANDS = {"problems": "name", "cluster": "address", "engine": "kind", "model": "base"}
"""`problems=gsm8k` means `problems.name=gsm8k`, and so on, where the key is a section."""


def schema_node(schema: type[Any]) -> DictConfig:
    """The schema as a node, made once (it takes a tenth of a second); merging copies it."""
    if schema not in _nodes:
        node = _nodes[schema] = OmegaConf.structured(schema)
        OmegaConf.set_readonly(node, False)
    return _nodes[schema]


_nodes: dict[type[Any], DictConfig] = {}


def file_layers(path: Path, seen: tuple[Path, ...] = ()) -> list[tuple[Path, DictConfig]]:
    """(file, its settings) of a config file and of those it is based on, the lowest first."""
    if not path.is_file():
        raise UserError(f"no config file {path}", need="a YAML file", how="see configs/ for shipped ones")
    if path.resolve() in seen:
        raise UserError(f"{path} is its own base", need="a chain of `base:` files that ends")
    try:
        node = OmegaConf.load(path)
    except Exception as error:  # the YAML library raises its own family of errors
        raise UserError(f"{path} is not readable YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(node, DictConfig):
        raise UserError(f"{path} holds no mapping", need="`section:` keys at the top level")
    base = node.pop("base", None)
    below = file_layers(path.parent / base, (*seen, path.resolve())) if base else []
    return [*below, (path, node)]


def resolve_inputs(schema: type[Any], layer: DictConfig, file: Path) -> None:
    """Make relative paths of input files (settings marked `INPUT`) in a file's layer absolute where they are there
    beside that file; the others stay relative to the working folder."""

    def beside(value: Any) -> Any:
        if OmegaConf.is_list(value):
            return [beside(one) for one in value]
        if OmegaConf.is_dict(value):
            return {key: beside(one) for key, one in value.items()}
        found = file.parent / value if isinstance(value, str) and value not in ("", "smollm2", "tiny") else None
        return str(found.resolve()) if found is not None and found.exists() else value

    def below(kind: Any, node: Any) -> None:
        for one in dataclasses.fields(kind) if dataclasses.is_dataclass(kind) and OmegaConf.is_dict(node) else ():
            if OmegaConf.is_missing(node, one.name) or one.name not in node:
                continue
            if one.metadata.get("input"):
                node[one.name] = beside(node[one.name])
            else:
                below(_field_types(cast(type[Any], kind))[one.name], node[one.name])

    below(schema, layer)
    for overlay in (layer.get("rounds") or {}).values():
        below(schema, overlay)


def override_node(schema: type[Any], text: str) -> DictConfig:
    """One `key=value` as a node. What `schema` takes as a text is the value as it stands, unless it is in quotes: YAML
    would see a mapping in {question} and nothing in an empty one."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UserError(f"override {text!r}", need="key=value", how="for example search.rollouts=16")
    if _kind(schema, key) is str and value[:1] not in ("'", '"') and value != "null":
        node = OmegaConf.create()
        OmegaConf.update(node, key, value)
        return node
    try:
        return OmegaConf.from_dotlist([text])
    except Exception as error:  # YAML errors inside the value
        raise UserError(f"override {text!r} has an unreadable value: {str(error).splitlines()[0]}") from error


def merge(schema: type[Any], base: DictConfig, layer: DictConfig, prefix: str = "") -> DictConfig:
    """`layer` over `base`. Raises UserError with the nearest key, or with what the key takes."""
    try:
        _spell_out(layer, base)
        return cast(DictConfig, OmegaConf.merge(base, layer))
    except ConfigKeyError as error:
        key = prefix + (error.full_key or str(error.key))
        near = difflib.get_close_matches(key.removeprefix(prefix), keys(schema), n=1, cutoff=0.0)
        hint = f"the nearest key is {prefix}{near[0]}" if near else ""
        raise UserError(f"unknown key {key}", need="a key of this recipe's config", how=hint) from error
    except OmegaConfBaseException as error:
        key = error.full_key or str(next(iter(layer)))
        reason = str(error).splitlines()[0].removeprefix("Merge error: ")
        raise UserError(
            f"{prefix}{key}: {reason}", need=_expected(schema, key), how="see `rstar config FILE`"
        ) from error
    except TypeError as error:  # a mapping where a list is wanted, and the like
        key = str(next(iter(layer)))
        raise UserError(
            f"{prefix}{key}: {error}", need=_expected(schema, key), how="see `rstar config FILE`"
        ) from error


def _spell_out(layer: DictConfig, base: DictConfig) -> None:
    """Replace shorthands in `layer` by the keys they stand for."""
    for name, value in list(layer.items()):
        below = base.get(name, None)
        if name == "rounds" and isinstance(value, DictConfig):
            for overlay in value.values():
                if isinstance(overlay, DictConfig):
                    _spell_out(overlay, base)
        elif isinstance(below, DictConfig):
            if isinstance(value, DictConfig):
                _spell_out(value, below)
            elif name in SHORTHANDS:
                layer[name] = {SHORTHANDS[str(name)]: value}


def _expected(schema: type[Any], key: str) -> str:
    """What a dotted key takes, in words."""
    kind = _kind(schema, key)
    if kind is None:
        return ""
    if dataclasses.is_dataclass(kind):
        return f"a section with {', '.join(_field_types(cast(type[Any], kind)))}"
    return str(getattr(kind, "__name__", kind)) if not typing.get_args(kind) else str(kind)


def _kind(schema: type[Any], key: str) -> Any:
    """The type of a dotted key, in a round's overlay too; None where there is no such key."""
    names = key.split("[")[0].split(".")
    kind: Any = schema
    for name in names[2:] if names[0] == "rounds" else names:
        kind = _field_types(cast(type[Any], kind)).get(name) if dataclasses.is_dataclass(kind) else None
    return kind


def to_object(schema: type[T], node: DictConfig) -> T:
    """The node as an instance of `schema`. Raises UserError for a key without a value."""
    try:
        return cast(T, OmegaConf.to_object(node))
    except OmegaConfBaseException as error:
        raise UserError(
            f"{error.full_key} has no value",
            need=_expected(schema, error.full_key or ""),
            how=f"set it: {error.full_key}=...",
        ) from error


def keys(schema: type[Any], prefix: str = "") -> list[str]:
    """All dotted keys of a schema."""
    found: list[str] = []
    for name, kind in _field_types(schema).items():
        found.append(prefix + name)
        if dataclasses.is_dataclass(kind):
            found.extend(keys(cast(type[Any], kind), f"{prefix}{name}."))
    return found


def _field_types(schema: type[Any]) -> dict[str, Any]:
    hints = typing.get_type_hints(schema)
    return {f.name: hints[f.name] for f in dataclasses.fields(schema)}
