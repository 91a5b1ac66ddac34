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


def pair(row=0):
    """A prompt of three tokens; replies of two tokens and one that begin alike."""
    return example(row, ([1, 2, 3, 7, 8], [0, 0, 0, 1, 1]), ([1, 2, 3, 7], [0, 0, 0, 1]))


def test_a_shared_prompt_is_there_once():
    batch = collate([example(0, ([4, 5], [0, 1])), pair(1)])
    assert batch.input_ids.tolist() == [[4, 5, 1, 2, 3, 7, 8, 3, 7]]
    assert batch.position_ids.tolist() == [[0, 1, 0, 1, 2, 3, 4, 2, 3]]
    # The prompt's last token stands twice: the first token of each reply is scored there.
    assert batch.target.tolist() == [5, -100, -100, -100, 7, 8, -100, 7, -100]
    assert batch.cu_seqlens.tolist() == [0, 2, 7, 9]
    assert batch.cu_seqlens_k.tolist() == [0, 2, 7, 11]
    assert batch.key_rows.tolist() == [0, 1, 2, 3, 4, 5, 6, 2, 3, 7, 8]
    assert batch.longest == 5 and batch.tokens == 9 and batch.scored == 4


def test_sharing_can_be_turned_off():
    batch = collate([pair()], share_prompt=False)
    assert batch.input_ids.tolist() == [[1, 2, 3, 7, 8, 1, 2, 3, 7]] and batch.cu_seqlens.tolist() == [0, 5, 9]
    assert batch.cu_seqlens_k is None and batch.key_rows is None


@pytest.mark.parametrize(
    "sequences, shared",
    [
        ((([1, 2, 3], [0, 0, 1]),), 0),  # one reply: nobody to share with
        ((([1, 2, 3], [0, 0, 1]), ([4, 2, 3], [0, 0, 1])), 0),  # different from the first token on
        ((([1, 2, 3, 4], [0, 0, 0, 1]), ([1, 5, 3, 4], [0, 0, 0, 1])), 1),
        ((([1, 2, 3, 4], [0, 1, 0, 1]), ([1, 2, 3, 5], [0, 1, 0, 1])), 0),  # scored from the second token on
        ((([1, 2, 3], [0, 0, 0]), ([1, 2, 3], [0, 0, 0])), 2),  # nothing scored: each keeps a token of its own
        ((([1, 2], [1, 1]), ([1, 3], [1, 1])), 0),  # a first token is never scored
        ((([1, 2, 3, 4, 5],) * 1 + ([0, 0, 0, 0, 1],), ([1, 2, 3, 6], [0, 0, 0, 1]), ([1, 2, 7], [0, 0, 1])), 1),
    ],
)
def test_what_is_shared(sequences, shared):
    one = example(0, *sequences)
    assert one.shared == shared
    batch = collate([one, one])
    assert batch.tokens == 2 * one.computed
    whole = collate([one, one], share_prompt=False)
    rows = slice(None) if batch.key_rows is None else batch.key_rows
    assert torch.equal(batch.input_ids[:, rows], whole.input_ids)
    assert torch.equal(batch.position_ids[:, rows], whole.position_ids)
    assert batch.target[batch.target != -100].tolist() == whole.target[whole.target != -100].tolist()


def test_to_moves_every_tensor():
    batch = collate([pair(), pair()]).to("meta")
    tensors = [t for t in vars(batch).values() if isinstance(t, torch.Tensor)]
    assert len(tensors) == 6 and {t.device.type for t in tensors} == {"meta"}
    assert batch.rows == [0, 0] and batch.longest == 5
