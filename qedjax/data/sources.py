"""Rows from JSONL, CSV, Parquet or the hub, checked against a declared schema; nothing is guessed or rewritten.

A schema is a tuple of `Field`; a use that needs other fields declares its own. A string stays that string. A number is
taken for a string field: with its digits as written (JSONL, CSV) or exactly (integers and decimals of Parquet). The
datasets library retypes the text of JSON and CSV files on the hub ('007' becomes 7): such a column is refused.
"""

import collections
import csv
import dataclasses
import decimal
import gzip
import json
import math
import pathlib
import re
import sys
import zlib
from collections.abc import Iterable, Iterator

import datasets
import pyarrow
import pyarrow.parquet


@dataclasses.dataclass(frozen=True)
class Field:
    """One column of a schema: its name here, the types that a value may have (of str, int, float, bool, list, dict)."""

    name: str
    types: tuple[type, ...] = (str,)
    required: bool = True


CHAT = (Field('messages', (list,)),)
PAIR = (Field('prompt', (str, list)), Field('completion'), Field('reasoning', required=False))
Wanted = dict[str, tuple[type, ...]]  # types of each column that is read


@dataclasses.dataclass(unsafe_hash=True)
class Source:
    """Where rows come from.

    Attributes:
      path: a local .jsonl, .jsonl.gz, .csv or .parquet file, or 'hub:org/name'.
      columns: our fields named after the file's columns where they differ, e.g. 'prompt=question,completion=answer'.
      split, name, revision: of a hub data set; name and revision may be empty.
      limit: stop after so many good rows; 0 reads all.
      max_bad_share: the largest share of bad rows that is tolerated (they are left out and reported).
    """

    path: str = ''
    columns: str = ''
    split: str = 'train'
    name: str = ''
    revision: str = ''
    limit: int = 0
    max_bad_share: float = 0.0


@dataclasses.dataclass(frozen=True)
class RowReport:
    """What reading found: `bad` counts rows by reason, `first` holds the first ten as 'file:line: reason'.

    The line of a Parquet or hub row is its number, from 1.
    """

    good: int
    bad: dict[str, int]
    first: tuple[str, ...]

    def __str__(self) -> str:
        return f'{self.good} good rows' + ''.join(f', {count} bad ({reason})' for reason, count in self.bad.items())


def read_rows(source: Source, schema: tuple[Field, ...]) -> tuple[list[dict], RowReport]:
    """Rows that hold the schema's fields and nothing else (an optional field that is absent or null is left out).

    Raises:
      ValueError: on an unusable file or mapping, a column that no row has, more bad rows than allowed, or no good row.
    """
    columns = _columns(source, schema)
    wanted = {columns[field.name]: field.types for field in schema}
    rows, bad, first, seen = [], collections.Counter(), [], {}
    for line, record in _records(source, wanted, seen):
        if source.limit and len(rows) == source.limit:
            break
        reason, row = (record, {}) if isinstance(record, str) else _row(record, columns, schema)
        if reason:
            bad[reason] += 1
            first += [f'{source.path}:{line}: {reason}'] if len(first) < 10 else []
        else:
            rows.append(row)
    if seen:
        _require_columns(source, columns, schema, seen)
    report = RowReport(len(rows), dict(bad), tuple(first))
    total = bad.total() + len(rows)
    if not total:
        raise ValueError(f'{source.path}: holds no rows; point `path` at a file with data')
    if not rows or bad.total() / total > source.max_bad_share:
        raise ValueError(f'{source.path}: {bad.total()} of {total} rows are bad; repair them, or leave them out by '
                         f'raising max_bad_share ({source.max_bad_share}). The first:\n' + '\n'.join(first))
    return rows, report


def _columns(source: Source, schema: tuple[Field, ...]) -> dict[str, str]:
    """The file's column of each field."""
    columns = {field.name: field.name for field in schema}
    named = [part.partition('=') for part in source.columns.split(',') if part.strip()]
    for field, equals, column in ([part.strip() for part in parts] for parts in named):
        if not equals or not column or field not in columns:
            raise ValueError(f'{source.path}: columns={source.columns!r} must read field=column,...; '
                             f'the fields are {", ".join(columns)}')
        columns[field] = column
    if len({field.strip() for field, _, _ in named}) != len(named):
        raise ValueError(f'{source.path}: columns={source.columns!r} names a field twice; keep one')
    return columns


def _require_columns(source: Source, columns: dict[str, str], schema: tuple[Field, ...], seen: dict[str, None]):
    """Refuses a file without a required column, or without one that the mapping names."""
    for field in schema:
        column = columns[field.name]
        if column not in seen and (field.required or column != field.name):
            raise ValueError(f'{source.path}: no column {column!r} for field {field.name!r}; it has {", ".join(seen)}; '
                             f"name the right one with columns='{field.name}=...'")


def _row(record: dict, columns: dict[str, str], schema: tuple[Field, ...]) -> tuple[str, dict]:
    """(reason, row): the reason is empty for a good row."""
    row = {}
    for field in schema:
        value = record.get(columns[field.name])
        if value is None and field.required:
            return f'{columns[field.name]!r} is ' + ('null' if columns[field.name] in record else 'missing'), {}
        if value is not None:
            reason, row[field.name] = _value(value, field.types)
            if reason:
                return f'{columns[field.name]!r} {reason}', {}
    return '', row


class _Number(str):
    """A number as it was written, until the schema says what it should be."""


_NUMBER = re.compile(r'-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?')


def _value(value, types: tuple[type, ...]) -> tuple[str, object]:
    """(reason, value as one of the types)."""
    if type(value) in (int, decimal.Decimal):
        value = _Number(value)
    try:
        if type(value) is not _Number:
            if type(value) in types:
                return '', _plain(value)
        elif int in types and value.lstrip('-').isdigit():
            return '', int(value)
        elif float in types:
            return '', _finite(value)
        elif str in types:
            return '', str(value)
    except ValueError as error:
        return str(error), None
    found = 'a number' if type(value) is _Number else type(value).__name__
    return f'is {found}, expected {" or ".join(kind.__name__ for kind in types)}', None


def _plain(value):
    """The same value with its numbers parsed; refuses what no tokenizer or JSON writer can carry."""
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, _Number):
        return int(value) if value.lstrip('-').isdigit() else _finite(value)
    if isinstance(value, str) and re.search('[\ud800-\udfff]', value):
        raise ValueError('holds half of a surrogate pair, which is not text')
    return _finite(value) if isinstance(value, float) else value


def _finite(value: str | float) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError('holds a number that is not finite')
    return number


def _records(source: Source, wanted: Wanted, seen: dict[str, None]) -> Iterator[tuple[int, dict | str]]:
    """(line, record or reason) of each row, from 1; fills `seen` with the columns met."""
    if source.path.startswith('hub:'):
        return _hub(source, wanted, seen)
    readers = {'.jsonl': _jsonl, '.jsonl.gz': _jsonl, '.csv': _csv, '.parquet': _parquet}
    reader = next((reader for suffix, reader in readers.items() if source.path.endswith(suffix)), None)
    path = pathlib.Path(source.path)
    if reader is None:
        raise ValueError(f'{path}: its name must end in {", ".join(readers)}, or start with hub:; rename or convert it')
    if not path.is_file():
        raise ValueError(f'{path}: no such file; the working folder is {pathlib.Path.cwd()}')
    if not path.stat().st_size:
        raise ValueError(f'{path}: is empty (0 bytes); was its download or copy cut?')
    return reader(path, wanted, seen)


def _jsonl(path: pathlib.Path, wanted: Wanted, seen: dict[str, None]) -> Iterator[tuple[int, dict | str]]:
    try:
        with gzip.open(path) if path.suffix == '.gz' else path.open('rb') as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    record = _parse(line.removeprefix(b'\xef\xbb\xbf') if number == 1 else line)
                    seen.update(dict.fromkeys(record if isinstance(record, dict) else ()))
                    yield number, record
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f'{path}: not a whole gzip file ({error}); download or pack it again') from None


def _parse(line: bytes) -> dict | str:
    """A JSON object with numbers as written, or why it is not one."""
    try:
        record = json.loads(line.decode(), parse_int=_Number, parse_float=_Number, parse_constant=_refuse_constant,
                            object_pairs_hook=_distinct)
    except UnicodeDecodeError:
        return 'not UTF-8'
    except json.JSONDecodeError as error:
        return f'not JSON: {error.msg}'
    except RecursionError:
        return 'not JSON: nested too deeply'
    except ValueError as error:
        return str(error)
    return record if isinstance(record, dict) else 'not a JSON object'


def _refuse_constant(name: str):
    raise ValueError(f'{name} is not JSON')


def _distinct(pairs: list[tuple[str, object]]) -> dict:
    record = dict(pairs)
    if len(record) != len(pairs):
        twice = next(key for key, count in collections.Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f'key {twice!r} twice')
    return record


def _csv(path: pathlib.Path, wanted: Wanted, seen: dict[str, None]) -> Iterator[tuple[int, dict | str]]:
    csv.field_size_limit(sys.maxsize)  # a proof may exceed the module's 128 KiB; the limit is the process's
    try:
        with path.open(encoding='utf-8-sig', newline='') as lines:
            reader = csv.reader(lines, strict=True)
            header = next(reader, [])
            if len(set(header)) != len(header):
                raise ValueError(f'{path}: a column name appears twice in the header; rename one')
            seen.update(dict.fromkeys(header))
            while (line := reader.line_num + 1) and (cells := _csv_record(reader)) is not None:
                if isinstance(cells, str):
                    yield line, cells
                elif cells and len(cells) != len(header):
                    yield line, f'{len(cells)} cells under {len(header)} columns'
                elif cells:
                    yield line, {name: _Number(cell) if _NUMBER.fullmatch(cell) else cell
                                 for name, cell in zip(header, cells, strict=True)}
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f'{path}: not UTF-8 CSV after line {reader.line_num}: {error}') from None


def _csv_record(reader) -> list[str] | str | None:
    """Cells, or why they cannot be read (the reader goes on at the next line), or None at the end."""
    try:
        return next(reader, None)
    except csv.Error as error:
        return f'not CSV: {error}'


def _parquet(path: pathlib.Path, wanted: Wanted, seen: dict[str, None]) -> Iterator[tuple[int, dict | str]]:
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            seen.update(dict.fromkeys(names))
            batches = file.iter_batches(256, columns=[name for name in names if name in wanted])
            yield from _numbered(row for batch in batches for row in batch.to_pylist())
    except (pyarrow.ArrowException, OSError) as error:
        reason = ' '.join(str(error).split())
        raise ValueError(f'{path}: not a whole Parquet file ({reason}); download it again') from None


def _hub(source: Source, wanted: Wanted, seen: dict[str, None]) -> Iterator[tuple[int, dict | str]]:
    rows = datasets.load_dataset(source.path.removeprefix('hub:'), source.name or None, split=source.split,
                                 revision=source.revision or None)
    seen.update(dict.fromkeys(rows.column_names))
    if rows.info.builder_name in ('json', 'csv'):
        _refuse_retyped(source, wanted, rows.features)
    yield from _numbered(rows.select_columns([name for name in rows.column_names if name in wanted]))


def _refuse_retyped(source: Source, wanted: Wanted, features: datasets.Features):
    """Refuses text columns that are no longer text: what was written is lost, be it '007', '1e3' or a date."""
    mixed = getattr(datasets, 'Json', ())  # newer versions give a column of several types this one
    for column in [name for name, types in wanted.items() if name in features and str in types]:
        feature = features[column]
        scalar = isinstance(feature, datasets.Value) and feature.dtype not in ('string', 'large_string', 'null')
        if scalar or isinstance(feature, mixed):
            raise ValueError(f'{source.path}: the datasets library read the text column {column!r} as {feature}, '
                             'which loses how it was written; download the file and give its path')


def _without_nulls(value):
    """Arrow fills the keys that a struct lacks beside its neighbours with null: those were never written."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _numbered(rows: Iterable[dict]) -> Iterator[tuple[int, dict]]:
    for number, row in enumerate(rows, 1):
        yield number, {name: _without_nulls(value) for name, value in row.items()}
