"""Laws that hold for whatever a client, a scheduler or chance comes up with."""

import dataclasses
import json
import math
from collections import Counter
from contextlib import suppress

import numpy as np
import pytest
import safetensors.torch
import yaml
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from grains_vllm.catalogue import Steering, Term
from grains_vllm.checks import MAX_STRENGTH
from grains_vllm.config import read_catalogue
from grains_vllm.errors import GrainsConfigError
from grains_vllm.marker import build
from grains_vllm.positions import Positions, PositionsError
from grains_vllm.prefix_keys import block_key
from grains_vllm.receipts import Receipt
from grains_vllm.selection import FIELDS, Choice, SelectionError, SteeringDisabled, select
from grains_vllm.vectors import LAYER_CONVENTION, ArtifactError, SteeringVector
from tests.tally import print_tally
from tests.tiny import random_vector

TRIED = Counter()


def law(examples):
    """Tries so many inputs; a slow machine is no counterexample."""
    return settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )


@pytest.fixture(scope="module", autouse=True)
def tally(request):
    yield
    print_tally(request, TRIED)


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    """A folder with a.safetensors, b.safetensors and c.safetensors."""
    folder = tmp_path_factory.mktemp("properties")
    for seed, name in enumerate("abc"):
        random_vector("llama", seed).save(folder / f"{name}.safetensors")
    return folder


@pytest.fixture(scope="module")
def catalogues(artifacts):
    """Every kind of server: without a default, with one, with a canary, with both."""
    vectors = {
        "a": {"path": "a.safetensors", "strength": 0.5},
        "b": {"path": "b.safetensors", "strength": 0.2, "positions": "prompt:7", "layers": [1, 2]},
        "c": {"path": "c.safetensors", "strength": -3, "scale": "absolute", "layers": [0]},
        "twin of a": {"path": "a.safetensors", "strength": 1, "positions": "generation"},
    }
    vectors["twin-of-a"] = vectors.pop("twin of a")
    found = []
    for more in (
        {},
        {"default": "b,a=0.3", "max_vectors_per_request": 3},
        {"canary": {"name": "a", "fraction": 0.5}},
        {"default": "c", "canary": {"name": "b=0", "fraction": 1}, "max_vectors_per_request": 1},
    ):
        path = artifacts / "steering.yaml"
        path.write_text(yaml.safe_dump({"vectors": vectors, **more}))
        found.append(read_catalogue({"config": str(path)}))
    return found


# --- what a prompt holds -------------------------------------------------------------------------

# Runs of tokens, (modality or "" for text, length), in order.
_HELD = st.lists(
    st.tuples(st.sampled_from(["", "image", "image", "video"]), st.integers(1, 12)), max_size=6
).map(
    lambda runs: [
        (
            modality,
            sum(length for _, length in runs[:number]),
            sum(n for _, n in runs[: number + 1]),
        )
        for number, (modality, _) in enumerate(runs)
        if modality
    ]
)

# --- what requests may say -----------------------------------------------------------------------

_KNOWN = st.sampled_from(["a", "b", "c", "twin-of-a"])
_NAMES = st.one_of(_KNOWN, st.sampled_from(["A", "none", "nobody", "", " a "]))
_NEARLY_RIGHT = st.sampled_from([0.5, -2, 1e6, 1e-30, 1e-46, -1e-50, 0, -0.0])
_NUMBERS = st.one_of(
    st.integers(),
    st.floats(),
    st.sampled_from([10**400, -(10**400), 1e6, 1e-46, -0.0, 2**31, MAX_STRENGTH + 1]),
)
_SPECS = st.lists(
    st.one_of(_NAMES, st.builds("{}={}".format, _NAMES, st.one_of(_NUMBERS.map(repr), st.text()))),
    min_size=1,
    max_size=4,
).map(",".join)
_PLACES = st.one_of(
    st.sampled_from(["all", "prompt", "generation", "prompt+generation", "generation:1+prompt"]),
    st.sampled_from(["text", "image", "text+generation", "image:1"]),
    st.builds("prompt:{}".format, st.integers(-1, 10**10)),
    st.builds("generation:{}+prompt:{}".format, st.integers(), st.integers(0, 50)),
    st.lists(st.sampled_from(["prompt", "generation", "prompt:3"]), max_size=3).map("+".join),
    st.text(),
)
_ANYTHING = st.recursive(
    st.one_of(st.none(), st.booleans(), _NUMBERS, st.text(), st.binary(), _SPECS, _PLACES),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(), inner)),
    max_leaves=5,
)
_LAYERS = st.one_of(st.integers(-1, 4), st.lists(st.integers(-1, 4), max_size=4), _ANYTHING)
_FITTING = {
    "steering": _SPECS,
    "steering_strength": _NUMBERS,
    "steering_positions": _PLACES,
    "steering_layers": _LAYERS,
    "steering_prompt_tokens": _NUMBERS,
    "steering_canary_key": st.text(max_size=600),
}
assert set(_FITTING) == set(FIELDS)
_STRANGE_KEYS = st.one_of(
    st.text(),
    st.sampled_from(["grains", "grains_x", "Steering", "strength", "steering_", "positions"]),
    st.sampled_from(FIELDS).map(lambda name: name[:-1]),
    st.integers(),
    st.none(),
)
_EXTRA_ARGS = st.one_of(
    st.none(),
    st.fixed_dictionaries(
        {"steering": _KNOWN},
        optional={
            "steering_strength": _NEARLY_RIGHT,
            "steering_positions": st.sampled_from(["all", "prompt:3+generation", "generation:1"]),
            "steering_layers": st.sampled_from([1, [2, 2, 1], [1, 3]]),
            "steering_prompt_tokens": st.integers(1, 9),
        },
    ),
    st.fixed_dictionaries({}, optional=_FITTING),
    st.fixed_dictionaries({}, optional={name: _ANYTHING for name in FIELDS}),
    st.builds(
        lambda asked, strange: {**asked, **strange},
        st.fixed_dictionaries({}, optional=_FITTING),
        st.dictionaries(_STRANGE_KEYS, _ANYTHING, max_size=2),
    ),
)


@law(2000)
@given(
    asked=_EXTRA_ARGS,
    which=st.integers(0, 3),
    enabled=st.booleans(),
    border=st.integers(1, 99),
    held=_HELD,
)
def test_a_request_is_understood_or_refused_by_name(
    catalogues, asked, which, enabled, border, held
):
    TRIED["requests"] += 1
    catalogue = catalogues[which]
    try:
        choice = select(asked, catalogue, enabled, identity="x")
    except SelectionError as error:
        event("disabled" if isinstance(error, SteeringDisabled) else "refused")
        assert not (enabled and isinstance(error, SteeringDisabled))
        keys = [key[:80] for key in asked or {} if isinstance(key, str)]
        assert str(error).startswith((*FIELDS, *(key for key in keys if key)))
        assert str(error).startswith(error.field)
        assert len(str(error)) < 600
        return
    event("steered" if choice.steering else "plain")
    if not enabled:
        assert choice.steering is None
    for key in asked or {}:
        assert not (isinstance(key, str) and key.startswith("grains_"))
    marker = build(choice, border, held)
    written = json.dumps(marker, allow_nan=False)
    assert json.dumps(json.loads(written)) == written
    if choice.steering is None:
        assert not (marker and marker["terms"])
        return
    terms = choice.steering.terms
    names = [term.entry.name for term in terms]
    assert 1 <= len(set(names)) == len(names) <= catalogue.limits.max_vectors_per_request
    for term, written in zip(terms, marker["terms"], strict=True):
        assert math.isfinite(term.strength) and abs(term.strength) <= MAX_STRENGTH
        assert np.float32(term.strength) != 0
        assert list(term.layers) == sorted(set(term.layers)) and term.layers
        assert set(term.layers) <= set(catalogue.vectors[term.entry.name].layers)
        assert str(Positions.parse(term.positions)) == term.positions
        edges = [edge for span in written["spans"] for edge in span]
        assert None not in edges[:-1] and (not edges or edges[0] >= 0)
        bounded = [edge for edge in edges if edge is not None]
        assert bounded == sorted(set(bounded)), "in order, disjoint, not empty, not touching"
    assert Receipt(marker, border).to_json()["steered"] is True


# --- positions -----------------------------------------------------------------------------------

_COUNTS = st.one_of(st.none(), st.integers(1, 60))
_POSITIONS = st.one_of(
    st.builds(Positions, _COUNTS, _COUNTS),
    st.builds(Positions, st.just(0), _COUNTS),
    st.builds(Positions, _COUNTS, st.just(0)),
)
_KINDS = st.sampled_from([Positions.parse("text"), Positions.parse("image")])


def tokens(positions, border, length, held=()):
    """The steered ones among the first `length` tokens."""
    spans = positions.spans(border, held)
    return {p for p in range(length) for a, b in spans if a <= p and (b is None or p < b)}


@law(500)
@given(held=_HELD, border=st.integers(1, 80), length=st.integers(0, 120))
def test_laws_of_kinds(held, border, length):
    TRIED["kinds"] += 1
    kind = {p: modality for modality, start, end in held for p in range(start, end)}
    text, image = (tokens(Positions.parse(w), border, length, held) for w in ("text", "image"))
    assert text == {p for p in range(length) if p not in kind}
    assert image == {p for p in range(length) if kind.get(p) == "image"}


@law(500)
@given(text=st.one_of(_PLACES, _ANYTHING))
def test_a_text_is_read_as_its_canonical_form_or_refused(text):
    TRIED["positions' texts"] += 1
    try:
        positions = Positions.parse(text)
    except PositionsError as error:
        assert "is not one of all, text, image, prompt," in str(error) and len(str(error)) < 300
        return
    assert Positions.parse(str(positions)) == positions
    assert len(str(positions)) <= len(text)
    names = [part.partition(":")[0] for part in text.split("+")]
    assert len(set(names)) == len(names)


@law(800)
@given(positions=_POSITIONS, border=st.integers(1, 80), length=st.integers(0, 160))
def test_laws_of_intervals(positions, border, length):
    TRIED["intervals"] += 1
    assert Positions.parse(str(positions)) == positions
    prompt, answer = Positions(positions.before, 0), Positions(0, positions.after)
    here = tokens(positions, border, length)
    assert all(start >= 0 for start, _ in positions.spans(border)) and len(here) <= length
    # The two halves are disjoint, are the whole, and lie where their names say.
    halves = tokens(prompt, border, length), tokens(answer, border, length)
    assert halves[0] | halves[1] == here and not halves[0] & halves[1]
    assert all(p < border for p in halves[0]) and all(p >= border for p in halves[1])
    wanted = border if positions.before is None else min(border, positions.before)
    assert halves[0] == {p for p in range(length) if border - wanted <= p < border}
    assert here <= tokens(Positions.parse("all"), border, length) == set(range(length))
    both = tokens(Positions.parse("prompt"), border, length)
    assert both | tokens(Positions.parse("generation"), border, length) == set(range(length))
    assert Positions.parse("prompt+generation") == Positions.parse("all")
    if 0 not in (positions.before, positions.after):
        swapped = "+".join(f"{answer}+{prompt}".split("+"))
        assert Positions.parse(swapped) == positions


# --- prefix cache --------------------------------------------------------------------------------

_STRENGTHS = st.sampled_from([0.5, -0.5, 0.25])
_WISHES = st.dictionaries(
    st.sampled_from(["a", "b", "c", "twin-of-a"]),
    st.tuples(_STRENGTHS, st.one_of(_POSITIONS, _KINDS).map(str), st.booleans()),
    max_size=3,
)


def terms_of(wishes, border, catalogue, held):
    """The marker's terms of a request, made the way the front end makes them."""
    terms = []
    for name, (strength, positions, narrowed) in wishes.items():
        entry = catalogue.vectors[name]
        layers = entry.layers[:1] if narrowed else entry.layers
        terms.append(Term(entry, strength, positions, layers))
    marker = build(Choice(Steering.of(terms)), border, held) if terms else None
    return marker["terms"] if marker else []


def shifted(wishes, border, end, catalogue, held):
    """How often each (vector with its strength and layers, token) occurs before `end`."""
    found = Counter()
    for name, (strength, positions, narrowed) in wishes.items():
        entry = catalogue.vectors[name]
        layers = entry.layers[:1] if narrowed else entry.layers
        row = entry.digest, entry.scale, layers, float(np.float32(strength))
        found.update((row, p) for p in tokens(Positions.parse(positions), border, end, held))
    return found


@law(2000)
@given(
    one=_WISHES,
    other=_WISHES,
    same=st.booleans(),
    borders=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    block=st.integers(1, 8),
    size=st.sampled_from([1, 4, 16]),
    held=_HELD,
)
def test_blocks_are_shared_exactly_if_the_same_tokens_are_shifted_alike(
    catalogues, one, other, same, borders, block, size, held
):
    TRIED["pairs of requests"] += 1
    catalogue, end = catalogues[0], block * size
    if same:  # Otherwise two random requests hardly ever steer the same.
        other = {
            # Workers compute in float32, where this is the same strength.
            name: (strength + 1e-12, other.get(name, (0, positions))[1], narrowed)
            for name, (strength, positions, narrowed) in one.items()
        }
    asked = (one, borders[0]), (other, borders[1])
    # Requests whose tokens are the same: the images lie at the same places.
    found = [shifted(*request, end, catalogue, held) for request in asked]
    keys = [block_key(terms_of(*request, catalogue, held), end) for request in asked]
    event(f"same tokens: {found[0] == found[1]}, some: {bool(found[0])}")
    if keys[0] == keys[1]:
        assert found[0] == found[1]
    # One vector under two names may come in two orders, which costs no more than a cache hit.
    elif not {"a", "twin-of-a"} <= one.keys():
        assert found[0] != found[1]
    assert (keys[0] == "") == (not found[0])


# --- what an operator or a stranger writes -------------------------------------------------------

_WORDS = st.one_of(
    st.text(max_size=12),
    st.text(st.characters(), max_size=3),  # surrogates among them
    st.sampled_from(["vectors", "v", "path", "a.safetensors", "strength", "layers", "positions"]),
    st.sampled_from(["default", "canary", "admin", "slots", "steered_layers", "description", "/"]),
)
_ATOMS = st.one_of(
    st.none(), st.booleans(), st.floats(), _WORDS, st.integers(-3, 5),
    st.sampled_from([10**30, 10**400, -(10**400), 1e308, 2**63]),
)  # fmt: skip
_NESTS = st.recursive(
    _ATOMS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(_WORDS, inner)),
    max_leaves=12,
)
_ENTRIES = st.fixed_dictionaries(
    {"path": st.one_of(st.just("a.safetensors"), _NESTS)},
    optional={name: _NESTS for name in ("strength", "layers", "positions", "scale", "description")},
)
_TOPS = st.fixed_dictionaries(
    {"vectors": st.one_of(st.dictionaries(_WORDS, _ENTRIES, min_size=1, max_size=2), _NESTS)},
    optional={
        name: _NESTS
        for name in ("default", "canary", "slots", "max_vectors_per_request", "steered_layers",
                     "admin", "layer_output")
    },
)  # fmt: skip
_YAML = st.lists(
    st.sampled_from([
        "vectors: ", "v: ", "path: ", "a.safetensors", "strength: ", "{", "}", "[", "]", ", ", "\n",
        "  ", "- ", "? ", ": ", "&a ", "*a ", "<<: ", "!!int ", "!!map ", "!!binary ", "!!omap ",
        "!!timestamp ", "!!set ", "!x ", "2020-13-45", "0x_", "1:2:3", "0o7", ".nan", ".inf", "~",
        "'", '"', "\\u0000", "\\ud800", "---\n", "...\n", "#", "|", ">", "%TAG", "\t", "yes", "1",
    ]),
    max_size=40,
).map("".join)  # fmt: skip


def _read(content):
    """Reads it; everything but a catalogue and a refusal in a few words is an error."""
    try:
        read_catalogue(content)
    except GrainsConfigError as error:
        assert len(str(error)) < 2000
        str(error).encode()  # for whoever is told
        event("refused")


@law(300)
@given(content=st.one_of(_TOPS, _NESTS))
def test_any_settings_make_a_catalogue_or_are_refused(artifacts, monkeypatch, content):
    TRIED["settings"] += 1
    monkeypatch.chdir(artifacts)
    _read(content)


@law(400)
@given(content=st.one_of(st.binary(max_size=60), _YAML.map(str.encode)))
def test_any_bytes_make_a_catalogue_or_are_refused(artifacts, content):
    TRIED["YAML files"] += 1
    path = artifacts / "any.yaml"
    path.write_bytes(content)
    _read({"config": str(path)})


@law(300)
@given(
    passport=st.fixed_dictionaries(
        {},
        optional={
            "recommended": st.one_of(
                _NESTS,
                st.dictionaries(st.sampled_from(["layers", "strength", "positions"]), _NESTS),
            ),
            **{name: _NESTS for name in ("model_id", "model", "format_version", "x")},
        },
    )
)
def test_any_passport_is_read_or_refused(passport):
    TRIED["passports"] += 1
    vector = random_vector("llama", 0)
    said = {
        "format_version": 1,
        "layer_convention": LAYER_CONVENTION,
        "model": dataclasses.asdict(vector.model),
        **passport,
    }
    tensors = {"directions": vector.directions, "reference_norms": vector.reference_norms}
    content = safetensors.torch.save(tensors, metadata={"grains": json.dumps(said)})
    try:
        read = SteeringVector.parse(content, "v")
    except ArtifactError as error:
        assert len(str(error)) < 2000
        str(error).encode()
        return
    json.dumps(read.passport, ensure_ascii=False).encode()
    Positions.parse(read.recommended_positions)
    assert set(read.recommended_layers) <= set(read.layers)


@law(300)
@given(where=st.integers(0, 400), what=st.binary(max_size=12), cut=st.integers(0, 9))
def test_any_damage_to_an_artifact_is_refused_or_harmless(where, what, cut):
    TRIED["artifacts"] += 1
    vector = random_vector("llama", 0)
    tensors = {"directions": vector.directions, "reference_norms": vector.reference_norms}
    said = {
        "format_version": 1,
        "layer_convention": LAYER_CONVENTION,
        "model": dataclasses.asdict(vector.model),
    }
    whole = safetensors.torch.save(tensors, metadata={"grains": json.dumps(said)})
    damaged = whole[:where] + what + whole[where + len(what) :]
    with suppress(ArtifactError):
        SteeringVector.parse(damaged[: len(damaged) - cut], "v")
