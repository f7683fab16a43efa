"""Rows come through exactly as written, or are refused with file, line and reason."""

import decimal
import functools
import gzip
import json

import datasets
import hypothesis
import hypothesis.strategies as st
import pyarrow
import pyarrow.parquet
import pytest

from qedjax.data import sources
from qedjax.data.sources import CHAT, PAIR, Field, Source, read_rows
from qedjax.testing import shared_data

ANSWER = (Field('answer'),)


def write(path, *lines):
    path.write_text('\n'.join(lines) + '\n')
    return str(path)


def answers(path, *lines, types=(str,)):
    rows, _ = read_rows(Source(write(path / 'a.jsonl', *lines)), (Field('answer', types),))
    return [row['answer'] for row in rows]


def refusal(path, *lines, schema=ANSWER, **fields):
    with pytest.raises(ValueError) as error:  # noqa: PT011  the message is what the test looks at
        read_rows(Source(write(path / 'a.jsonl', *lines), **fields), schema)
    return str(error.value)


def test_text_that_looks_like_something_else_stays_text(tmp_path):
    texts = ['007', '1e3', '2024-01-02', 'true', '[1,2)', '12345678901234567890', ' 12', 'null', 'NaN', '']
    assert answers(tmp_path, *(json.dumps({'answer': text}) for text in texts)) == texts


def test_numbers_keep_their_digits_in_a_string_field(tmp_path):
    digits = ['12', '7', '-0', '1e3', '1.50', '12345678901234567890', '0.10000000000000000555111512312', '1E400']
    assert answers(tmp_path, *(f'{{"answer": {number}}}' for number in digits)) == digits


def test_numbers_are_exact_in_number_fields(tmp_path):
    assert answers(tmp_path, '{"answer": 12345678901234567890}', types=(int,)) == [12345678901234567890]
    assert answers(tmp_path, '{"answer": 7}', '{"answer": 0.5}', types=(float,)) == [7.0, 0.5]
    assert [type(v) for v in answers(tmp_path, '{"answer": 7}', '{"answer": "x"}', types=(int, str))] == [int, str]
    line = '{"answer": [1, 2.5, {"a": 12345678901234567890, "b": null, "c": "007"}]}'
    assert answers(tmp_path, line, types=(list,)) == [[1, 2.5, {'a': 12345678901234567890, 'b': None, 'c': '007'}]]


@pytest.mark.parametrize(('value', 'reason'), [
    ('true', "'answer' is bool, expected str"), ('[1]', "'answer' is list, expected str"),
    ('{"a": 1}', "'answer' is dict, expected str"), ('null', "'answer' is null"),
    ('NaN', 'NaN is not JSON'), ('-Infinity', '-Infinity is not JSON'),
    ('"\\ud800"', "'answer' holds half of a surrogate pair"),
])
def test_other_values_are_bad_rows_with_file_line_and_reason(tmp_path, value, reason):
    message = refusal(tmp_path, '{"answer": "x"}', f'{{"answer": {value}}}')
    assert f'a.jsonl:2: {reason}' in message
    assert '1 of 2 rows' in message
    assert 'max_bad_share' in message


def test_number_fields_refuse_text_fractions_and_infinities(tmp_path):
    assert 'is str, expected int' in refusal(tmp_path, '{"answer": "7"}', schema=(Field('answer', (int,)),))
    assert 'is a number, expected int' in refusal(tmp_path, '{"answer": 7.0}', schema=(Field('answer', (int,)),))
    assert 'is bool, expected int' in refusal(tmp_path, '{"answer": true}', schema=(Field('answer', (int,)),))
    assert 'not finite' in refusal(tmp_path, '{"answer": 1e999}', schema=(Field('answer', (float,)),))


@pytest.mark.parametrize(('line', 'reason'), [
    ('{"answer": "a", "answer": "b"}', "key 'answer' twice"),
    ('{"answer": "a", "n": {"k": 1, "k": 1}}', "key 'k' twice"),
    ('{"answer": "a"', 'not JSON'), ('["a"]', 'not a JSON object'), ('"a"', 'not a JSON object'),
    ('{"answer": ' + '[' * 100000, 'not JSON: nested too deeply'), ('{"other": 1}', "'answer' is missing"),
])
def test_bad_lines(tmp_path, line, reason):
    assert f'a.jsonl:3: {reason}' in refusal(tmp_path, '{"answer": "x"}', '', line)


def test_lines_end_only_at_newlines_and_must_be_utf8(tmp_path):
    path = tmp_path / 'a.jsonl'
    path.write_bytes('\ufeff{"answer": "a\u2028b\x85c"}\r\n'.encode() + b'{"answer": "\xff"}\n')
    rows, report = read_rows(Source(str(path), max_bad_share=0.5), ANSWER)
    assert rows == [{'answer': 'a\u2028b\x85c'}]
    assert report.first == (f'{path}:2: not UTF-8',)


def test_policy_for_bad_rows(tmp_path):
    lines = ['{"answer": true}', '{"answer": "x"}', '{', '{"answer": true}']
    assert '3 of 4 rows' in refusal(tmp_path, *lines, max_bad_share=0.74)
    rows, report = read_rows(Source(write(tmp_path / 'a.jsonl', *lines), max_bad_share=0.75), ANSWER)
    assert rows == [{'answer': 'x'}]
    assert (report.good, sum(report.bad.values())) == (1, 3)
    assert report.bad["'answer' is bool, expected str"] == 2
    assert [line.split(':')[-2] for line in report.first[::2]] == ['1', '4']
    assert '1 of 1 rows' in refusal(tmp_path, '{"answer": true}', max_bad_share=1.0)


def test_mapping_and_extra_columns(tmp_path):
    path = write(tmp_path / 'a.jsonl', '{"question": "q", "target": 12, "id": 3}')
    rows, _ = read_rows(Source(path, columns='prompt=question, completion=target'), PAIR)
    assert rows == [{'prompt': 'q', 'completion': '12'}]


@pytest.mark.parametrize('columns', ['prompt', 'prompt=', 'problem=question', 'prompt=question,prompt=target'])
def test_bad_mapping_names_the_fields(tmp_path, columns):
    assert 'columns=' in refusal(tmp_path, '{"question": "q", "target": 1}', schema=PAIR, columns=columns)


def test_missing_column_names_file_column_columns_and_remedy(tmp_path):
    message = refusal(tmp_path, '{"question": "q", "target": 1}', schema=PAIR, columns='prompt=question')
    for part in ('a.jsonl', "'completion'", 'question, target', "columns='completion=...'"):
        assert part in message
    message = refusal(tmp_path, '{"prompt": "q", "completion": "a"}', schema=PAIR, columns='reasoning=thoughts')
    assert "'thoughts'" in message


def test_prompts_may_be_text_or_chat_row_by_row(tmp_path):
    chat = [{'role': 'user', 'content': '007'}]
    lines = [json.dumps({'prompt': prompt, 'completion': 'c'}) for prompt in ('p', chat)]
    path = write(tmp_path / 'a.jsonl', *lines)
    assert [row['prompt'] for row in read_rows(Source(path), PAIR)[0]] == ['p', chat]


@pytest.mark.parametrize(('name', 'text', 'reason'), [
    ('a.json', '[]', 'must end in'), ('none.jsonl', None, 'no such file'), ('a.jsonl', '', 'is empty'),
    ('a.jsonl', '\n\n', 'holds no rows'), ('a.csv', 'answer\n', 'holds no rows'),
    ('a.parquet', 'x', 'not a whole Parquet'), ('a.jsonl.gz', 'x', 'not a whole gzip'),
    ('a.csv', 'a,a\n1,2\n', 'twice in the header'),
])
def test_unusable_files(tmp_path, name, text, reason):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=reason) as error:
        read_rows(Source(str(tmp_path / name)), ANSWER)
    assert name in str(error.value)


def test_gzip_and_a_cut_gzip(tmp_path):
    path = tmp_path / 'a.jsonl.gz'
    data = gzip.compress(b'{"answer": "x"}\n' * 1000)
    path.write_bytes(data)
    assert len(read_rows(Source(str(path), limit=7), ANSWER)[0]) == 7
    assert read_rows(Source(str(path)), ANSWER)[1].good == 1000
    digits = ''.join(f'{{"answer": "{n * n * n}"}}\n' for n in range(1000))
    whole = gzip.compress(digits.encode())
    for damaged in (data[:-12], whole[:100] + b'\xff' * 40 + whole[140:], whole[:-6] + b'\0' + whole[-5:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r'a\.jsonl\.gz: not a whole gzip'):
            read_rows(Source(str(path)), ANSWER)


def test_csv_cells_are_text(tmp_path):
    proof = 'line 1\nline "2", $x$' + 'y' * 200_000
    quoted = '"' + proof.replace('"', '""') + '"'
    path = write(tmp_path / 'a.csv', '\ufeffanswer,n', '007,7', '1e3,-2', f'{quoted},3', 'short', ',4')
    rows, report = read_rows(Source(path, max_bad_share=0.2), (*ANSWER, Field('n', (int,))))
    assert rows == [{'answer': a, 'n': n} for a, n in (('007', 7), ('1e3', -2), (proof, 3), ('', 4))]
    assert report.first == (f'{path}:6: 1 cells under 2 columns',)


def test_broken_quotes_are_bad_rows(tmp_path):
    path = write(tmp_path / 'a.csv', 'answer,n', 'a,1', '"two', 'lines,"2', 'b,3', '"open,4', 'c,5')
    rows, report = read_rows(Source(path, max_bad_share=0.5), ANSWER)
    assert rows == [{'answer': 'a'}, {'answer': 'b'}]
    assert [line.removeprefix(path).split(' ')[0] for line in report.first] == [':3:', ':6:']


def test_csv_that_is_not_utf8(tmp_path):
    (tmp_path / 'a.csv').write_bytes(b'answer\n\xff\n')
    with pytest.raises(ValueError, match=r'a\.csv: not UTF-8'):
        read_rows(Source(str(tmp_path / 'a.csv')), ANSWER)


def test_parquet_drops_padding_and_keeps_empty_strings(tmp_path):
    call = {'function': {'name': 'f', 'arguments': {'x': 1}}}
    other = {'function': {'name': 'g', 'arguments': {'y': 'z'}}}
    messages = [{'role': 'user', 'content': 'q'},
                {'role': 'assistant', 'content': '', 'reasoning_content': 'r', 'tool_calls': [call]},
                {'role': 'assistant', 'content': 'a', 'reasoning_content': '', 'tool_calls': [other]}]
    table = pyarrow.Table.from_pylist([{'messages': messages, 'unused': 1}])
    pyarrow.parquet.write_table(table, tmp_path / 'a.parquet')
    assert table.to_pylist()[0]['messages'] != messages
    assert read_rows(Source(str(tmp_path / 'a.parquet')), CHAT)[0] == [{'messages': messages}]


@pytest.mark.parametrize('compression', ['snappy', 'none'])
def test_damaged_parquet_pages_are_named(tmp_path, compression):
    path = tmp_path / 'a.parquet'
    table = pyarrow.table({'answer': [str(n * n * n) for n in range(2000)]})
    pyarrow.parquet.write_table(table, path, compression=compression, use_dictionary=False)
    whole = path.read_bytes()
    for start in (10, len(whole) // 3):
        path.write_bytes(whole[:start] + b'\xff' * 60 + whole[start + 60 :])
        with pytest.raises(ValueError, match=r'a\.parquet: not a whole Parquet'):
            read_rows(Source(str(path)), ANSWER)


def test_parquet_values(tmp_path):
    def read(values, **fields):
        pyarrow.parquet.write_table(pyarrow.table({'answer': values}), tmp_path / 'a.parquet')
        return read_rows(Source(str(tmp_path / 'a.parquet'), **fields), ANSWER)

    assert [row['answer'] for row in read([12345678901234567])[0]] == ['12345678901234567']
    assert [row['answer'] for row in read([decimal.Decimal('1.50')])[0]] == ['1.50']
    rows, report = read(['007', None, '2024-01-02'], max_bad_share=0.5)
    assert [row['answer'] for row in rows] == ['007', '2024-01-02']
    assert report.first == (f"{tmp_path / 'a.parquet'}:2: 'answer' is null",)
    for values, kind in (([0.5], 'float'), ([True], 'bool'), (pyarrow.array([0], pyarrow.timestamp('s')), 'datetime')):
        with pytest.raises(ValueError, match=f'is {kind}, expected str'):
            read(values)


def test_hub_rows_are_checked_like_any_other(monkeypatch):
    asked = {}

    def load_dataset(*arguments, **options):
        asked.update(options, arguments=arguments)
        return datasets.Dataset.from_list([{'q': 'x', 'answer': '007', 'n': 1}, {'q': 'y', 'answer': None, 'n': 2}])

    monkeypatch.setattr(sources.datasets, 'load_dataset', load_dataset)
    source = Source('hub:org/name', columns='prompt=q,completion=answer', name='main', revision='abc',
                    max_bad_share=0.5)
    rows, report = read_rows(source, PAIR)
    assert rows == [{'prompt': 'x', 'completion': '007'}]
    assert report.first == ("hub:org/name:2: 'answer' is null",)
    assert asked == {'arguments': ('org/name', 'main'), 'split': 'train', 'revision': 'abc'}


@pytest.mark.parametrize(('name', 'text'), [
    ('a.jsonl', '{"answer": "007"}\n{"answer": 7}\n'), ('a.jsonl', '{"answer": "2024-01-02"}\n'),
    ('a.jsonl', '{"answer": "1e3"}\n{"answer": "x"}\n{"answer": 5}\n'), ('a.csv', 'answer\n007\n8\n'),
])
def test_hub_text_that_the_library_retyped_is_refused(tmp_path, monkeypatch, name, text):
    folder = tmp_path / 'data'
    folder.mkdir()
    (folder / name).write_text(text)
    load = functools.partial(datasets.load_dataset, cache_dir=str(tmp_path / 'cache'))
    monkeypatch.setattr(sources.datasets, 'load_dataset', load)
    with pytest.raises(ValueError, match="read the text column 'answer' as"):
        read_rows(Source(f'hub:{folder}', max_bad_share=0.9), ANSWER)


def test_hub_text_that_stayed_text_is_read(tmp_path, monkeypatch):
    chat = [{'role': 'user', 'content': '007'}, {'role': 'assistant', 'content': 'a', 'reasoning_content': 'r'}]
    write(tmp_path / 'a.jsonl', json.dumps({'messages': chat, 'answer': '1e3', 'n': 7}))
    load = functools.partial(datasets.load_dataset, cache_dir=str(tmp_path / 'cache'))
    monkeypatch.setattr(sources.datasets, 'load_dataset', load)
    rows, _ = read_rows(Source(f'hub:{tmp_path}'), (*CHAT, *ANSWER, Field('n', (int,))))
    assert rows == [{'messages': chat, 'answer': '1e3', 'n': 7}]


TEXT = st.text(st.characters(exclude_categories=['Cs']))
JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=8)


@hypothesis.settings(max_examples=100, deadline=None,
                     suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(st.lists(st.tuples(TEXT, st.lists(JSON)), min_size=1, max_size=4), st.booleans())
def test_json_round_trips_exactly(tmp_path, values, ascii_only):
    path = tmp_path / 'a.jsonl'
    rows = [{'text': text, 'items': items} for text, items in values]
    path.write_bytes(b''.join(json.dumps(row, ensure_ascii=ascii_only).encode() + b'\n' for row in rows))
    read, _ = read_rows(Source(str(path)), (Field('text'), Field('items', (list,))))
    assert repr(read) == repr(rows)


@pytest.mark.real
def test_real_files():
    data = shared_data()
    rows, _ = read_rows(Source(str(data / 'gsm8k/test.jsonl.gz'), 'prompt=question,completion=answer'), PAIR)
    assert len(rows) == 1319
    path = data / 'imobench/answerbench_v2.csv'  # one of its rows lacks a closing quote
    _, report = read_rows(Source(str(path), 'answer=Short Answer', max_bad_share=0.01), ANSWER)
    assert (report.good, report.first) == (399, (f"{path}:150: not CSV: ',' expected after '\"'",))
    rows, _ = read_rows(Source(str(data / 'wordproblems/mawps_addsub.jsonl'), 'prompt=input,completion=target'), PAIR)
    assert len(rows) == 395
    fields = (Field('problem_id'), Field('prompt', (list,)), Field('rejected', (bool,), required=False))
    rows, report = read_rows(Source(str(data / 'opc/opc_judge_test.parquet'), max_bad_share=1.0), fields)
    assert report.good == 434
    assert set(rows[0]['prompt'][0]) == {'role', 'content'}
