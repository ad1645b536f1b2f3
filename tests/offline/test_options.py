"""Which options mean something to which method."""

import pytest

from offline.errors import InputError
from offline.options import ExtractOptions, Method, Read


@pytest.mark.parametrize(
    ("method", "read"),
    [
        (Method.grains, Read.prompt_end),
        (Method.caa, Read.response_end),
        (Method.pca_diff, Read.response_end),
        (Method.icv, Read.response_end),
        (Method.random, Read.prompt_end),
    ],
)
def test_every_method_reads_at_its_own_place_unless_told_otherwise(method, read):
    assert ExtractOptions(method=method).read_at is read
    if read is Read.response_end:
        other = ExtractOptions(method=method, read=Read.response_start)
        assert other.read_at is Read.response_start


def test_a_passport_names_only_what_decided_the_vector():
    assert ExtractOptions(k=3).facts()["k"] == 3
    assert ExtractOptions().facts()["read"] == "prompt-end"
    assert set(ExtractOptions(method=Method.caa).facts()) == {
        "method", "read", "chat", "limit", "seed",
    }  # fmt: skip
    assert set(ExtractOptions(method=Method.random).facts()) == {"method", "chat", "limit", "seed"}


@pytest.mark.parametrize(
    ("method", "names", "refused"),
    [
        (Method.grains, ["k", "read", "ig_batch", "deltas"], None),
        (Method.caa, ["read", "seed"], None),
        (Method.caa, ["k", "ig_points", "read"], r"^--ig-points, --k: has no meaning .* caa"),
        (Method.random, ["read"], "--read: has no meaning with --method random"),
        (Method.icv, ["attributions"], "--attributions: has no meaning with --method icv"),
    ],
)
def test_options_without_meaning_are_refused(method, names, refused):
    options = ExtractOptions(method=method)
    if refused is None:
        options.require_meaning(names)
    else:
        with pytest.raises(InputError, match=refused):
            options.require_meaning(names)


def test_responses_cannot_be_compared_where_they_have_not_begun():
    with pytest.raises(InputError, match=r"--read is 'prompt-end', where --method caa finds no"):
        ExtractOptions(method=Method.caa, read=Read.prompt_end)
