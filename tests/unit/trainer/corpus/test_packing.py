"""Packing against a plain token-by-token reference."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.corpus.packing import Labelled, Packed, pack, position_ids, take_part

PAD, END = 99, 0
DOCUMENTS = st.lists(st.lists(st.integers(1, 50), max_size=40), max_size=12)
LENGTH = st.integers(2, 13)


def arrays(documents: list[list[int]]) -> list[np.ndarray]:
    return [np.array([*document, END], dtype=np.int32) for document in documents]


def reference(documents: list[np.ndarray], length: int, packing: str) -> list[tuple]:
    """(ids, starts, mask) of every sequence, one token at a time."""
    stream = [(int(t), n) for n, document in enumerate(documents) for t in document]
    result = []
    for first in range(0, len(stream), length):
        piece = stream[first : first + length]
        piece += [(PAD, -1)] * (length - len(piece))
        starts, mask = [], []
        for t in range(length):
            new = t == 0 or (packing == "documents" and piece[t][1] != piece[t - 1][1])
            starts.append(int(new))
            counts = t + 1 < length and piece[t + 1][1] >= 0
            if counts and packing == "documents":
                counts = piece[t + 1][1] == piece[t][1]
            mask.append(int(counts))
        if any(mask):
            result.append(([token for token, _ in piece], starts, mask))
    return result


@given(DOCUMENTS, LENGTH, st.sampled_from(["documents", "concat"]))
def test_equals_the_token_by_token_reference(documents, length, packing) -> None:
    packed = pack(arrays(documents), length, packing, PAD)
    expected = reference(arrays(documents), length, packing)
    assert len(packed) == len(expected)
    for row, (ids, starts, mask) in enumerate(expected):
        assert packed.input_ids[row].tolist() == ids
        assert packed.document_start[row].tolist() == starts
        assert packed.loss_mask[row].tolist() == mask
    assert packed.input_ids.dtype == np.int32
    assert packed.document_start.dtype == packed.loss_mask.dtype == np.uint8


@given(DOCUMENTS, LENGTH)
def test_every_token_is_there_once_in_order(documents, length) -> None:
    documents = [[7, *document] for document in documents]  # two tokens at least
    packed = pack(arrays(documents), length, "concat", PAD)
    stream = np.concatenate([*arrays(documents), np.zeros(0, np.int32)])
    found = packed.input_ids.reshape(-1)
    if len(stream) % length == 1:  # a last sequence of one token has nothing to predict
        stream = stream[:-1]
    assert found[: len(stream)].tolist() == stream.tolist()
    assert (found[len(stream) :] == PAD).all()


@given(DOCUMENTS, LENGTH)
def test_no_loss_across_documents_or_into_padding(documents, length) -> None:
    packed = pack(arrays(documents), length, "documents", PAD)
    counted = packed.loss_mask.astype(bool)
    assert not counted[:, -1].any()
    assert not (packed.input_ids[:, 1:][counted[:, :-1]] == PAD).any()
    assert not (packed.input_ids[counted] == END).any()  # nothing is predicted from an end
    assert not packed.document_start[:, 1:][counted[:, :-1]].any()
    assert counted.any(axis=1).all()


def test_sequences_without_a_loss_position_are_dropped() -> None:
    lone = [np.array([END], dtype=np.int32)] * 4
    assert len(pack(lone, 4, "documents", PAD)) == 0
    assert len(pack(lone, 4, "concat", PAD)) == 1
    assert len(pack([], 4, "documents", PAD)) == 0


def test_positions_restart_with_every_document() -> None:
    start = np.array([[1, 0, 0, 1, 0, 1], [1, 0, 0, 0, 0, 0]], dtype=np.uint8)
    assert position_ids(start).tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]]


@given(DOCUMENTS, LENGTH, st.integers(1, 4), st.sampled_from(["documents", "concat"]))
def test_a_part_is_filled_to_the_sequence_by_the_fewest_documents(
    documents, length, count, packing
) -> None:
    ids = arrays(documents)
    taken = take_part(ids, count, length, packing, PAD)
    full = [
        sequence
        for sequence in reference(ids, length, packing)
        if PAD not in sequence[0]  # only full ones
    ]
    if len(full) < count:
        assert taken is None
        return
    assert taken is not None
    packed, used = taken
    assert packed.input_ids.tolist() == [ids_ for ids_, _, _ in full[:count]]
    assert take_part(ids[:used], count, length, packing, PAD) is not None
    assert take_part(ids[: used - 1], count, length, packing, PAD) is None


def one(ids: list[int], start: list[int], mask: list[int]) -> Packed:
    return Packed(
        np.array([ids], np.int32),
        np.array([start], np.uint8),
        np.array([mask], np.uint8),
        np.zeros(1, np.int64),
    )


def test_the_key_depends_on_ids_boundaries_and_mask() -> None:
    base = one([1, 2, 3], [1, 0, 0], [1, 1, 0])
    others = [
        one([1, 2, 4], [1, 0, 0], [1, 1, 0]),
        one([1, 2, 3], [1, 1, 0], [1, 1, 0]),
        one([1, 2, 3], [1, 0, 0], [1, 0, 0]),
    ]
    keys = {item.keys().tobytes() for item in [base, *others]}
    assert len(keys) == 4
    assert base.keys().shape == (1, 16) and base.keys().dtype == np.uint8
    again = one([1, 2, 3], [1, 0, 0], [1, 1, 0])
    assert again.keys().tobytes() == base.keys().tobytes()


@given(DOCUMENTS, LENGTH)
@settings(max_examples=30)
def test_the_key_does_not_depend_on_the_place_in_the_corpus(documents, length) -> None:
    packed = pack(arrays(documents), length, "documents", PAD)
    backwards = packed.take(np.arange(len(packed))[::-1])
    assert backwards.keys()[::-1].tolist() == packed.keys().tolist()


@pytest.mark.parametrize("salt", ["0", "1"])
def test_keys_are_those_of_every_other_process(salt: str) -> None:
    """Python's salted hash() was a key in a peer: caches never matched."""
    script = (
        "import numpy as np; from trainer.corpus.packing import pack; "
        "d = [np.arange(9, dtype=np.int32)]; "
        "print(pack(d, 4, 'documents', 99).keys().tobytes().hex())"
    )
    env = {**os.environ, "PYTHONHASHSEED": salt, "PYTHONPATH": os.getcwd()}
    out = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    here = pack([np.arange(9, dtype=np.int32)], 4, "documents", 99).keys().tobytes().hex()
    assert out.stdout.strip() == here
    assert here[:32] == "bcd55c7d645dc08cde2e371232e15b66"  # caches on disk are found by it
    layout = np.array([0, 1, 2, 3], "<i4").tobytes() + bytes([1, 0, 0, 0]) + bytes([1, 1, 1, 0])
    assert here[:32] == hashlib.blake2b(layout, digest_size=16).hexdigest()


# Labelled documents.

LABELLED = st.lists(
    st.tuples(st.booleans(), st.lists(st.tuples(st.integers(1, 50), st.booleans()), max_size=20)),
    max_size=10,
)


def some(documents: list[tuple[bool, list[tuple[int, bool]]]]) -> list:
    """Labelled documents and plain ones, each ended by END."""
    made: list = []
    for is_labelled, tokens in documents:
        ids = np.array([*(token for token, _ in tokens), END], dtype=np.int32)
        learnt = np.array([*(flag for _, flag in tokens), True])
        made.append(Labelled(ids, learnt) if is_labelled else ids)
    return made


def labelled_reference(documents: list, length: int, packing: str) -> list[tuple]:
    """(ids, starts, mask, first and last document) of every sequence, one token at a time."""
    stream: list[tuple[int, int, bool]] = []  # token, document, learnt; padding is document -1
    for number, document in enumerate(documents):
        if isinstance(document, Labelled):
            pairs = list(zip(document.ids.tolist(), document.learnt.tolist(), strict=True))[:length]
            while len(stream) % length and len(stream) % length + len(pairs) > length:
                stream.append((PAD, -1, False))
        else:
            pairs = [(int(token), True) for token in document]
        stream += [(token, number, flag) for token, flag in pairs]
    result = []
    for first in range(0, len(stream), length):
        piece = stream[first : first + length]
        piece += [(PAD, -1, False)] * (length - len(piece))
        starts = [
            int(t == 0 or (packing == "documents" and piece[t][1] != piece[t - 1][1]))
            for t in range(length)
        ]
        mask = [
            int(t + 1 < length and not starts[t + 1] and piece[t + 1][2]) for t in range(length)
        ]
        if any(mask):
            numbers = [number for _, number, _ in piece if number >= 0]
            result.append(([token for token, _, _ in piece], starts, mask, numbers[0], numbers[-1]))
    return result


@given(LABELLED, LENGTH, st.sampled_from(["documents", "concat"]))
def test_labelled_documents_stay_whole_and_count_where_they_are_learnt(
    documents, length, packing
) -> None:
    made = some(documents)
    packed = pack(made, length, packing, PAD)
    expected = labelled_reference(made, length, packing)
    assert len(packed) == len(expected)
    for row, (ids, starts, mask, first, _) in enumerate(expected):
        assert packed.input_ids[row].tolist() == ids
        assert packed.document_start[row].tolist() == starts
        assert packed.loss_mask[row].tolist() == mask
        assert packed.documents[row] == first
    longer = [one for one in made if isinstance(one, Labelled) and len(one) > length]
    assert packed.cut == len(longer)
    assert packed.input_ids.dtype == np.int32
    assert packed.document_start.dtype == packed.loss_mask.dtype == np.uint8


@given(LABELLED, LENGTH, st.integers(1, 3), st.sampled_from(["documents", "concat"]))
def test_a_part_of_labelled_documents_is_filled_by_the_first_ones(
    documents, length, count, packing
) -> None:
    """And leaves all others to the next part: what stands behind it is whole."""
    made = some(documents)
    taken = take_part(made, count, length, packing, PAD)
    if taken is None:
        assert len(pack(made, length, packing, PAD)) <= count  # the last one may not be full
        return
    packed, used = taken
    expected = labelled_reference(made, length, packing)[:count]
    assert packed.input_ids.tolist() == [one[0] for one in expected]
    assert packed.loss_mask.tolist() == [one[2] for one in expected]
    assert used == expected[-1][4] + 1
    longer = [n for n, one in enumerate(made) if isinstance(one, Labelled) and len(one) > length]
    assert packed.cut == sum(number < used for number in longer)


def test_a_conversation_by_hand() -> None:
    """As in the module's docstring."""
    flags = [(1, False), (2, False), (3, True)]
    documents = some([(True, flags), (True, [(4, False), (5, True)]), (True, flags * 2)])
    packed = pack(documents, 4, "documents", PAD)
    assert packed.input_ids.tolist() == [[1, 2, 3, END], [4, 5, END, PAD], [1, 2, 3, 1]]
    assert packed.document_start.tolist() == [[1, 0, 0, 0], [1, 0, 0, 1], [1, 0, 0, 0]]
    assert packed.loss_mask.tolist() == [[0, 1, 1, 0], [1, 1, 0, 0], [0, 1, 0, 0]]
    assert packed.documents.tolist() == [0, 1, 2] and packed.cut == 1
