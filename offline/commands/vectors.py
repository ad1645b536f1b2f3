"""`grains inspect`, `import` and `export`: what one does with an artifact that is there."""

from pathlib import Path
from typing import Annotated

import typer

from grains_vllm.vectors import ModelFingerprint, SteeringVector
from offline.console import (
    Force,
    Json,
    input_errors,
    require_different,
    require_writable,
    stderr,
)
from offline.errors import InputError


def inspect(
    file: Annotated[Path, typer.Argument(help="An artifact.")], as_json: Json = False
) -> None:
    """Validate an artifact and print what it holds."""
    with input_errors():
        from offline import summary

        vector = SteeringVector.load(file)
        if as_json:
            print(summary.as_json(vector))
        else:
            summary.show(vector)


def import_(
    file: Annotated[
        Path,
        typer.Argument(help="A GGUF control vector; a .safetensors or .npz of tensors by layer."),
    ],
    out: Annotated[Path, typer.Option(help="The artifact to write (.safetensors).")],
    model: Annotated[
        str | None, typer.Option(help="Folder or hub id of its model; only the config is read.")
    ] = None,
    architecture: Annotated[
        str | None, typer.Option(help="Instead of --model, such as LlamaForCausalLM.")
    ] = None,
    hidden_size: Annotated[int | None, typer.Option(min=1, max=10**6)] = None,
    num_layers: Annotated[int | None, typer.Option(min=1, max=10**4)] = None,
    force: Force = False,
) -> None:
    """Make an artifact of another tool's vector (llama.cpp, repeng, a tensor per layer).

    A strength of 1 then means the length that the file's tensors have.
    """
    with input_errors():
        from offline.imports import read_vector

        require_different(file=file, out=out)
        require_writable(out, force)
        if not file.is_file():
            raise InputError(f"{file}: no such file")
        fingerprint = _fingerprint(model, architecture, hidden_size, num_layers)
        read_vector(file, fingerprint, _note, insists=model is None).save(out)
        print(f"wrote {out}")


def export(
    file: Annotated[Path, typer.Argument(help="An artifact.")],
    out: Annotated[Path, typer.Option(help="The control vector to write (.gguf).")],
    model_hint: Annotated[
        str, typer.Option(help="llama.cpp's name of the architecture, such as llama or qwen2.")
    ],
    force: Force = False,
) -> None:
    """Write a GGUF control vector for llama.cpp: the recommended layers and strength."""
    with input_errors():
        from offline.gguf_vectors import write_gguf

        require_writable(out, force)
        vector = SteeringVector.load(file)
        write_gguf(vector, out, model_hint, _note)
        print(f"wrote {out}")


def _note(text: str) -> None:
    stderr.print(f"note: {text}", soft_wrap=True)


def _fingerprint(
    model: str | None, architecture: str | None, hidden_size: int | None, num_layers: int | None
) -> ModelFingerprint:
    given = [value is not None for value in (architecture, hidden_size, num_layers)]
    if model is not None and any(given):
        raise InputError("--model says it all; leave out --architecture and the sizes")
    if model is not None:
        from offline.model import model_fingerprint

        return model_fingerprint(model)
    if architecture is None or hidden_size is None or num_layers is None:
        raise InputError(
            "a file does not say which model it fits: give --model, or all of "
            "--architecture, --hidden-size and --num-layers"
        )
    return ModelFingerprint(architecture, hidden_size, num_layers)
