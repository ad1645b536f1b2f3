"""Scoring with one vLLM engine and the plugin: points are just other requests of one batch.

A catalogue entry fixes its layers, so each (vector, layers) of the points is one; strength and
positions are fields of a request. Answers are scored as part of the prompt.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from grains_vllm.vectors import SteeringVector
from offline.errors import InputError
from offline.scoring import Item, ItemScore, Point
from offline.vllm_import import import_llm, refusals

_REQUESTS = 2048  # handed to the engine at once, at least; so it is seldom short of work
_BLOCK = 32  # tokens; smaller blocks share more of a prompt, CPUs take multiples of 32
_TEXT = {"skip_tokenizer_init": True, "language_model_only": True}
_IMAGES = {"limit_mm_per_prompt": {"image": 1, "video": 0}}


class EngineScorer:
    """A Scorer (see offline.scoring) over an engine that starts with the first `score`."""

    def __init__(
        self,
        model: str,
        vectors: Mapping[str, SteeringVector],
        points: Sequence[Point | None],
        longest: int,
        engine_args: Mapping[str, Any] | None = None,
        images: bool = False,
    ) -> None:
        """Prepares the engine.

        Args:
            model: folder or hub id.
            points: every point that will be asked for; their layers decide the engine's bank.
            longest: most tokens of an item, prompt and answer together.
            engine_args: more arguments of `vllm.LLM`, such as dtype.
            images: whether any item has an image; an engine for text alone starts faster.
        """
        self.model = model
        self.vectors = vectors
        sets = dict.fromkeys((point.vector, point.layers) for point in points if point is not None)
        self.names = {key: f"v{number}" for number, key in enumerate(sets)}
        self.longest = longest
        self.engine_args = dict(engine_args or {})
        self.images = images
        self._llm: Any = None
        self._share, self._block = True, _BLOCK

    @property
    def bank_bytes(self) -> int:
        """Memory that the vectors take on the device."""
        layers = {layer for _, chosen in self.names for layer in chosen}
        hidden = next(iter(self.vectors.values())).model.hidden_size
        return 4 * hidden * len(layers) * len(self.names)

    def start(self) -> None:
        """Starts the engine, unless it runs."""
        if self._llm is not None:
            return
        LLM = import_llm("--backend vllm")

        with tempfile.TemporaryDirectory(prefix="grains-sweep-") as folder:
            arguments = {
                **(_IMAGES if self.images else _TEXT),
                "enforce_eager": True,
                "max_model_len": self.longest + 1,
                "block_size": _BLOCK,
                "additional_config": self._catalogue(Path(folder)),
                **self.engine_args,
            }
            try:
                llm = LLM(self.model, **arguments)
            except (ValueError, TypeError, RuntimeError) as error:
                raise InputError(f"--backend vllm: the engine does not start: {error}") from error
        # A vLLM that has not loaded the plugin would take the fields of requests and ignore them.
        if self.names and getattr(llm.llm_engine.input_processor, "grains_registry", None) is None:
            raise InputError("--backend vllm: vLLM has not loaded the plugin; see VLLM_PLUGINS")
        self._llm = llm
        config = self._llm.llm_engine.vllm_config
        # A preempted request could read, from the cache, answer tokens that it has not scored.
        self._block = config.cache_config.block_size
        blocks = -(-(self.longest + 1) // self._block)
        needed = config.scheduler_config.max_num_seqs * blocks
        self._share = config.cache_config.num_gpu_blocks >= needed

    def _catalogue(self, folder: Path) -> dict[str, Any]:
        for number, vector in enumerate(self.vectors.values()):
            vector.save(folder / f"{number}.safetensors")
        order = list(self.vectors)
        entries = {
            name: {
                "path": str(folder / f"{order.index(vector)}.safetensors"),
                "layers": list(layers),
                "strength": 0.0,
                "positions": "all",
            }
            for (vector, layers), name in self.names.items()
        }
        return {"grains": {"vectors": entries}} if entries else {}

    def score(
        self, items: Sequence[Item], points: Sequence[Point | None]
    ) -> Iterator[tuple[int, list[ItemScore]]]:
        """See offline.scoring.Scorer."""
        self.start()
        self._llm.reset_prefix_cache()
        size = max(1, -(-_REQUESTS // max(len(items), 1)))
        for start in range(0, len(points), size):
            chunk = range(start, min(start + size, len(points)))
            found: dict[tuple[int, int], ItemScore] = {}
            jobs = [(number, index) for number in chunk for index in range(len(items))]
            self._run(items, points, jobs, self._share, found)
            # The cache hands out keys and values, no scores: where it held some of an answer, the
            # item is scored again without it.
            missing = [job for job in jobs if job not in found]
            self._run(items, points, missing, False, found)
            for number in chunk:
                yield number, [found[number, index] for index in range(len(items))]

    def _run(
        self,
        items: Sequence[Item],
        points: Sequence[Point | None],
        jobs: Sequence[tuple[int, int]],
        share: bool,
        found: dict[tuple[int, int], ItemScore],
    ) -> None:
        """Scores (point, item) `jobs`, by indices, into `found`."""
        if not jobs:
            return
        prompts = [_prompt(items[index]) for _, index in jobs]
        params = [self._params(points[number], items[index], share) for number, index in jobs]
        try:
            outputs = self._llm.generate(prompts, params, use_tqdm=False)
        except refusals(self.images) as error:  # such as an item too long for --engine-args
            hint = f"; by transformers the longest item has {self.longest} tokens, image included"
            raise InputError(f"--backend vllm: {error}{hint if self.images else ''}") from error
        for job, output in zip(jobs, outputs, strict=True):
            _require_layout(items[job[1]], output)
            score = _score(items[job[1]], output)
            if score is not None:
                found[job] = score

    def _params(self, point: Point | None, item: Item, share: bool) -> Any:
        from vllm import SamplingParams

        steering: dict[str, Any] | None = None
        if point is not None:
            name = self.names.get((point.vector, point.layers))
            if name is None:
                raise InputError(f"{point} is not among the points that the engine was started for")
            steering = {
                "steering": name,
                "steering_strength": point.strength,
                "steering_positions": point.positions,
            }
            if point.needs_border:
                steering["steering_prompt_tokens"] = len(item.prompt_ids)
        return SamplingParams(
            max_tokens=1, temperature=0, detokenize=False, prompt_logprobs=0, flat_logprobs=True,
            # A cached block that ends with the prompt would hold the answer's first score.
            skip_reading_prefix_cache=not share or len(item.prompt_ids) % self._block == 0,
            extra_args=steering,
            skip_clone=True,  # made for one request, and nobody else has it
        )  # fmt: skip


def _prompt(item: Item) -> dict[str, Any]:
    """The item as vLLM takes it, which lays images out itself."""
    if item.image is None:
        return {"prompt_token_ids": [*item.prompt_ids, *item.response_ids]}
    return {
        "prompt_token_ids": [*item.image.plain_ids, *item.response_ids],
        "multi_modal_data": {"image": item.image.picture.image},
    }


def _require_layout(item: Item, output: Any) -> None:
    """Raises InputError if vLLM has made other tokens of an image than transformers has."""
    found, expected = tuple(output.prompt_token_ids), item.prompt_ids + item.response_ids
    if item.image is None or found == expected:
        return
    ours, theirs = f"{len(expected)}", f"{len(found)}"
    if ours == theirs:
        differ = (
            at for at, pair in enumerate(zip(found, expected, strict=True)) if len({*pair}) > 1
        )
        at = next(differ)
        ours, theirs = f"{ours} with {expected[at]} at {at}", f"{theirs} with {found[at]} at {at}"
    raise InputError(
        f"--backend vllm: vLLM makes {theirs} tokens of '{item.image.picture.name}', its prompt "
        f"and answer, transformers {ours}; expected the same ones"
    )


def _score(item: Item, output: Any) -> ItemScore | None:
    """The item's score, or None if the prefix cache has swallowed some of it."""
    first = len(item.prompt_ids) - 1  # the row of logits that scores the answer's first token
    if (output.num_cached_tokens or 0) > first:
        return None
    flat = output.prompt_logprobs
    return ItemScore(sum(flat.logprobs[first:]), all(rank == 1 for rank in flat.ranks[first:]))
