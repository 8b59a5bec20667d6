"""`offramp`: trains, exports, calibrates, serves, tests under load. A command's module is imported when it is named."""

from importlib import import_module

import typer
from typer.core import TyperGroup

from offramp_cli.errors import in_one_sentence

COMMANDS = ("demo", "train", "models", "export", "calibrate", "evaluate", "serve", "loadtest")


class LazyCommands(TyperGroup):
    """Finds a command `name` as the function `name` of the module `offramp_cli.name`."""

    def list_commands(self, ctx: object) -> list[str]:
        """Give the names, in the order of help."""
        return list(COMMANDS)

    def get_command(self, ctx: object, cmd_name: str):  # type: ignore[no-untyped-def]  # typer does not export its command's type
        """Import and build one command."""
        if cmd_name not in COMMANDS:
            return None
        function = getattr(import_module(f"offramp_cli.{cmd_name}"), cmd_name)
        single = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_show_locals=False)
        single.command(cmd_name)(in_one_sentence(function))
        return typer.main.get_command(single)


app = typer.Typer(
    cls=LazyCommands,
    name="offramp",
    help="Depth-adaptive networks, exported to stages and served with a budget for every request.",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
)


@app.callback()
def offramp() -> None:
    """Depth-adaptive networks, exported to stages and served with a budget for every request."""


def main() -> None:
    """Run the command line."""
    app(prog_name="offramp")


if __name__ == "__main__":
    main()
