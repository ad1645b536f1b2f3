"""`LLM` refuses what it cannot steer, by name, and goes on serving."""

import pytest

from tests.engine.jobs import REFUSED

pytestmark = pytest.mark.engine


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("unknown name", "steering: unknown vector 'z'; known vectors: a, b, c, d"),
        ("near miss", "steering: unknown vector 'A'"),
        ("not a number", "steering_strength: 'strong' is not a number"),
        ("not finite", "steering_strength: inf is not a number between"),
        ("reserved key", "grains: this key is reserved"),
        ("misspelt key", "steering_strenght: unknown key (did you mean 'steering_strength'?)"),
        ("too many vectors", "combines 4 vectors; this server allows 3"),
        ("layers that are not served", "steering_layers: [0] are not served for 'b'"),
        ("unknown positions", "'start' is not one of all, text, image, prompt, prompt:N"),
        ("more prompt than there is", "steering_prompt_tokens: 131, but the prompt has 130 tokens"),
        ("strength without a vector", "steering_strength was given without steering"),
        ("off with a strength", "steering is 'none', which leaves no use for steering_strength"),
    ],
)
def test_message(engine, label, message):
    assert message in engine("llama", "eager")[f"refused {label}"]["error"]


def test_every_refusal_is_tested(engine):
    assert all("error" in engine("llama", "eager")[f"refused {label}"] for label in REFUSED)
