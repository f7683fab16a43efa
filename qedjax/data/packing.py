"""Packing: several documents a row, whole, with segment ids and positions; which go together is planned from their lengths alone."""

from collections.abc import Sequence
from typing import Any

import grain
import numpy as np
from grain.experimental import BestFitPackIterDataset

from qedjax.types import TrainBatch

BINS = 64  # rows that the packer keeps open at a time


def plan_rows(lengths: Sequence[int], row_length: int, seed: int, max_documents: int | None = None) -> list[list[int]]:
    """Documents of each row: grain's best-fit packer over the documents in an order drawn from `seed`.

    Args:
      lengths: tokens of each document, each in [1, row_length].
      row_length: tokens a row.
      max_documents: most documents a row; None is no limit, 1 turns packing off (for backends without segment ids).

    Only lengths are packed, as runs of the document's number, so that rows can later be made in any order: the loader's position is
    then a counter, which no state of a streaming packer could be.
    """
    order = np.random.default_rng(seed).permutation(len(lengths))
    runs = grain.MapDataset.source(order).map(lambda i: {'document': np.full(lengths[i], i, np.int32)})
    packer = BestFitPackIterDataset(runs.to_iter_dataset(), length_struct={'document': row_length}, num_packing_bins=BINS,
                                    shuffle_bins=False, max_sequences_per_bin=max_documents)
    rows = []
    for packed in packer:
        segments = packed['document_segment_ids']
        starts = np.flatnonzero((np.diff(segments, prepend=0) != 0) & (segments > 0))
        rows.append(packed['document'][starts].tolist())
    return rows


def assemble(documents: Sequence[tuple[np.ndarray, int]], row_length: int) -> TrainBatch:
    """One row [T] of (token ids, number of prompt ids) documents, laid end to end; the rest is padding (see TrainBatch)."""
    fields: Any = [np.zeros(row_length, dtype) for dtype in (np.int32, np.int32, np.float32, np.int32, np.int32)]
    row: Any = TrainBatch(*fields)
    start = 0
    for segment, (ids, prompt) in enumerate(documents, 1):
        end = start + len(ids)
        row.tokens[start:end] = ids
        row.targets[start : end - 1] = ids[1:]
        row.weights[start + max(prompt - 1, 0) : end - 1] = 1  # the last prompt token predicts the first trained one
        row.positions[start:end] = np.arange(len(ids))
        row.segment_ids[start:end] = segment
        start = end
    return row
