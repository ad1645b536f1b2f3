"""Which KV blocks two requests may share, with vLLM's own hashing of real requests."""

import pytest
from vllm import SamplingParams
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import init_none_hash
from vllm.v1.request import Request

from grains_vllm import plugin
from grains_vllm.marker import build
from grains_vllm.selection import RESERVED, select

BLOCK, PROMPT = 4, 10


@pytest.fixture(autouse=True)
def wrapped():
    init_none_hash(sha256)
    plugin.register()
    plugin._wrap_engine()
    yield
    plugin.unregister()


@pytest.fixture
def hashes(catalogue):
    """hashes(extra_args) -> the block hashes of 24 tokens of which 10 are the prompt."""
    known = catalogue(max_vectors_per_request=2)

    def compute(extra_args=None, prompt=PROMPT, total=24, images=()):
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher

        features = [
            MultiModalFeatureSpec(None, "image", name, PlaceholderRange(offset, length))
            for name, offset, length in images
        ]
        held = [("image", offset, offset + length) for _, offset, length in images]
        marker = build(select(extra_args, known), prompt, held)
        tokens = list(range(total))
        request = Request(
            "r",
            tokens[:prompt],
            SamplingParams(extra_args={RESERVED: marker} if marker else None),
            None,
            mm_features=features,
            block_hasher=get_request_block_hasher(BLOCK, sha256),
        )
        request.append_output_token_ids(tokens[prompt:])
        return list(request.block_hashes)

    return compute


def shared(one, other):
    """How many leading blocks two requests have in common."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))


@pytest.mark.parametrize(
    ("positions", "blocks"),
    [
        # The prompt ends within the third block (tokens 8 to 11).
        ("all", 0),
        ("prompt", 0),
        ("generation", 2),
        ("prompt:1+generation", 2),
        ("prompt:2", 2),
        ("prompt:3", 1),
    ],
)
def test_blocks_before_the_first_steered_token_are_everybodys(hashes, positions, blocks):
    steered = hashes({"steering": "truthful", "steering_positions": positions})
    assert shared(hashes(), steered) == blocks


def test_a_window_that_goes_on_beyond_a_block_is_not_told_from_an_open_one(hashes):
    everything = hashes({"steering": "truthful"})
    prompt = hashes({"steering": "truthful", "steering_positions": "prompt"})
    window = hashes({"steering": "truthful", "steering_positions": "prompt+generation:9"})
    assert len(everything) == 6
    assert shared(everything, prompt) == 2  # the third block holds generated tokens
    assert shared(everything, window) == 4  # tokens 0 to 18 alike, block five ends at 20
    assert shared(prompt, window) == 2


def test_the_next_turn_of_a_chat_does_not_take_generated_tokens_for_prompt(hashes):
    asked = {"steering": "truthful", "steering_positions": "generation"}
    assert shared(hashes(asked), hashes(asked, prompt=20)) == 2
    assert shared(hashes(), hashes(asked, prompt=20)) == 5
    everything = {"steering": "truthful"}
    assert shared(hashes(everything), hashes(everything, prompt=20)) == 6


def test_what_an_image_is_and_what_steers_its_tokens_both_count(hashes):
    # Blocks of 4; the image lies in the second and third, the prompt ends in the fifth.
    cat, dog = ({"prompt": 18, "images": [(name, 5, 6)]} for name in ("cat", "dog"))
    everything, text, image = (
        {"steering": "truthful", "steering_positions": word} for word in ("all", "text", "image")
    )
    assert shared(hashes(**cat), hashes(**dog)) == 1
    # Before the image, `text` is `all`; `image` is nothing.
    assert shared(hashes(everything, **cat), hashes(text, **cat)) == 1
    assert shared(hashes(**cat), hashes(image, **cat)) == 1
    assert shared(hashes(text, **cat), hashes(text, **dog)) == 1
    assert shared(hashes(text, **cat), hashes(text, **cat)) == 6
    # Without images, `text` is `all` and `image` nothing to the end.
    assert shared(hashes(everything), hashes(text)) == 6
    assert shared(hashes(), hashes(image)) == 6


def test_an_image_that_a_block_cuts_counts_as_a_whole(hashes):
    """Its tokens may see each other, so what is shifted behind the cut is seen before it."""
    prompt = {"prompt": 18, "images": [("cat", 5, 6)]}
    window = {"steering": "truthful", "steering_positions": "prompt:8"}  # from 10, in the image
    assert shared(hashes(**prompt), hashes(window, **prompt)) == 1
    assert shared(hashes(prompt=18), hashes(window, prompt=18)) == 2
    behind = {"steering": "truthful", "steering_positions": "prompt:7"}
    assert shared(hashes(**prompt), hashes(behind, **prompt)) == 2


def test_strength_vector_and_layers_tell_blocks_apart_and_order_does_not(hashes):
    different = [
        {"steering": "truthful"},
        {"steering": "truthful=0.6"},
        {"steering": "truthful=-0.5"},
        {"steering": "polite", "steering_positions": "all"},
        {"steering": "truthful", "steering_layers": [1]},
        {"steering": "truthful,polite"},
        {"steering": "truthful,polite=1"},
        None,
    ]
    assert len({tuple(hashes(asked)) for asked in different}) == len(different)
    assert hashes({"steering": "truthful,polite"}) == hashes({"steering": "polite,truthful"})
    assert hashes({"steering": "truthful,polite=0"}) == hashes({"steering": "truthful"})
    assert hashes({"steering": "truthful=0"}) == hashes() == hashes({"steering": "none"})
