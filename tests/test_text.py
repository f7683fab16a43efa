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


@settings(deadline=None, max_examples=150)
@given(st.lists(st.integers(0, 299), max_size=20), CUTS)
def test_any_ids_stream_to_what_they_decode_to(ids, cuts):
    """Broken bytes and special tokens too; what has been shown is never taken back."""
    pieces, _ = streamed(TOKENIZER, ids, cuts)
    assert ''.join(pieces) == decode(TOKENIZER, ids)


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


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match='is empty'):
        TextStream(TOKENIZER, ('a', ''))


def test_the_cost_of_an_id_does_not_grow():
    lengths, ids = [], TOKENIZER.encode('all work and no play ' * 40, add_special_tokens=False)

    class Counting:
        def decode(self, ids, **kwargs):
            lengths.append(len(ids))
            return TOKENIZER.decode(ids, **kwargs)

    stream = TextStream(Counting())
    for i in ids:
        stream.push([i])
    assert max(lengths) <= 4


@settings(deadline=None, max_examples=50)
@given(st.text(alphabet='ab é中', max_size=12), CUTS)
def test_sentencepiece_rules_for_leading_spaces(text, cuts):
    """A Llama-like decoder: pieces carry their space in front, the first loses it, and unknown characters are bytes."""
    vocab = {'<unk>': 0, '▁': 1, 'a': 2, 'b': 3, '▁a': 4, 'é': 5} | {f'<0x{i:02X}>': 6 + i for i in range(256)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [('▁', 'a')], unk_token='<unk>', byte_fallback=True, fuse_unk=True))
    backend.normalizer = tokenizers.normalizers.Sequence([tokenizers.normalizers.Prepend('▁'), tokenizers.normalizers.Replace(' ', '▁')])
    d = tokenizers.decoders
    backend.decoder = d.Sequence([d.Replace('▁', ' '), d.ByteFallback(), d.Fuse(), d.Strip(' ', 1, 0)])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token='<unk>')
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces, _ = streamed(tokenizer, ids, cuts)
    assert ''.join(pieces) == decode(tokenizer, ids) == text


@pytest.mark.real
def test_a_real_tokenizer_on_a_real_proof():
    tokenizer = transformers.AutoTokenizer.from_pretrained(shared_data() / 'qwen3-tokenizer')
    text = (shared_data() / 'README.md').read_text()[:4000] + ' ∑ᵢ 𝔽ₚ ≤ ½ 🙂 証明終'
    ids = tokenizer.encode(text)
    pieces, stream = streamed(tokenizer, ids, range(0, len(ids), 3), ('証明終 and more',))
    assert ''.join(pieces) == stream.text == text
