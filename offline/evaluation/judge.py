"""Another model as the judge, through any OpenAI-compatible endpoint."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grains_vllm import plain_yaml
from offline.answer_forms import Chat
from offline.endpoint import Body, Endpoint
from offline.errors import InputError
from offline.evaluation.chats import post_chats, with_image
from offline.pictures import Picture

_FOLDER = Path(__file__).parent / "judges"
_KEYS = {"metric", "verdicts", "prompt"}
_MAY = {"below", "image"}


@dataclass(frozen=True)
class Rubric:
    """A judge's prompt and what its verdicts are worth.

    Attributes:
        metric: what the mean score is called; higher is better.
        verdicts: score by word; the word stands alone in the last line of the judge's answer.
        below: further figures of the same verdicts, by name: the share of scores below a number;
            lower is better.
        image: whether the judge is shown the prompt's image, too.
    """

    name: str
    metric: str
    verdicts: Mapping[str, float]
    prompt: str
    below: Mapping[str, float] = field(default_factory=dict)
    image: bool = False

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
            value = plain_yaml.load(path.read_bytes())
        except plain_yaml.PlainYAMLError as error:
            raise InputError(f"{path.name}: not readable as YAML ({error})") from error
        if not isinstance(value, dict) or not _KEYS <= set(value) <= _KEYS | _MAY:
            found = sorted(value) if isinstance(value, dict) else type(value).__name__
            raise InputError(
                f"{path.name}: holds {found}, expected {sorted(_KEYS)} and perhaps {sorted(_MAY)}"
            )
        numbers = {}
        for key in ("verdicts", "below"):
            given = value.get(key, {})
            if not isinstance(given, dict) or not all(
                isinstance(word, str) and type(score) in (int, float)
                for word, score in given.items()
            ):
                raise InputError(
                    f"{path.name}: {key} is {given!r}, expected words with a number each "
                    "(YAML reads YES, NO, TRUE, FALSE and numbers as no text: put them in quotes)"
                )
            numbers[key] = {word: float(score) for word, score in given.items()}
        metric, image = str(value["metric"]), value.get("image", False)
        if metric in numbers["below"]:
            raise InputError(f"{path.name}: below names '{metric}', which is the metric")
        if not isinstance(image, bool):
            raise InputError(f"{path.name}: image is {image!r}, expected true or false")
        return cls(
            path.stem, metric, numbers["verdicts"], str(value["prompt"]), numbers["below"], image
        )

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
        return {
            "rubric": self.name,
            "prompt_sha256": digest,
            "verdicts": dict(self.verdicts),
            **({"below": dict(self.below)} if self.below else {}),
            **({"judge_sees_image": True} if self.image else {}),
        }

    def figures(self, score: float) -> dict[str, tuple[float, bool]]:
        """What a score adds to each figure, and whether higher is better there."""
        shares = {name: (float(score < limit), False) for name, limit in self.below.items()}
        return {self.metric: (score, True), **shares}

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
        pictures: Sequence[Picture | None],
        on_done: Callable[[int], None] = lambda count: None,
    ) -> list[float | None]:
        """One score per case, None where the verdict cannot be read.

        Args:
            cases: what the rubric's prompt shows.
            pictures: what each case is about; shown where the rubric says so and there is one.
        """
        import jinja2

        environment = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False)
        try:
            template = environment.from_string(rubric.prompt)
            prompts = [template.render(**case) for case in cases]
        except jinja2.TemplateError as error:
            raise InputError(f"judge prompt '{rubric.name}': {error}") from error

        def body(prompt: str, picture: Picture | None) -> Body:
            shown = picture if rubric.image else None
            content = prompt if shown is None else with_image(shown, prompt)
            return {
                "model": self.model,
                "messages": [{"role": "user", "content": content}],
                "temperature": 0,
            }

        bodies = (body(*case) for case in zip(prompts, pictures, strict=True))
        return post_chats(
            self.endpoint,
            bodies,
            Chat,
            lambda answer: rubric.score(answer.choices[0].said),
            on_done,
        )
