"""Settings of a run as plain data.

They are read from JSON, changed by ``key=value`` and made into a dataclass.

Every training command reads them the same way. It does not know any training, nor torch.
"""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.strict_json import parse_json


def read_settings(config: Path | None) -> dict[str, Any]:
    """A JSON table of settings, or an empty one.

    Args:
        config: the file, or None.

    Raises:
        InputError: it cannot be read or is no table.
    """
    if config is None:
        return {}
    try:
        found = parse_json(config.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"settings {config} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"settings {config} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise InputError(f"settings {config} hold no table")
    return found


def laid_over(defaults: Mapping[str, Any], config: Path | None, changes: Sequence[str] | None) -> dict[str, Any]:
    """Defaults, then a file, then ``key=value`` changes.

    Args:
        defaults: every setting, nested.
        config: JSON file, or None.
        changes: such as ``proxy.epochs=4``.

    Raises:
        InputError: an unknown key, or a file that cannot be read.
    """
    data: dict[str, Any] = json.loads(json.dumps(defaults))
    merge(data, read_settings(config), "")
    for change in changes or ():
        merge(data, parse_change(change), "")
    return data


def parse_change(text: str) -> dict[str, Any]:
    """``a.b=value`` as nested data.

    Raises:
        InputError: no equals sign.
    """
    key, sign, value = text.partition("=")
    if not sign or not key:
        raise InputError(f"{text!r} is no key=value")
    try:
        parsed: Any = parse_json(value)
    except ValueError:
        parsed = value
    for part in reversed(key.strip().split(".")):
        parsed = {part: parsed}
    return parsed


def merge(data: dict[str, Any], changes: Any, where: str) -> None:
    """Lays changes over settings, in place.

    Raises:
        InputError: an unknown key, or a part where a value belongs.
    """
    if not isinstance(changes, Mapping):
        raise InputError(f"settings {where or 'at the top'} must be a table")
    for key, value in changes.items():
        if key not in data:
            raise InputError(f"there is no setting {where}{key}; there is: {', '.join(data)}")
        if isinstance(data[key], dict):
            merge(data[key], value, f"{where}{key}.")
        else:
            data[key] = value


def to_json(config: Any) -> dict[str, Any]:
    """Settings as plain data."""
    return json.loads(json.dumps(asdict(config)))


def build(kind: Any, data: Mapping[str, Any]) -> Any:
    """Makes a dataclass of plain data, checking every value's type.

    Args:
        kind: the dataclass.
        data: a value for every field.

    Raises:
        InputError: a value of the wrong type, or one the class refuses.
    """
    hints = typing.get_type_hints(kind)
    values = {f.name: _value(hints[f.name], data[f.name], f.name) for f in fields(kind)}
    return kind(**values)


def _value(hint: Any, value: Any, name: str) -> Any:
    if is_dataclass(hint):
        return build(hint, value)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value not in arguments:
            raise InputError(f"{name} is one of {', '.join(map(str, arguments))}, not {value!r}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise InputError(f"{name} must be a list, not {value!r}")
        inner = [arguments[0]] * len(value) if len(arguments) == 2 and arguments[1] is ... else list(arguments)
        if len(inner) != len(value):
            raise InputError(f"{name} must be a list of {len(inner)}, not {value!r}")
        return tuple(_value(kind, item, name) for kind, item in zip(inner, value, strict=True))
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _value(next(a for a in arguments if a is not type(None)), value, name)
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise InputError(f"{name} must be of kind {hint.__name__}, not {value!r}")
    return value


__all__ = ["build", "laid_over", "merge", "parse_change", "read_settings", "to_json"]
