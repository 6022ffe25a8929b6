"""Frozen dataclasses as TOML files, there and back: what a run was told is beside what it found."""

import dataclasses
import difflib
import json
import sys
import tomllib
import types
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import tyro

from examples.errors import BadInput
from examples.settings import OPTIONS

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")


def write_config(config: Any, path: Path) -> None:
    """The phase and every field that has a value, nested dataclasses as tables; None is left out.

    A field with `metadata={"kept": False}` is about this process and not about the run: it is left out.
    """
    top, tables = [f"phase = {_toml(config.phase)}"], []
    for name, value in _fields(config):
        if dataclasses.is_dataclass(value):
            lines = [f"{inner} = {_toml(it)}" for inner, it in _fields(value) if it is not None]
            tables.append("\n".join([f"[{name}]", *lines]))
        elif value is not None:
            top.append(f"{name} = {_toml(value)}")
    path.write_text("\n\n".join(["\n".join(top), *tables]).strip() + "\n")


def read_config(path: Path, default: Any) -> Any:
    """`default` with the fields that the file sets.

    Raises:
      BadInput: the file is missing or is no TOML, the phase is another, or a field is unknown or of
        another type; the message names file and field.
    """
    try:
        content = tomllib.loads(path.read_text())
    except OSError as error:
        raise BadInput(f"{path}: no configuration to read: {error.strerror}.") from error
    except tomllib.TOMLDecodeError as error:
        raise BadInput(f"{path}: no TOML: {error}.") from error
    if content.pop("phase", default.phase) != default.phase:
        raise BadInput(f"{path} is the configuration of another phase than {default.phase}.")
    return read_table(default, content, f"{path}: ")


def take_config(arguments: list[str], default: Config) -> Config:
    """`default` with what the file of `--config FILE` sets, which is taken out of the arguments.

    Raises:
      BadInput: as `read_config`.
    """
    for i, argument in enumerate(arguments):
        name, equals, path = argument.partition("=")
        if name == "--config" and (equals or i + 1 < len(arguments)):
            path = path if equals else arguments[i + 1]
            del arguments[i : i + (1 if equals else 2)]
            return read_config(Path(path), default)
    return default


def read_arguments(default: Config) -> Config:
    """What the command line says, in place of what `--config FILE` or else `default` does."""
    arguments = sys.argv[1:]
    default = take_config(arguments, default)
    return tyro.cli(type(default), default=default, args=arguments, config=OPTIONS)


def read_table(default: Config, content: dict[str, Any], place: str) -> Config:
    """`default` with the fields of a table; `place` begins an error about one of them."""
    types_of = typing.get_type_hints(type(default))
    known = [field.name for field in dataclasses.fields(default) if field.init]
    changed = {}
    for name, value in content.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f" Did you mean {near[0]!r}?" if near else f" Known are {', '.join(known)}."
            raise BadInput(f"{place}{name} is no setting.{hint}")
        old = getattr(default, name)
        if dataclasses.is_dataclass(old):
            if not isinstance(value, dict):
                raise BadInput(f"{place}{name} is a table, [{name}], and not {value!r}.")
            changed[name] = read_table(cast(Any, old), value, f"{place}{name}.")
        else:
            changed[name] = _checked(types_of[name], value, f"{place}{name}")
    try:
        return dataclasses.replace(default, **changed)
    except BadInput as error:
        raise BadInput(f"{place}{error}") from error


def _checked(kind: Any, value: Any, place: str) -> Any:
    """`value` as the type that the field has, one of a union's where it is a union."""
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        kinds = [each for each in typing.get_args(kind) if each is not type(None)]
    else:
        kinds = [kind]
    for each in kinds:
        if typing.get_origin(each) is typing.Literal:
            if value in typing.get_args(each):
                return value
        elif each is Path and isinstance(value, str):
            return Path(value)
        elif each is float and type(value) in (int, float):
            return float(value)
        elif type(value) is each:
            return value
    expected = " or ".join(getattr(each, "__name__", str(each)) for each in kinds)
    raise BadInput(f"{place} is {value!r}, expected {expected}.")


def _fields(config: Any) -> list[tuple[str, Any]]:
    return [
        (field.name, getattr(config, field.name))
        for field in dataclasses.fields(config)
        if field.metadata.get("kept", True)
    ]


def _toml(value: Any) -> str:
    return json.dumps(str(value) if isinstance(value, Path) else value)
