"""`grains report`: one HTML page about artifacts and what was measured of them."""

from pathlib import Path
from typing import Annotated

import typer

from grains_vllm.vectors import write_aside
from offline.console import Force, input_errors, require_writable
from offline.errors import InputError


def report(
    files: Annotated[
        list[Path],
        typer.Argument(help="Artifacts, attributions (.jsonl) and results (.json), in any order."),
    ],
    out: Annotated[
        Path | None, typer.Option(help="The page; by default the first file's name with .html.")
    ] = None,
    force: Force = False,
) -> None:
    """Write one self-contained HTML page: passport, tokens, layers, sweep, evaluation.

    Files beside X.safetensors are found by themselves: X.attributions.jsonl, X.sweep.json and
    X.evaluation.json.
    """
    with input_errors():
        target = out or files[0].with_suffix(".html")
        if target.resolve() in {path.resolve() for path in files}:
            raise InputError(f"--out is '{target}', which is one of the files to report about")
        require_writable(target, force)

        from offline.report.inputs import read_inputs
        from offline.report.page import render

        page = render(read_inputs(files)).encode()
        write_aside(target, page)
        print(f"wrote {target} ({len(page) / 1e6:.1f} MB)")
