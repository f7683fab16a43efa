"""Streamed text equals decoded text, split anyhow; stop strings are found across ids and never shown in part."""

import itertools

import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from qedjax.rollout.text import TextStream
from qedjax.testing import shared_data, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def decode(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def streamed(tokenizer, ids, cuts, stop=()):
    """The released pieces, and the stream, of ids pushed in the parts that `cuts` makes."""
    stream, pieces, bounds = TextStream(tokenizer, stop), [], sorted({0, len(ids), *(c % (len(ids) + 1) for c in cuts)})
    for start, end in itertools.pairwise(bounds):
        pieces.append(stream.push(ids[start:end]))
    return [*pieces, stream.finish()], stream


def cut_by_characters(text, stop):
    """Text before the stop string that is completed first, found by growing the text."""
    for end in range(len(text) + 1):
        starts = [end - len(s) for s in stop if text[:end].endswith(s)]
        if starts:
            return text[: min(starts)], True
    return text, False


CUTS = st.lists(st.integers(0, 60), max_size=6)


@settings(deadline=None, max_examples=150)
@given(st.text(alphabet='ab é中🙂\n<', max_size=25), CUTS, st.lists(st.text(alphabet='ab é中\n', min_size=1, max_size=4), max_size=3))
def test_streams_equal_the_text_before_the_stop_completed_first(text, cuts, stop):
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    pieces, stream = streamed(TOKENIZER, ids, cuts, stop)
    want, stopped = cut_by_characters(text, stop)
    assert (''.join(pieces), stream.text, stream.stopped) == (want, want, stopped)
    if stopped:  # not one id more than needed
        assert cut_by_characters(decode(TOKENIZER, ids[: stream.count]), stop)[1]
        assert not cut_by_characters(decode(TOKENIZER, ids[: stream.count - 1]), stop)[1]
    else:
        assert stream.count == len(ids)


@pytest.mark.parametrize(('text', 'stop', 'want'), [
    ('xxDEFGHIJyy', ('DEFGHIJ',), 'xx'), ('a\n\nb', ('\n\n',), 'a'), ('41</answer> tail', ('</answer>',), '41'),
    ('zabc', ('abc', 'ab'), 'z'), ('zab', ('abc', 'b'), 'za'), ('DEFGHI', ('DEFGHIJ',), 'DEFGHI'), ('DEFDEFG!', ('DEFG',), 'DEF'),
    ('aé🙂中b', ('中',), 'aé🙂'), ('aab', ('ab',), 'a'), ('', ('x',), ''), ('x', ('x',), '')])
def test_cases(text, stop, want):
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    for cuts in ([], range(len(ids))):
        pieces, stream = streamed(TOKENIZER, ids, cuts, stop)
        assert ''.join(pieces) == stream.text == want


def test_nothing_is_shown_that_may_be_part_of_a_character_or_a_stop():
    stream = TextStream(TOKENIZER, ('DEFG',))
    ids = TOKENIZER.encode('ab🙂DEF', add_special_tokens=False)
    shown = [stream.push([i]) for i in ids]
    assert ''.join(shown) == 'ab🙂'
    assert '\ufffd' not in ''.join(shown)
    assert stream.push(TOKENIZER.encode('x', add_special_tokens=False)) == 'DEFx'


@pytest.mark.parametrize(('stop', 'message'), [(('a', ''), 'is empty'), ('ab', 'no list of strings'), (('a', 5), 'no list of strings')])
def test_what_is_no_stop_string_is_refused(stop, message):
    with pytest.raises(ValueError, match=message):
        TextStream(TOKENIZER, stop)


def sentencepiece_like(strip):
    """A decoder as Llama's (the first piece loses the space in front of it) or Gemma's; unknown characters are bytes, from id 6 on."""
    vocab = {'<unk>': 0, '▁': 1, 'a': 2, 'b': 3, '▁a': 4, 'é': 5} | {f'<0x{i:02X}>': 6 + i for i in range(256)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [('▁', 'a')], unk_token='<unk>', byte_fallback=True, fuse_unk=True))
    backend.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend('▁')] * strip + [tokenizers.normalizers.Replace(' ', '▁')])
    d = tokenizers.decoders
    backend.decoder = d.Sequence([d.Replace('▁', ' '), d.ByteFallback(), d.Fuse(), *[d.Strip(' ', 1, 0)] * strip])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token='<unk>')


def byte_level_with_seams():
    """Byte-level, with pieces that end one character and begin the next, and one that is named like a byte of sentencepiece."""
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    symbols = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    shown = ''.join(byte_level.pre_tokenize_str('中🙂é')[0][0])
    vocab = [*symbols, shown[2:4], shown[2:5], shown[6:8], '<0x41>']
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({piece: i for i, piece in enumerate(vocab)}, []))
    backend.pre_tokenizer, backend.decoder = byte_level, tokenizers.decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend)


def grown(tokenizer, ids, stop):
    """Text, ids needed and whether a stop string came, by decoding every beginning of ids whole."""
    for count in range(1, len(ids) + 1):
        text, stopped = cut_by_characters(decode(tokenizer, ids[:count]), stop)
        if stopped:
            return text, count, True
    return decode(tokenizer, ids), len(ids), False


LLAMA, GEMMA, SEAMS = sentencepiece_like(True), sentencepiece_like(False), byte_level_with_seams()
TEXTS = ['a', ' ', 'A', '中', '🙂', 'é中']


def ids_with_stops(tokenizer):
    """Any ids, often whole characters among them, and stop strings out of their text."""
    pieces = [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS]
    parts = st.one_of(st.sampled_from(pieces), st.integers(0, len(tokenizer) - 1).map(lambda i: [i]))
    lists = st.lists(parts, max_size=12).map(lambda parts: list(itertools.chain(*parts)))
    return lists.flatmap(lambda ids: st.tuples(st.just(ids), stops_of(decode(tokenizer, ids).replace('\ufffd', ''))))


def stops_of(text):
    spans = st.tuples(st.integers(0, len(text)), st.integers(1, 4)).map(lambda span: text[span[0] : span[0] + span[1]])
    return st.lists(spans.filter(bool), max_size=2) if text else st.just([])


@pytest.mark.parametrize('tokenizer', [TOKENIZER, SEAMS, LLAMA, GEMMA], ids=['tiny', 'seams', 'llama', 'gemma'])
@settings(deadline=None, max_examples=100)
@given(data=st.data(), cuts=CUTS)
def test_any_ids_stream_to_what_they_decode_to(tokenizer, data, cuts):
    """Broken bytes and special tokens too; what has been shown is never taken back, and no id is taken after a stop string."""
    ids, stops = data.draw(ids_with_stops(tokenizer))
    for stop in ([], stops):
        pieces, stream = streamed(tokenizer, ids, cuts, stop)
        assert ''.join(pieces) == stream.text
        assert (stream.text, stream.count, stream.stopped) == grown(tokenizer, ids, stop)


def test_bytes_that_a_later_one_spoils_are_not_shown():
    """All bytes of a run of them become replacement characters with one that is no UTF-8."""
    zh = LLAMA.convert_tokens_to_ids([f'<0x{byte:02X}>' for byte in '中'.encode()])
    for last, want in ((6 + 0xFF, '\ufffd' * 4 + 'a'), (5, '中éa')):
        stream = TextStream(LLAMA)
        assert [stream.push([i]) for i in zh] == ['', '', '']
        assert stream.push([last]) + stream.push([2]) == want
    stream = TextStream(LLAMA, ('中',))
    stream.push([2, *zh, 2])
    assert (stream.text, stream.count, stream.stopped) == ('a', 4, True)


@settings(deadline=None, max_examples=50)
@given(st.text(alphabet='ab é中', max_size=12), CUTS)
def test_sentencepiece_rules_for_leading_spaces(text, cuts):
    ids = LLAMA.encode(text, add_special_tokens=False)
    pieces, _ = streamed(LLAMA, ids, cuts)
    assert ''.join(pieces) == decode(LLAMA, ids) == text


class Counting:
    """A tokenizer that counts the ids it decodes."""

    def __init__(self, tokenizer):
        self.tokenizer, self.decoded = tokenizer, 0

    def decode(self, ids, **kwargs):
        self.decoded += len(ids)
        return self.tokenizer.decode(ids, **kwargs)

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)


@pytest.mark.parametrize('stop', [(), ('zzz',)])
@pytest.mark.parametrize(('tokenizer', 'ids'), [
    (TOKENIZER, TOKENIZER.encode('all work and no play ')), (TOKENIZER, TOKENIZER.encode('🙂')), (TOKENIZER, [TOKENIZER.encode('🙂')[0]]),
    (LLAMA, [6 + 0xFF]), (LLAMA, [6 + byte for byte in '中'.encode()]), (LLAMA, [6 + 0xFF, 2])],
    ids=['text', 'characters', 'broken', 'broken run', 'run', 'broken runs'])
def test_the_cost_of_an_id_does_not_grow(tokenizer, ids, stop):
    ids, counting = (ids * 600)[:600], Counting(tokenizer)
    stream, before = TextStream(counting, stop), counting.decoded
    for i in ids:
        stream.push([i])
    stream.finish()
    assert stream.text == decode(tokenizer, ids)
    assert counting.decoded - before <= 20 * len(ids)


@pytest.mark.real
@pytest.mark.parametrize('name', ['qwen3-tokenizer', 'qwen3-mini-tokenizer'])
def test_a_real_tokenizer_on_real_text(name):
    tokenizer = transformers.AutoTokenizer.from_pretrained(shared_data() / name)
    text = (shared_data() / 'README.md').read_text()[:4000] + ' ∑ᵢ 𝔽ₚ ≤ ½ 🙂 証明終'
    ids = tokenizer.encode(text)
    pieces, stream = streamed(tokenizer, ids, range(0, len(ids), 3), ('証明終 and more',))
    assert ''.join(pieces) == stream.text == text

    @settings(deadline=None, max_examples=100)
    @given(ids_with_stops(tokenizer), CUTS)
    def any_ids(case, cuts):
        pieces, stream = streamed(tokenizer, case[0], cuts, case[1])
        assert (''.join(pieces), stream.count, stream.stopped) == grown(tokenizer, *case)

    any_ids()
