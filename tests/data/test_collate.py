# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from fastpost.data.collate import Example, Sequence, collate


def example(row, *sequences, **numbers):
    return Example(row, tuple(Sequence(ids, bytes(trained)) for ids, trained in sequences), **numbers)


def test_targets_are_shifted_inside_each_sequence():
    batch = collate(
        [example(7, ([5, 6, 7], [0, 0, 1]), ([8, 9], [0, 1])), example(3, ([1], [0]), ([2, 3, 4], [0, 1, 1]))]
    )
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 1, 2, 3, 4]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 0, 1, 2]]
    assert batch.cu_seqlens.tolist() == [0, 3, 5, 6, 9]
    assert batch.target.tolist() == [-100, 7, -100, 9, -100, -100, 3, 4, -100]
    assert (batch.tokens, batch.scored, batch.longest, batch.rows) == (9, 4, 3, [7, 3])
    assert batch.input_ids.dtype == batch.position_ids.dtype == batch.target.dtype == torch.int64
    assert batch.cu_seqlens.dtype == torch.int32


def test_no_target_crosses_a_boundary():
    """A first token marked as trained has nothing before it, and must not be predicted by the neighbour's last."""
    batch = collate([example(0, ([1, 2], [0, 1])), example(1, ([3, 4], [1, 1]))])
    assert batch.target.tolist() == [2, -100, 4, -100]


def test_numbers_become_float32_per_sequence():
    one = example(0, ([1, 2], [0, 1]), ([1, 3], [0, 1]), reference_logprob=(-1.5, -2.0), reward=(1.0, 0.0))
    batch = collate([one, one])
    assert (
        batch.reference_logprob.tolist() == [-1.5, -2.0, -1.5, -2.0] and batch.reference_logprob.dtype == torch.float32
    )
    assert batch.reward.tolist() == [1, 0, 1, 0] and batch.previous_logprob is None


def test_numbers_in_some_rows_only():
    with pytest.raises(ValueError, match="data row 4: reward: other rows have it, this one has not"):
        collate([example(0, ([1, 2], [0, 1]), reward=(1.0,)), example(4, ([1, 2], [0, 1]))])


def test_empty_batch():
    with pytest.raises(ValueError, match=r"\[collate\] examples: expected at least one, got none"):
        collate([])


def test_to_moves_every_tensor():
    batch = collate([example(0, ([1, 2], [0, 1]), reward=(1.0,))]).to("meta")
    assert {t.device.type for t in (batch.input_ids, batch.cu_seqlens, batch.target, batch.reward)} == {"meta"}
    assert batch.rows == [0] and batch.longest == 2
