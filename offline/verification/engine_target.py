"""An engine of one's own as a target: vLLM's `LLM` in this process."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grains_vllm.catalogue import Catalogue
from offline.errors import InputError
from offline.verification.probes import NONE, NotAnswered, Probe, Reading
from offline.vllm_import import import_llm, refusals

_LONGEST = 512
_TOP = 5  # candidates per generated token


class EngineTarget:
    """See probes.Target."""

    has_aliases = False

    def __init__(
        self, model: str, config: Path, catalogue: Catalogue, engine_args: Mapping[str, Any]
    ) -> None:
        """Starts the engine.

        Args:
            model: folder or hub id.
            config: the YAML, which `catalogue` was read from.
            engine_args: more arguments of `vllm.LLM`, such as dtype.

        Raises:
            InputError: vLLM is missing, has not loaded the plugin, or does not start.
        """
        LLM = import_llm("--model")
        arguments = {
            "skip_tokenizer_init": True,
            "language_model_only": True,
            "enforce_eager": True,
            "max_model_len": min(_LONGEST, _trained_length(model)),
            "additional_config": {"grains": {"config": str(config)}},
            **engine_args,
        }
        try:
            self._llm = LLM(model, **arguments)
        except (ValueError, TypeError, RuntimeError) as error:
            raise InputError(f"--model: the engine does not start: {error}") from error
        # A vLLM that has not loaded the plugin would take the fields of requests and ignore them.
        if getattr(self._llm.llm_engine.input_processor, "grains_registry", None) is None:
            raise InputError("--model: vLLM has not loaded the plugin; see VLLM_PLUGINS")
        self.name = Path(model).resolve().name if Path(model).is_dir() else model
        self.vectors: Sequence[str] = sorted(catalogue.vectors)
        settings = self._llm.llm_engine.vllm_config.model_config
        self.longest: int = settings.max_model_len
        self.dtype = str(settings.dtype).removeprefix("torch.")
        text = settings.hf_text_config
        self._start = _first_id(getattr(text, "bos_token_id", None))

    def ask(self, probes: Sequence[Probe], together: bool = False) -> list[Reading]:
        """See probes.Target."""
        groups = [list(probes)] if together else [[probe] for probe in probes]
        return [reading for group in groups for reading in self._ask(group)]

    def _ask(self, probes: list[Probe]) -> list[Reading]:
        from vllm import SamplingParams

        prompts = [
            {
                "prompt_token_ids": list(probe.tokens),
                **({"cache_salt": probe.salt} if probe.salt else {}),
            }
            for probe in probes
        ]
        params = [
            SamplingParams(
                max_tokens=probe.answer, temperature=0, ignore_eos=True, logprobs=_TOP,
                detokenize=False, prompt_logprobs=0 if probe.scored else None,
                extra_args=dict(probe.fields) or None,
            )
            for probe in probes
        ]  # fmt: skip
        try:
            outputs = self._llm.generate(prompts, params, use_tqdm=False)
        except refusals() as error:
            raise NotAnswered(str(error)) from error
        return [_reading(output) for output in outputs]

    def sample(self, count: int, length: int, seed: int) -> list[tuple[int, ...]]:
        """See probes.Target."""
        from vllm import SamplingParams

        params = SamplingParams(
            n=count, max_tokens=length, temperature=1, top_k=50, seed=seed, ignore_eos=True,
            detokenize=False, extra_args=dict(NONE),
        )  # fmt: skip
        output = self._llm.generate(
            [{"prompt_token_ids": [self._start]}], [params], use_tqdm=False
        )[0]
        return [tuple(answer.token_ids) for answer in output.outputs]


def _reading(output: Any) -> Reading:
    steps = output.outputs[0]
    prompt = [
        float(entry[token].logprob)
        for token, entry in zip(
            output.prompt_token_ids[1:], (output.prompt_logprobs or [None])[1:], strict=False
        )
    ]
    answer = [
        (token, {key: float(found.logprob) for key, found in top.items()})
        for token, top in zip(steps.token_ids, steps.logprobs, strict=True)
    ]
    receipt = getattr(output, "grains", None)
    return Reading(tuple(prompt), tuple(answer), output.num_cached_tokens, receipt)


def _first_id(value: Any) -> int:
    """A special token's id; some configs list several, others have none."""
    found = value[0] if isinstance(value, list) and value else value
    return found if isinstance(found, int) else 0


def _trained_length(model: str) -> int:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model).get_text_config()
    except (OSError, ValueError) as error:
        raise InputError(f"--model: '{model}' cannot be loaded ({error})") from error
    found = getattr(config, "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else _LONGEST
