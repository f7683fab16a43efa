"""Batches by number: batch k is a pure function of the data, the settings and k, so a resume needs nothing but its step counter."""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator

import grain
import jax
import numpy as np

from qedjax.data.packing import assemble, plan_rows
from qedjax.types import Example, TrainBatch

TOO_LONG = 'longer than row_length'
UNTRAINABLE = 'no trained token'


@dataclasses.dataclass(frozen=True)
class DataReport:
    """What became of the documents: used ones, their tokens (and trained tokens), rows, dropped ones by reason."""

    documents: int
    tokens: int
    trained_tokens: int
    rows: int
    row_length: int
    dropped: dict[str, int]

    @property
    def utilisation(self) -> float:
        """Share of row positions that hold a token."""
        return self.tokens / (self.rows * self.row_length)

    def __str__(self) -> str:
        dropped = ', '.join(f'{count} {reason}' for reason, count in self.dropped.items()) or 'none'
        return (f'{self.documents} documents, {self.tokens:,} tokens ({self.trained_tokens:,} trained) in {self.rows} rows of '
                f'{self.row_length} ({self.utilisation:.1%} used); dropped: {dropped}')


class Loader:
    """Packed batches of a fixed set of documents.

    Documents are packed once; every epoch visits all rows in an order drawn from (seed, epoch). The last batch of an epoch is filled up
    with empty rows, so each document is seen exactly once an epoch. Any process can make any batch: the number of hosts does not matter.
    """

    def __init__(self, examples: Iterable[Example], *, row_length: int, batch: int, seed: int = 0, max_documents: int | None = None):
        """Packs `examples` into rows of `row_length` tokens, `batch` rows a batch.

        Documents that are too long or that have no trained token are dropped and counted, never cut. Raises ValueError if none is left.
        """
        if row_length < 2 or batch < 1:
            raise ValueError(f'row_length must be at least 2 and batch at least 1, not {row_length} and {batch}')
        self.row_length, self.batch, self.seed = row_length, batch, seed
        dropped, self._documents = Counter(), []
        for example in examples:
            reason = TOO_LONG if len(example) > row_length else None if _trained(example) else UNTRAINABLE
            if reason:
                dropped[reason] += 1
            else:
                ids = np.array(example.prompt_ids + example.completion_ids, np.int32)
                self._documents.append((ids, len(example.prompt_ids)))
        if not self._documents:
            raise ValueError(f'no document can be trained on ({dict(dropped) or "the data is empty"}); '
                             f'raise row_length={row_length} or check the data')
        self._rows = plan_rows([len(ids) for ids, _ in self._documents], row_length, seed, max_documents)
        self.report = DataReport(
            len(self._documents), sum(len(ids) for ids, _ in self._documents),
            sum(len(ids) - max(prompt, 1) for ids, prompt in self._documents), len(self._rows), row_length, dict(dropped))

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self._rows) // self.batch)

    @property
    def fingerprint(self) -> str:
        """Hash of the documents and of all that decides which batch they are in."""
        digest = hashlib.sha256(repr((self.row_length, self.batch, self.seed, self._rows)).encode())
        for ids, prompt in self._documents:
            digest.update(np.array([len(ids), prompt], np.int32).tobytes() + ids.tobytes())
        return digest.hexdigest()[:16]

    def prompts(self, count: int) -> list[tuple[int, ...]]:
        """Prompt ids of the first `count` documents that have a prompt."""
        return [tuple(ids[:prompt].tolist()) for ids, prompt in self._documents if prompt][:count]

    def documents_of(self, k: int) -> list[list[int]]:
        """Numbers of the documents in each row of batch k (fewer rows than `batch` at the end of an epoch)."""
        epoch, index = divmod(k, self.steps_per_epoch)
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self._rows))
        return [self._rows[row] for row in order[index * self.batch : (index + 1) * self.batch]]

    def fetch(self, k: int, rows: slice = slice(None)) -> TrainBatch:
        """Batch k, or only those of its rows that a process needs: host arrays [B, T]."""
        filled = self.documents_of(k)
        chosen = (filled + [[]] * (self.batch - len(filled)))[rows]
        made = [assemble([self._documents[i] for i in row], self.row_length) for row in chosen]
        return jax.tree.map(lambda *leaves: np.stack(leaves), *made)

    def iterate(self, start: int, stop: int) -> Iterator[TrainBatch]:
        """Batches start .. stop - 1, made by grain's threads while the caller computes."""
        options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
        yield from grain.MapDataset.range(start, stop).map(self.fetch).to_iter_dataset(options)


def _trained(example: Example) -> bool:
    """Whether some token is predicted: the very first token of a document is not."""
    return len(example.completion_ids) > (0 if example.prompt_ids else 1)
