"""Scoring over HTTP: the log-likelihoods that a running `vllm serve` computes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from offline.answer_forms import Scored, scores_of
from offline.endpoint import Body, Endpoint
from offline.errors import InputError
from offline.scoring import Item, ItemScore, Point

# Also where the server has a default steering: this one is the model itself.
UNSTEERED: dict[str, Any] = {"steering": "none"}


class EndpointScorer:
    """A Scorer (see offline.scoring) over vLLM's /v1/completions.

    Attributes:
        aliases: the model alias that serves a vector at some layers, by (vector, layers). A
            request chooses strength and positions; layers are the catalogue entry's.
    """

    def __init__(
        self,
        url: str,
        aliases: Mapping[tuple[str, tuple[int, ...]], str],
        base_model: str,
        api_key: str | None = None,
        concurrency: int = 32,
        on_item: Callable[[int], None] = lambda count: None,
    ) -> None:
        """Prepares requests; nothing is sent yet.

        Args:
            on_item: told of every answer, with 1.
        """
        self.endpoint = Endpoint(url, api_key, concurrency)
        self.aliases = dict(aliases)
        self.base_model = base_model
        self.on_item = on_item

    def score(
        self, items: Sequence[Item], points: Sequence[Point | None]
    ) -> Iterator[tuple[int, list[ItemScore]]]:
        """See offline.scoring.Scorer.

        Raises:
            InputError: a point's vector is not served at its layers, or see `Endpoint.post_all`.
        """
        for point in points:
            self._model(point)
        for number, point in enumerate(points):
            model, border = self.base_model, False
            xargs: dict[str, Any] = UNSTEERED
            if point is not None:
                model, border = self._model(point), point.needs_border
                xargs = {
                    "steering_strength": point.strength,
                    "steering_positions": point.positions,
                }
            yield number, score_items(self.endpoint, items, model, xargs, border, self.on_item)

    def _model(self, point: Point | None) -> str:
        if point is None:
            return self.base_model
        alias = self.aliases.get((point.vector, tuple(point.layers)))
        if alias is None:
            raise InputError(
                f"no model alias serves vector '{point.vector}' at layers {list(point.layers)}; "
                f"there are {sorted(self.aliases)}"
            )
        return alias


def score_items(
    endpoint: Endpoint,
    items: Sequence[Item],
    model: str,
    xargs: Mapping[str, Any],
    border: bool,
    on_item: Callable[[int], None] = lambda count: None,
) -> list[ItemScore]:
    """One score per item.

    Args:
        model: the served model or an alias.
        xargs: vLLM's `vllm_xargs`, the steering fields.
        border: say where the answer begins. An answer is scored as part of the prompt; steering
            that tells prompt from answer needs this, and the server refuses it where all is
            steered alike.
    """
    bodies = [_body(item, model, xargs, border) for item in items]

    def read(number: int, answer: Scored) -> ItemScore:
        return _score(items[number], answer)

    return endpoint.post_all("/v1/completions", bodies, Scored, read, on_item)


def _body(item: Item, model: str, xargs: Mapping[str, Any], border: bool) -> Body:
    if item.image is not None:
        raise InputError(
            f"the prompt {item.image.text[:60]!r} has an image, and token ids sent to a server "
            "have none: over HTTP only pairs are scored with images"
        )
    asked = dict(xargs)
    if border:
        asked["steering_prompt_tokens"] = len(item.prompt_ids)
    return {
        "model": model,
        "prompt": [*item.prompt_ids, *item.response_ids],
        "max_tokens": 1,
        "temperature": 0,
        "prompt_logprobs": 0,  # vLLM: of every prompt token itself, and of no other candidate
        **({"vllm_xargs": asked} if asked else {}),
    }


def _score(item: Item, answer: Scored) -> ItemScore:
    ids = [*item.prompt_ids, *item.response_ids]
    scores = scores_of(ids, answer.choices[0].prompt_logprobs)[-len(item.response_ids) :]
    return ItemScore(
        logp=sum(score.logprob for score in scores),
        greedy=all(score.rank == 1 for score in scores),
    )
