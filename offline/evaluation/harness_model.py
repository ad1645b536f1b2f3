"""lm-eval's `local-completions` for one setting: its requests, and what steering adds to them."""

import copy
from typing import Any

from lm_eval.models.openai_completions import LocalCompletionsAPI
from tqdm import tqdm

from offline.answer_forms import Completion, Echoed
from offline.errors import InputError
from offline.evaluation.target import Setting, Target, writes_bos

_PATH = "/v1/completions"


class SettingLM(LocalCompletionsAPI):
    """The model alias, plus the request fields that an alias cannot say.

    Those are `steering: none` for the base, since a server may steer by default, and where an
    answer begins for vectors that tell prompt from answer. lm-eval cuts prompts that are too long
    on the left; here they are refused, because the score would be another task's. What is sent and
    scored is lm-eval's; sending and reading is the endpoint's, as everywhere.
    """

    def __init__(self, target: Target, setting: Setting, max_tokens: int, chat: bool) -> None:
        super().__init__(
            model=setting.model,
            base_url=f"{target.endpoint.url}{_PATH}",
            tokenizer_backend="huggingface",
            tokenizer=target.tokenizer_source,
            # One at a time goes another way through lm-eval, which cannot say where answers begin.
            num_concurrent=max(2, target.endpoint.concurrency),
            max_length=target.max_length,
            max_gen_toks=max_tokens,
            # A chat template writes it itself.
            add_bos_token=not chat and writes_bos(target.tokenizer),
        )
        self._endpoint, self._setting = target.endpoint, setting

    async def get_batched_requests(
        self,
        requests: list[list[int]],
        cache_keys: list[Any],
        *,
        generate: bool = True,
        ctxlens: list[int] | None = None,
        gen_kwargs: dict[str, Any] | None = None,
        **_: Any,
    ) -> list[list[Any]]:
        borders = ctxlens or [0] * len(requests)
        bodies = [
            self._create_payload(
                [tokens],
                generate=generate,
                gen_kwargs=copy.deepcopy(gen_kwargs),
                seed=self._seed,
                border=border if border and self._setting.border else None,
            )
            for tokens, border in zip(requests, borders, strict=True)
        ]

        def scored(number: int, answer: Echoed) -> list[Any]:
            answer.require(len(requests[number]) + 1)
            return self.parse_logprobs(answer.model_dump(), ctxlens=[borders[number]])

        with tqdm(total=len(bodies), desc="Requesting API") as bar:
            if generate:
                return await self._endpoint.exchange(
                    "POST", _PATH, bodies, Completion,
                    lambda _, answer: [answer.choices[0].said], bar.update,
                )  # fmt: skip
            return await self._endpoint.exchange("POST", _PATH, bodies, Echoed, scored, bar.update)

    def _create_payload(self, *args: Any, border: int | None = None, **kwargs: Any) -> Any:
        payload = super()._create_payload(*args, **kwargs)
        xargs = dict(self._setting.xargs)
        if border is not None:
            xargs["steering_prompt_tokens"] = border
        return {**payload, **({"vllm_xargs": xargs} if xargs else {})}

    def batch_loglikelihood_requests(self, chunks: Any) -> Any:
        chunks = list(chunks)
        for chunk in chunks:
            for _, context, answer in chunk:
                self._require_fit(len(context) + len(answer), 1)
        return super().batch_loglikelihood_requests(chunks)

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
        for request in requests:
            text, asked = request.args
            longest = asked.get("max_gen_toks", self._max_gen_toks)
            self._require_fit(len(self.tok_encode(text)), longest)
        return super().generate_until(requests, disable_tqdm)

    def _require_fit(self, given: int, generated: int) -> None:
        if given + generated > self.max_length + 1:
            raise InputError(
                f"a request has {given} tokens and asks for {generated} more, but the server's "
                f"max_model_len is {self.max_length + 1}"
            )
