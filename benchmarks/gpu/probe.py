"""What is there: versions, GPUs, and which packages of the benchmarks are missing.

python -m benchmarks.gpu.probe --out FILE
"""

import argparse
import json
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks import machine
from grains_vllm.vectors import write_aside

# Without these steps fail; no step asks for the others (pictures, and captum to compare with).
NEEDED = ("vllm", "torch", "transformers", "tokenizers", "safetensors", "yaml", "numpy", "aiohttp",
          "rich", "psutil", "prometheus_client", "scipy", "typer")  # fmt: skip
OPTIONAL = ("matplotlib", "captum")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    found = facts()
    write_aside(args.out, json.dumps(found, indent=1).encode())
    print(json.dumps(found, indent=1))
    if found["missing"] or not found["plugin_registered"]:
        raise SystemExit("something is missing: the steps that need it will fail")


def facts() -> dict[str, Any]:
    import torch

    return {
        "versions": machine.versions(),
        "hardware": machine.hardware(),
        "cuda": torch.version.cuda,
        "cuda_available": torch.cuda.is_available(),
        "plugin": machine.code(),
        "plugin_registered": any(
            point.name == "grains" for point in entry_points(group="vllm.general_plugins")
        ),
        "missing": [name for name in NEEDED if find_spec(name) is None],
        "missing_but_optional": [name for name in OPTIONAL if find_spec(name) is None],
    }


if __name__ == "__main__":
    main()
