"""The `grains` command: which commands there are."""

import typer

from offline.commands import vectors
from offline.commands.extract import extract

app = typer.Typer(
    name="grains",
    help="Steering vectors from preference pairs (GrAInS).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(extract)
app.command()(vectors.inspect)
app.command("import")(vectors.import_)
app.command()(vectors.export)


def main() -> None:
    """Entry point of the console script."""
    app()
