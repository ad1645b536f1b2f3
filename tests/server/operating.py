"""A server whose operator has opted in to changes, and what tests ask of it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest
import torch
from transformers import AutoConfig

from grains_vllm.vectors import ModelFingerprint, SteeringVector
from tests.server.serving import MODEL, Server, serve

KEY, ADMIN = "secret", "more secret"
WORDS = "system : honest quiet river agreeable . record : mira color red . user : claim : mira "
PROMPT = WORDS * 4  # several blocks of the prefix cache
MOST = 160  # tokens of a long answer


def save(path: Path, seed: int) -> str:
    """Writes a random vector of the served model; returns its digest."""
    config = AutoConfig.from_pretrained(MODEL)
    layers, hidden = config.num_hidden_layers, config.hidden_size
    directions = torch.randn(layers, hidden, generator=torch.Generator().manual_seed(seed))
    vector = SteeringVector(
        directions / directions.norm(dim=1, keepdim=True),
        torch.full((layers,), 5.0),
        ModelFingerprint.of(config),
    )
    vector.save(path)
    return vector.digest


@contextmanager
def started(folder: Path, *flags: str) -> Iterator[Server]:
    """A server with the opt-in, both keys, and a folder that vectors may come from."""
    (folder / "allowed").mkdir()
    for seed, name in enumerate(("truthful", "polite")):
        save(folder / f"{name}.safetensors", seed)
    save(folder / "allowed" / "same.safetensors", 0)
    save(folder / "allowed" / "other.safetensors", 5)
    catalogue = folder / "steering.yaml"
    catalogue.write_text(
        "vectors:\n"
        "  truthful: {path: truthful.safetensors, strength: 0.5}\n"
        "  polite: {path: polite.safetensors, strength: 0.5}\n"
        "admin: {folder: allowed, max_vectors: 8, max_bytes: 100000}\n"
    )
    with operated(MODEL, catalogue, *flags) as server:
        yield server


@contextmanager
def operated(model: Path, catalogue: Path, *flags: str) -> Iterator[Server]:
    """A server whose operator has allowed changes and set both keys."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("VLLM_PLUGINS", "grains")
        environment.setenv("GRAINS_ADMIN_KEY", ADMIN)
        flags = ("--api-key", KEY, "--enable-prompt-tokens-details", *flags)
        with serve(model, catalogue, *flags) as server:
            server.client = openai.OpenAI(
                base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=120
            )
            yield server


def asking(server, key=KEY, admin=ADMIN):
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    headers |= {"X-Grains-Admin-Key": admin} if admin else {}

    def ask(method, path, /, **body):
        # A connection of its own, so that any of several API servers may answer.
        return httpx.request(
            method, f"{server.url}/v1/grains/{path}", json=body or None, headers=headers, timeout=60
        )

    return ask


def complete(server, model="tiny", tokens=8, prompt=PROMPT, **more):
    """The log-probabilities of an answer's tokens, and how many prompt tokens were cached."""
    answer = server.client.completions.create(
        model=model,
        prompt=prompt,
        max_tokens=tokens,
        temperature=0,
        logprobs=0,
        extra_body={"ignore_eos": True, **more},
    )
    logprobs = answer.choices[0].logprobs
    return list(zip(logprobs.tokens, logprobs.token_logprobs, strict=True)), (
        answer.usage.prompt_tokens_details.cached_tokens
    )


def same(one, other):
    """Equal tokens, and log-probabilities up to what another batch or chunk rounds."""
    return [token for token, _ in one] == [token for token, _ in other] and [
        value for _, value in one
    ] == pytest.approx([value for _, value in other], abs=1e-4)


def models(server):
    return {model.id for model in server.client.models.list().data}
