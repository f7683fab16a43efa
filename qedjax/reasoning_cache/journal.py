"""A file that holds every call of every chain as soon as it was made: a kill costs the calls under way and no other."""

import contextlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from qedjax.metrics import drop_torn_row
from qedjax.reasoning_cache.decoder import Decoder
from qedjax.reasoning_cache.state import State, Trace, begin, completion_from, to_json
from qedjax.types import Completion


class Journal(contextlib.AbstractContextManager):
    """Calls of chains in JSONL, in the order in which they were made. Give `committed` to the decoder, and begin chains by `resumed`.

    Attributes:
      count: calls in the file.
    """

    def __init__(self, path: pathlib.Path, identity: Mapping[str, Any]):
        """Opens a new file, or one as a kill left it.

        `identity` is all that the calls depend on, as JSON can hold it. Raises ValueError for a file of other chains.
        """
        drop_torn_row(path)
        rows = [json.loads(line) for line in path.read_bytes().split(b'\n') if line] if path.exists() else []
        if rows and rows[0] != json.loads(json.dumps({'identity': identity})):
            raise ValueError(f'{path} holds calls of other problems, settings or weights; go on with the same ones, or delete it')
        self.count = max(len(rows) - 1, 0)
        self._made: dict[int, list[Completion]] = {}
        for row in rows[1:]:
            self._made.setdefault(row['chain'], []).append(completion_from(row['completion']))
        self._file = path.open('a', encoding='utf-8')
        if not rows:
            self._write({'identity': identity})

    def resumed(self, decoder: Decoder, key: int, start: State) -> Trace:
        """Chain number `key` with the calls that it has made."""
        trace = begin(start)
        for completion in self._made.get(key, ()):
            trace = decoder.advance(trace, completion)
        return trace

    def committed(self, key: int, trace: Trace) -> None:
        """Adds the last call of a chain."""
        call = trace.calls[-1]
        self._write({'chain': key, **to_json(call)})
        self.count += 1

    def _write(self, row: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(row) + '\n')
        self._file.flush()

    def __exit__(self, *_) -> None:
        self._file.close()
