"""T+ and T-."""

import torch

from offline.selection import select

SCORES = torch.tensor([9.0, -1.0, 2.0, 0.0, -3.0, 1.0, -2.0])
ALL = [True] * 7


def test_strongest_first_with_the_sign_of_their_set():
    assert select(SCORES, ALL, 2) == ([0, 2], [4, 6])


def test_fewer_than_k_rather_than_the_wrong_sign():
    assert select(SCORES, ALL, 10) == ([0, 2, 5], [4, 6, 1])
    assert select(SCORES.abs(), ALL, 10)[1] == []


def test_only_eligible_tokens():
    assert select(SCORES, [False, True, True, True, False, True, True], 10) == ([2, 5], [6, 1])
