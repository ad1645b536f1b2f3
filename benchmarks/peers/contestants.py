"""Who takes part, and what each of them can be asked."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Contestant:
    """One way of steering, in a process of its own.

    Attributes:
        kind: what worker.py makes of it.
        base: the contestant without steering that it is compared with.
        formula: "norm" (the shifted stream gets its old norm back), "additive", or "" (no shift).
        package: the distribution that has to be installed, else "".
    """

    kind: str
    base: str
    formula: str
    package: str = ""


CONTESTANTS = {
    "vLLM": Contestant("vllm", "vLLM", ""),
    "grains-vllm": Contestant("grains", "vLLM", "norm"),
    "hotwire-vllm": Contestant("hotwire", "vLLM", "additive", "hotwire-vllm"),
    "transformers": Contestant("transformers", "transformers", ""),
    "transformers, hooks": Contestant("hooks-norm", "transformers", "norm"),
    "transformers, hooks, additive": Contestant("hooks-additive", "transformers", "additive"),
    "repeng": Contestant("repeng", "transformers", "norm", "repeng"),
    "steering-vectors": Contestant(
        "steering-vectors", "transformers", "additive", "steering-vectors"
    ),
}
# Answers by a plain script with hooks: what the other contestants of a formula must equal.
REFERENCE = {
    "norm": "transformers, hooks",
    "additive": "transformers, hooks, additive",
    "": "transformers",
}
