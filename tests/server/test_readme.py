"""Every curl and every client example of the documents, executed against a real server.

A `json` block right after a `bash` block is (part of) the answer, "..." being anything.
"""

import json
import os
import re
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Least number of curl examples; fewer are found if a document changes its form.
DOCUMENTS = {"README.md": 1, "docs/clients.md": 7}
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$(?:\n+^```json\n(.*?)^```$)?", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Example:
    """One curl command, and what the document says of its answer (None: nothing)."""

    document: str
    command: str
    answer: str | None = None

    @property
    def body(self):
        words = shlex.split(self.command)
        data = [words[n + 1] for n, word in enumerate(words) if word in ("-d", "--data", "--json")]
        return json.loads(data[0]) if data else {}

    @property
    def vectors(self):
        """The names that it asks to be steered by."""
        _, _, alias = self.body.get("model", "").partition(":")
        asked = self.body.get("vllm_xargs", {}).get("steering", alias)
        return sorted(
            part.partition("=")[0] for part in asked.split(",") if part not in ("", "none")
        )


def blocks(document):
    """(language, code, the `json` block after it or None) of each fenced block."""
    return [match.groups() for match in _FENCE.finditer((ROOT / document).read_text())]


def examples(document):
    found = []
    for language, code, answer in blocks(document):
        commands = list(_curls(code)) if language in ("bash", "sh", "shell", "") else []
        # What follows a block with several commands is the last one's.
        found += [Example(document, command) for command in commands[:-1]]
        found += [Example(document, command, answer) for command in commands[-1:]]
    return found


def _curls(code):
    """The commands of a block that begin with curl, each with all of its lines."""
    lines = iter(code.splitlines())
    for line in lines:
        if not line.startswith("curl "):
            continue
        while line.endswith("\\") or not _complete(line):
            line += "\n" + next(lines)
        yield line


def _complete(command):
    try:
        shlex.split(command)
    except ValueError:  # a quotation goes on
        return False
    return True


EXAMPLES = [example for document in DOCUMENTS for example in examples(document)]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_no_example_is_passed_over(document):
    """Whatever stands in a code block and says curl is among the examples that are run."""
    found = [example for example in EXAMPLES if example.document == document]
    assert len(found) >= DOCUMENTS[document]
    code = "\n".join(text for _, text, _ in blocks(document))
    said = [line for line in code.splitlines() if re.search(r"\bcurl\b", line.partition("#")[0])]
    assert len(said) == len(found), said
    text = (ROOT / document).read_text()
    assert text.count("```") == 2 * len(re.findall(r"^```\w*$\n.*?^```$", text, re.S | re.M))


@pytest.mark.engine
@pytest.mark.parametrize(
    "example", EXAMPLES, ids=[f"{e.document} {n}" for n, e in enumerate(EXAMPLES, 1)]
)
def test_curl(server, example):
    assert "localhost:8000" in example.command
    done = subprocess.run(
        ["bash", "-c", _here(example.command, server).replace("curl ", f"curl {_FLAGS} ", 1)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "no_proxy": "*"},
    )
    assert done.returncode == 0, done.stderr
    text, _, status = done.stdout.rpartition("\n")
    expected = json.loads(_here(example.answer, server)) if example.answer else {}
    assert status == ("400" if "error" in expected else "200"), text
    if example.body.get("stream"):
        *events, last = re.findall(r"^data: (.*)$", text, re.MULTILINE)
        assert last == "[DONE]" and len(events) > 1
        found = [json.loads(event) for event in events]
        receipts = [event["grains"] for event in found if "grains" in event]
        receipt = receipts[0] if receipts else None
    else:
        answer = json.loads(text)
        assert _holds(answer, expected), text
        receipt = answer.get("grains")
    if "error" not in expected:
        applied = sorted(vector["name"] for vector in receipt["vectors"]) if receipt else []
        assert applied == example.vectors, text


_FLAGS = "-sS -w '\\n%{http_code}'"


def _here(text, server):
    """The document's server and model are replaced by those of the tests."""
    text = text.replace("localhost:8000", server.url.removeprefix("http://"))
    return re.sub(r"\bllama\b", "tiny", text)


def _holds(found, expected):
    """Whether `found` has everything that `expected` has, and possibly more keys."""
    if isinstance(expected, dict):
        return isinstance(found, dict) and all(
            key in found and _holds(found[key], value) for key, value in expected.items()
        )
    if isinstance(expected, list):
        return (
            isinstance(found, list)
            and len(found) == len(expected)
            and all(_holds(*pair) for pair in zip(found, expected, strict=True))
        )
    return expected == "..." or found == expected


@pytest.mark.engine
def test_python_clients(server, capsys):
    codes = [
        code
        for document in DOCUMENTS
        for language, code, _ in blocks(document)
        if language == "python" and "openai" in code
    ]
    assert codes
    for code in codes:
        exec(compile(_here(code, server), "document", "exec"), {})
        assert capsys.readouterr().out.strip()
