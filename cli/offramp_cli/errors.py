"""Turns what went wrong into one sentence and an exit status; a person at a terminal needs no stack trace."""

import functools
from collections.abc import Callable
from typing import ParamSpec

import typer
from offramp_contract.errors import OfframpError

from offramp_cli.console import stderr

Params = ParamSpec("Params")

EXTRA_OF_MODULE = {
    "torch": "export",
    "onnxscript": "export",
    "sklearn": "export",
    "pooch": "export",
    "matplotlib": "calibrate",
    "scipy": "calibrate",
    "jinja2": "calibrate",
    "onnxruntime": "cpu",
}


class CommandError(OfframpError):
    """What was asked for on the command line cannot be done; the message says why, in one sentence."""

    code = "command"


def in_one_sentence(command: Callable[Params, None]) -> Callable[Params, None]:
    """Let a command end with one sentence and exit status 1 for everything that a person can put right.

    A fault of ours keeps its traceback: hiding it would help no one.
    """

    @functools.wraps(command)
    def run(*args: Params.args, **kwargs: Params.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except OfframpError as error:
            _fail(error.message)
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if package not in EXTRA_OF_MODULE:
                raise
            _fail(missing_extra(package))
        except OSError as error:
            _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error))

    return run


def missing_extra(package: str) -> str:
    """Say which of the project's extras brings a package that is not installed."""
    extra = EXTRA_OF_MODULE[package]
    alternative = ", or with 'offramp[gpu]' for CUDA," if extra == "cpu" else ""
    return f"this command needs {package}: install it with  pip install 'offramp[{extra}]'{alternative} and try again"


def _fail(sentence: str) -> None:
    stderr.print(f"[bold red]error:[/] {rich_escape(sentence)}", soft_wrap=True, highlight=False)
    raise typer.Exit(1)


def rich_escape(text: str) -> str:
    """Keep square brackets of a message from being read as markup."""
    from rich.markup import escape

    return escape(text)
