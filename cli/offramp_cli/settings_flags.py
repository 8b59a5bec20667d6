"""Turns a settings class into command-line flags, so that a setting is written down once.

Every field becomes `--field-name` with its description, its environment variable and its default. A flag that is not
given is None, and the class then looks at the environment, its file and its own default, in that order.
"""

import inspect
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings


def with_flags(settings: type[BaseSettings]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a decorator that adds a flag for each setting to a command.

    The command's last parameter, `**given`, receives every flag's value by field name, None where it was not given.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in inspect.signature(command).parameters.values() if p.kind is not p.VAR_KEYWORD]
        flags = [_flag(name, field, settings.model_config) for name, field in settings.model_fields.items()]
        command.__signature__ = inspect.Signature([*own, *flags])  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in (*own, *flags)} | {"return": None}
        return command

    return decorate


def _flag(name: str, field: FieldInfo, config: Mapping[str, Any]) -> inspect.Parameter:
    plain = _plain_type(field.annotation)
    flag = "--" + name.replace("_", "-")
    names = f"{flag}/--no-{flag[2:]}" if plain is bool else flag
    variable = f"{config.get('env_prefix', '')}{name}".upper()
    default = "unset" if field.default is None else str(field.default).lower() if plain is bool else str(field.default)
    help_ = f"{field.description} [dim]\\[{variable}; default: {default}][/dim]"
    option = typer.Option(names, help=help_, show_default=False, metavar=_metavar(plain))
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[plain | None, option]
    )


def _plain_type(annotation: Any) -> Any:
    """Reduce a field's type to one that a command line can read; the class does the real checking."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        (annotation,) = (member for member in typing.get_args(annotation) if member is not type(None))
    return annotation if annotation in (bool, int, float, Path) else str


def _metavar(plain: Any) -> str | None:
    return None if plain is bool else {int: "N", float: "NUMBER", Path: "FILE"}.get(plain, "TEXT")
