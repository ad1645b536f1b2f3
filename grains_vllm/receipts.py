"""Receipts: what steering a request was given, and how many of its tokens that reached.

The front end of the engine keeps them, beside vLLM's own state of each request: there the prompt's
length and the number of generated tokens are known, and every way into an engine passes there.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from functools import wraps
from operator import itemgetter
from typing import Any

from grains_vllm import metrics
from grains_vllm.marker import Marker, TermMarker, marker_of

DIGEST_DIGITS = 12
# Receipts of the HTTP request that is being answered, if somebody asked for them; tasks that vLLM
# starts for a request inherit the list.
collected: ContextVar["list[Receipt] | None"] = ContextVar("grains_receipts", default=None)
# Whether that HTTP request is a beam search.
in_beam_search: ContextVar[bool] = ContextVar("grains_in_beam_search", default=False)

_COUNTS = ("prompt_tokens", "generated_tokens")


class Receipt:
    """One request's steering; with n > 1 its answers share one receipt, as they share one usage.

    Args:
        marker: what the front end decided (`extra_args["grains"]`).
        prompt_tokens: the prompt's length as usage counts it. The positions in the marker may have
            another border (`steering_prompt_tokens`); what is prompt and what was generated does
            not change for that.
        answers: how many sequences the request generates.
    """

    def __init__(self, marker: Marker, prompt_tokens: int, answers: int = 1) -> None:
        self._marker = marker
        self._prompt_tokens = prompt_tokens
        self._answers = answers
        self._running: dict[str, Callable[[], int]] = {}
        self._ended: list[int] = []
        # The steps of a beam search are requests of their own.
        self.is_step = in_beam_search.get()

    def begin(self, sequence: str, generated: Callable[[], int]) -> None:
        """Adds an answer; `generated()` says how many tokens it has so far."""
        self._running[sequence] = generated

    def end(self, sequence: str) -> bool:
        """Keeps an answer's length; returns whether the whole request has ended."""
        self._ended.append(self._running.pop(sequence)())
        return self.finished

    @property
    def finished(self) -> bool:
        return len(self._ended) == self._answers

    def to_json(self) -> dict[str, Any]:
        """The receipt as of now, in the form that clients see (docs/receipts.md)."""
        terms = self._marker["terms"]
        lengths = self._ended + [generated() for generated in self._running.values()]
        facts = {
            "steered": bool(terms),
            "source": self._marker["source"],
            "vectors": [
                {
                    "name": term["name"],
                    "digest": term["vector"][:DIGEST_DIGITS],
                    "strength": term["strength"],
                    "positions": term["positions"],
                    "layers": list(term["layers"]),
                    **self._counts([term], lengths),
                }
                for term in terms
            ],
            **self._counts(terms, lengths),
        }
        if "fraction" in self._marker:
            facts["fraction"] = self._marker["fraction"]
        if "layer_output" in self._marker:
            facts["layer_output"] = self._marker["layer_output"]
        return facts

    def _counts(self, terms: Iterable[TermMarker], lengths: list[int]) -> dict[str, int]:
        border = self._prompt_tokens
        # An answer's last token is never fed back to the layers, so nothing was shifted for it.
        fed_back = (max(0, length - 1) for length in lengths)
        return {
            # Whoever has left before the first token may never have been computed.
            "prompt_tokens": steered(terms, 0, border) if any(lengths) else 0,
            "generated_tokens": sum(steered(terms, border, border + fed) for fed in fed_back),
        }


def steered(terms: Iterable[TermMarker], start: int, end: int) -> int:
    """How many of the positions start <= p < end at least one term steers."""
    count, reached = 0, start
    for begin, until in sorted(
        (span for term in terms for span in term["spans"]), key=itemgetter(0)
    ):
        first = max(reached, begin)
        last = end if until is None else min(end, until)
        if last > first:
            count += last - first
            reached = last
    return count


def combined(receipts: Sequence[Receipt]) -> dict[str, Any]:
    """One receipt for all requests of one response, summed as usage is.

    Prompts that were not decided alike (a canary throws its dice for each) are told apart under
    `parts`. A beam search feeds every prompt again at each step, so that sums would say nothing of
    the answer: its counts are null.
    """
    first, *others = parts = [receipt.to_json() for receipt in receipts]
    if not others:
        return first
    decisions: dict[str, list[dict[str, Any]]] = {}
    for part in parts:
        decisions.setdefault(json.dumps(_decided(part)), []).append(part)
    whole = _sum(parts)
    if len(decisions) > 1:
        whole["parts"] = [{**_sum(alike), "prompts": len(alike)} for alike in decisions.values()]
    if any(receipt.is_step for receipt in receipts):
        for facts in (whole, *whole["vectors"]):
            facts.update(dict.fromkeys(_COUNTS))
    return whole


def _sum(parts: list[dict[str, Any]]) -> dict[str, Any]:
    vectors: list[dict[str, Any]] = []
    for vector in (vector for part in parts for vector in part["vectors"]):
        same = next((known for known in vectors if _kind(known) == _kind(vector)), None)
        if same is None:
            vectors.append(dict(vector))
        else:
            same.update({name: same[name] + vector[name] for name in _COUNTS})
    sources = {part["source"] for part in parts}
    return {
        **parts[0],
        "steered": bool(vectors),
        "source": sources.pop() if len(sources) == 1 else "mixed",
        "vectors": vectors,
        **{name: sum(part[name] for part in parts) for name in _COUNTS},
    }


def _decided(part: Mapping[str, Any]) -> dict[str, Any]:
    return {**_kind(part), "vectors": [_kind(vector) for vector in part["vectors"]]}


def _kind(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in facts.items() if name not in _COUNTS}


def _add_request(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def add_request(
        self: Any, request: Any, prompt: Any, parent_req: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        if (marker := marker_of(request)) is None:
            return original(self, request, prompt, parent_req, *args, **kwargs)
        known = request.request_id in self.request_states  # streamed input that goes on
        added = original(self, request, prompt, parent_req, *args, **kwargs)
        if not known:
            _begin(self, request, marker, parent_req)
        return added

    return add_request


def _begin(processor: Any, request: Any, marker: Marker, parent: Any) -> None:
    state = processor.request_states[request.request_id]
    owner = state if parent is None else parent
    receipt: Receipt | None = getattr(owner, "grains_receipt", None)
    if receipt is None:
        receipt = Receipt(marker, state.prompt_len, 1 if parent is None else parent.n)
        owner.grains_receipt = receipt
        metrics.admitted(marker)
        if (receipts := collected.get()) is not None:
            receipts.append(receipt)
    state.grains_receipt = receipt
    receipt.begin(request.request_id, state.detokenizer.num_output_tokens)
    vars(processor).setdefault("grains_receipts", {})[request.request_id] = receipt


def _end(processor: Any, request_ids: Callable[[], Iterable[str]]) -> None:
    receipts: dict[str, Receipt] = vars(processor).get("grains_receipts", {})
    for request_id in request_ids() if receipts else ():
        if (receipt := receipts.pop(request_id, None)) is not None and receipt.end(request_id):
            metrics.finished(receipt)


def _finish_request(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def finish_request(self: Any, req_state: Any) -> Any:
        finished = original(self, req_state)
        _end(self, lambda: [req_state.request_id])
        return finished

    return finish_request


def _abort_requests(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def abort_requests(self: Any, *args: Any, **kwargs: Any) -> list[str]:
        # vLLM's method calls itself for the children of a request, which ends them twice here.
        aborted: list[str] = original(self, *args, **kwargs)
        _end(self, lambda: aborted)
        return aborted

    return abort_requests


def _new_request_output(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def new_request_output(
        self: Any, external_req_id: str, outputs: Any, finished: bool, *args: Any, **kwargs: Any
    ) -> Any:
        output = original(self, external_req_id, outputs, finished, *args, **kwargs)
        if finished and (receipt := getattr(self, "grains_receipt", None)) is not None:
            output.grains = receipt.to_json()
        return output

    return new_request_output


def _add_output(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def add(self: Any, next_output: Any, *args: Any, **kwargs: Any) -> Any:
        added = original(self, next_output, *args, **kwargs)
        # A slow reader gets several outputs merged into the first one.
        if (receipt := getattr(next_output, "grains", None)) is not None:
            self.grains = receipt
        return added

    return add


OUTPUT_PROCESSOR = {
    "add_request": _add_request,
    "_finish_request": _finish_request,
    "abort_requests": _abort_requests,
}
REQUEST_STATE = {"_new_request_output": _new_request_output}
# `RequestOutput.grains` is None where a request is not finished, or nothing was decided for it.
REQUEST_OUTPUT = {"grains": lambda _: None, "add": _add_output}
