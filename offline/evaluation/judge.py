"""Another model as the judge, through any OpenAI-compatible endpoint."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from offline.endpoint import Endpoint
from offline.errors import InputError

_FOLDER = Path(__file__).parent / "judges"
_KEYS = {"metric", "verdicts", "prompt"}


@dataclass(frozen=True)
class Rubric:
    """A judge's prompt and what its verdicts are worth.

    Attributes:
        verdicts: score by word; the word stands alone in the last line of the judge's answer.
    """

    name: str
    metric: str
    verdicts: Mapping[str, float]
    prompt: str

    @classmethod
    def load(cls, name: str) -> "Rubric":
        """Reads one of the package's rubrics, or a YAML file of the same form.

        Raises:
            InputError: no such rubric, or another form.
        """
        path = _FOLDER / f"{name}.yaml"
        if not path.is_file():
            path = Path(name)
        if not path.is_file():
            known = ", ".join(sorted(found.stem for found in _FOLDER.glob("*.yaml")))
            raise InputError(f"judged:{name} names no rubric, expected {known} or a YAML file")
        try:
            value = yaml.safe_load(path.read_text())
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise InputError(f"{path.name}: not readable as YAML ({error})") from error
        if not isinstance(value, dict) or set(value) != _KEYS:
            found = sorted(value) if isinstance(value, dict) else type(value).__name__
            raise InputError(f"{path.name}: holds {found}, expected {sorted(_KEYS)}")
        verdicts = value["verdicts"]
        if not isinstance(verdicts, dict) or not all(
            isinstance(word, str) and type(score) in (int, float)
            for word, score in verdicts.items()
        ):
            raise InputError(
                f"{path.name}: verdicts is {verdicts!r}, expected words with a number each "
                "(YAML reads YES, NO, TRUE and FALSE as no text: put them in quotes)"
            )
        scores = {word: float(score) for word, score in verdicts.items()}
        return cls(path.stem, str(value["metric"]), scores, str(value["prompt"]))

    @property
    def compares(self) -> bool:
        """Whether it is shown two answers, `first` and `second`; else one, `answer`."""
        import jinja2.meta

        try:
            asked = jinja2.meta.find_undeclared_variables(jinja2.Environment().parse(self.prompt))
        except jinja2.TemplateError as error:
            raise InputError(f"judge prompt '{self.name}': {error}") from error
        return "second" in asked

    @property
    def facts(self) -> dict[str, Any]:
        """What the report says about it."""
        digest = hashlib.sha256(self.prompt.encode()).hexdigest()
        return {"rubric": self.name, "prompt_sha256": digest, "verdicts": dict(self.verdicts)}

    def score(self, text: str) -> float | None:
        """What an answer of the judge is worth; None if its last line holds no single verdict."""
        lines = [line for line in text.splitlines() if line.strip()]
        words = {word.strip(".,:;!*_`\"'()[]").upper() for word in (lines or [""])[-1].split()}
        found = [score for word, score in self.verdicts.items() if word.upper() in words]
        return found[0] if len(found) == 1 else None


class Judge:
    """A model behind an endpoint."""

    def __init__(self, endpoint: Endpoint, model: str) -> None:
        self.endpoint = endpoint
        self.model = model

    @property
    def facts(self) -> dict[str, Any]:
        """What the report says about it."""
        return {"judge": self.model, "judge_url": self.endpoint.name, "temperature": 0}

    def ask(
        self,
        rubric: Rubric,
        cases: Sequence[Mapping[str, Any]],
        on_done: Callable[[int], None] = lambda count: None,
    ) -> list[float | None]:
        """One score per case, None where the verdict cannot be read.

        Args:
            cases: what the rubric's prompt shows.
        """
        import jinja2

        environment = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False)
        try:
            template = environment.from_string(rubric.prompt)
            prompts = [template.render(**case) for case in cases]
        except jinja2.TemplateError as error:
            raise InputError(f"judge prompt '{rubric.name}': {error}") from error
        bodies = [
            {
                "model": self.model,
                "messages": [{"role": "user", "content": prompt}],
                "temperature": 0,
            }
            for prompt in prompts
        ]
        answers = self.endpoint.post_all("/v1/chat/completions", bodies, on_done)
        return [
            rubric.score(answer["choices"][0]["message"]["content"] or "") for answer in answers
        ]
