"""Calibration, validation and test questions must differ; this finds those that do not."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grains_vllm.vectors import SteeringVector
from offline.errors import InputError
from offline.pairs import Messages, Pair, same_question
from offline.passport import example_prompts
from offline.pictures import Picture


@dataclass(frozen=True)
class Seen:
    """Fingerprints of the prompts that made or chose the vectors, each with its source.

    Attributes:
        exclude: leave questions out that were seen, instead of refusing them.
        silent: files whose passport does not say what they were made from.
    """

    prompts: Mapping[str, str]
    exclude: bool = False
    silent: Sequence[str] = ()

    def keep(
        self,
        name: str,
        prompts: Sequence[Sequence[str | Messages]],
        pictures: Sequence[Picture | None] | None = None,
        given: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """The indices of those items of which no prompt was seen.

        Args:
            name: the data's, for the message.
            prompts: per item, every text or chat in it that could be a prompt.
            pictures: per item, the image that it is about; the same words about another image are
                another question.
            given: per item, what a chat template gets beside messages.

        Raises:
            InputError: some were, and are not to be left out; or nothing is left.
        """
        pictures = pictures or [None] * len(prompts)
        given = given or [{}] * len(prompts)
        items = zip(prompts, pictures, given, strict=True)
        where = [self._source(*item) for item in items]
        kept = [index for index, source in enumerate(where) if source is None]
        found = [(index, source) for index, source in enumerate(where) if source is not None]
        if found and not self.exclude:
            index, source = found[0]
            raise InputError(
                f"{name}: {len(found)} of its {len(prompts)} questions made or chose the vector "
                f"(number {index + 1} is among the {source}); evaluate on others, or leave these "
                "out with --exclude-overlap"
            )
        if prompts and not kept:
            raise InputError(
                f"{name}: all of its {len(prompts)} questions made or chose the vector"
            )
        return kept

    def _source(
        self,
        prompts: Sequence[str | Messages],
        picture: Picture | None,
        given: Mapping[str, Any],
    ) -> str | None:
        for prompt in prompts:
            for form in same_question(prompt):
                source = self.prompts.get(_fingerprint(form, picture, given))
                if source is not None:
                    return source
        return None


def seen_by(vectors: Mapping[str, SteeringVector], exclude: bool = False) -> Seen:
    """Reads the passports: calibration examples, and what a sweep has chosen by."""
    prompts: dict[str, str] = {}
    silent = []
    for name, vector in vectors.items():
        calibration = example_prompts(vector.passport)
        if not calibration:
            silent.append(Path(name).name)
        validation: Any = vector.passport
        for key in ("sweep", "data", "validation", "prompt_fingerprints"):
            validation = validation.get(key) if isinstance(validation, Mapping) else None
        chosen_by = validation if isinstance(validation, list) else []
        sources = (("calibration examples", calibration), ("validation pairs", chosen_by))
        for source, fingerprints in sources:
            prompts.update(
                {value: f"{source} of {name}" for value in fingerprints if isinstance(value, str)}
            )
    return Seen(prompts, exclude, silent)


def _fingerprint(prompt: str | Messages, picture: Picture | None, given: Mapping[str, Any]) -> str:
    return Pair("", "", prompt, "", "", picture=picture, given=given).prompt_fingerprint
