"""Records of some positions of sequences, laid out along all of them.

A cache of positions: loss has a row for each position that counts in the loss, in their order.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from trainer.logits.reader import CacheReader
from trainer.logits.records import Records


def read_along(
    reader: CacheReader, keys: Sequence[bytes], loss_mask: NDArray, positions: str
) -> Records:
    """The records of sequences along all their positions, one sequence after the other.

    loss_mask: [sequences, seq], not 0 where a position counts. positions: of which the cache has
    records, "all" or "loss". Rows of the other positions repeat one that was captured, so that
    whatever is computed of them is a number. Raises MissingRecord, and CacheDamaged also for a
    record of another number of positions.
    """
    if positions == "all":
        return reader.read_many(keys, loss_mask.shape[1])
    counted = np.asarray(loss_mask) != 0
    found = reader.read_many(keys, counted.sum(axis=1).tolist())
    return take(found, rows_of(counted))


def rows_of(counted: NDArray[np.bool_]) -> NDArray[np.int64]:
    """For each position of [sequences, seq], flat, the row of its record; where there is none, of
    the last record before it."""
    return np.maximum(np.cumsum(counted.reshape(-1)) - 1, 0)


def take(records: Records, rows: NDArray[np.int64]) -> Records:
    """The rows `rows` of records, in that order, repeats allowed."""
    entropy, true = records.entropy, records.true_log_prob
    return Records(
        records.ids[rows],
        records.log_probs[rows],
        records.log_tails[rows],
        None if entropy is None else entropy[rows],
        None if true is None else true[rows],
    )
