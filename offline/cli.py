"""The `grains` command: which commands there are."""

import signal
from typing import Any

import typer

from offline.commands import vectors
from offline.commands.evaluate import evaluate
from offline.commands.extract import extract
from offline.commands.report import report
from offline.commands.sweep import sweep
from offline.commands.verify import verify
from offline.console import Terminated, input_errors
from offline.errors import InputError
from offline.team import launched

app = typer.Typer(
    name="grains",
    help="Steering vectors from preference pairs (GrAInS).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(extract)
app.command()(sweep)
app.command()(evaluate)
app.command()(verify)
app.command()(report)
app.command()(vectors.inspect)
app.command("import")(vectors.import_)
app.command()(vectors.export)


@app.callback()
def _alone(context: typer.Context) -> None:
    if context.invoked_subcommand != "extract" and launched() > 1:
        with input_errors():
            raise InputError(
                f"{launched()} processes of `grains {context.invoked_subcommand}` would all do the "
                "same; only `grains extract` shares its work among processes"
            )


def main() -> None:
    """Entry point of the console script."""
    if launched() == 1:  # a launcher ends its processes itself
        signal.signal(signal.SIGTERM, _terminate)
    app()


def _terminate(*_: Any) -> None:
    raise Terminated
