"""Greedy answers of every setting to the prompts of a data set, each asked for once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from offline.answer_forms import CountedChat, CountedCompletion
from offline.endpoint import Body
from offline.errors import InputError
from offline.evaluation.chats import post_chats, prompt_body, steering
from offline.evaluation.endpoint_tasks import Progress
from offline.evaluation.target import Setting, Target
from offline.pairs import Pair, text_of
from offline.prompts import tokenise


@dataclass(frozen=True)
class Prompt:
    """What is answered.

    Attributes:
        pair: its prompt is asked.
        facts: what a judge's prompt may show beside question and answers.
    """

    pair: Pair
    facts: Mapping[str, Any]

    @property
    def question(self) -> str:
        """The prompt as people read it."""
        if isinstance(self.pair.prompt, str):
            start, end = self.pair.question or (0, len(self.pair.prompt))
            return self.pair.prompt[start:end].strip()
        if len(self.pair.prompt) == 1:
            return text_of(self.pair.prompt[0])
        return "\n".join(f"{turn['role']}: {text_of(turn)}" for turn in self.pair.prompt)

    @property
    def stop(self) -> list[str]:
        """Texts at which an answer ends: in question-and-answer form, the next question."""
        return ["\nQ:"] if self.pair.question is not None else []


@dataclass(frozen=True)
class Answer:
    """A text, its number of tokens, and whether it was cut off for its length."""

    text: str
    tokens: int
    cut: bool


class Answers:
    """The answers of every setting to the same prompts; tasks that share them ask once."""

    def __init__(self, prompts: Sequence[Prompt], max_tokens: int, progress: Progress) -> None:
        self.prompts = prompts
        self.progress = progress
        self._max_tokens = max_tokens
        self._found: dict[str, list[Answer]] = {}

    def of(self, target: Target, setting: Setting) -> list[Answer]:
        """One answer per prompt, in their order, at temperature 0.

        Raises:
            InputError: a prompt leaves no room for an answer, or see `Endpoint.post_all`.
        """
        if setting.name not in self._found:
            shown = [prompt for prompt in self.prompts if prompt.pair.picture is not None]
            bodies = [
                self._body(target, setting, prompt)
                for prompt in self.prompts
                if prompt.pair.picture is None
            ]
            with self.progress(len(self.prompts)) as advance:
                texts = iter(
                    target.endpoint.post_all(
                        "/v1/completions", bodies, CountedCompletion,
                        lambda _, answer: _answer(answer), advance,
                    )
                )  # fmt: skip
                asked = (self._chat(setting, prompt) for prompt in shown)
                chats = iter(post_chats(target.endpoint, asked, CountedChat, _answer, advance))
            self._found[setting.name] = [
                next(texts if prompt.pair.picture is None else chats) for prompt in self.prompts
            ]
        return self._found[setting.name]

    def _chat(self, setting: Setting, prompt: Prompt) -> Body:
        """A prompt with an image; the server knows how long it is, and refuses one too long."""
        return {
            **prompt_body(prompt.pair),
            "max_tokens": self._max_tokens,
            "temperature": 0,
            **steering(setting),
        }

    def _body(self, target: Target, setting: Setting, prompt: Prompt) -> Body:
        ids = tokenise(prompt.pair, target.tokenizer, target.processor).asked_ids
        if len(ids) + self._max_tokens > target.max_length:
            raise InputError(
                f"{prompt.pair.where}: {len(ids)} tokens and --max-tokens {self._max_tokens} are "
                f"more than the server's max_model_len of {target.max_length}"
            )
        return {
            "prompt": ids,
            "max_tokens": self._max_tokens,
            "temperature": 0,
            **({"stop": prompt.stop} if prompt.stop else {}),
            **steering(setting),
        }


def _answer(found: CountedCompletion | CountedChat) -> Answer:
    choice = found.choices[0]
    return Answer(choice.said, found.usage.completion_tokens, choice.finish_reason == "length")
