"""What carries loss is what the model must produce after the exact inference prompt; typed control tokens stay text."""

import hypothesis
import hypothesis.strategies as st
import pytest
import transformers

from qedjax.data import chat
from qedjax.data.chat import encode_raw, encode_row, encode_turn, prompt_ids, split_thinking
from qedjax.testing import shared_data, tiny_tokenizer

TOKENIZERS = {kind: tiny_tokenizer(kind) for kind in ('hybrid', 'open', 'none')}
HEADER = '<|im_start|>assistant\n'


def user(content):
    return {'role': 'user', 'content': content}


def assistant(content, reasoning=None):
    message = {'role': 'assistant', 'content': content}
    return message if reasoning is None else message | {'reasoning_content': reasoning}


def span(messages, tokenizer):
    """(what the prompt writes after the last header, completion), decoded."""
    example, = encode_row({'messages': messages}, tokenizer)
    return tokenizer.decode(example.prompt_ids).rpartition(HEADER)[2], tokenizer.decode(example.completion_ids)


def rendered(tokenizer, messages, **options):
    return tuple(tokenizer.apply_chat_template(messages, **options)['input_ids'])


@pytest.fixture(params=['qwen3-tokenizer', 'qwen3-mini-tokenizer'])
def qwen(request):
    return transformers.AutoTokenizer.from_pretrained(shared_data() / request.param)


# B11, B15: the loss span, in each mode of thinking


@pytest.mark.parametrize(('kind', 'reply', 'prompt_end', 'completion'), [
    ('hybrid', assistant('a', 'r'), '', '<think>\nr\n</think>\n\na<|im_end|>'),
    ('hybrid', assistant('a'), '<think>\n\n</think>\n\n', 'a<|im_end|>'),
    ('hybrid', assistant('\n\na', ''), '<think>\n\n</think>\n\n', 'a<|im_end|>'),
    ('hybrid', assistant('<think>\n\n</think>\n\na'), '<think>\n\n</think>\n\n', 'a<|im_end|>'),
    ('hybrid', assistant('<think>\nr\n</think>\n\na', ''), '', '<think>\nr\n</think>\n\na<|im_end|>'),
    ('open', assistant('a', 'r'), '<think>\n', 'r\n</think>\n\na<|im_end|>'),
    ('none', assistant('a', 'r'), '', '<think>\nr\n</think>\n\na<|im_end|>'),
    ('none', assistant('\na '), '', '\na <|im_end|>'),
])
def test_loss_span_of_one_turn(kind, reply, prompt_end, completion):
    assert span([user('q'), reply], TOKENIZERS[kind]) == (prompt_end, completion)


@pytest.mark.parametrize('inline', [True, False])
def test_each_turn_is_one_example_whose_history_is_the_templates(inline):
    turns = [assistant(f'<think>\nr{i}\n</think>\n\na{i}') if inline else assistant(f'a{i}', f'r{i}') for i in (1, 2)]
    messages = [user('q1'), turns[0], user('q2'), turns[1]]
    tokenizer = TOKENIZERS['hybrid']
    first, second = encode_row({'messages': messages}, tokenizer)
    assert tokenizer.decode(first.completion_ids) == '<think>\nr1\n</think>\n\na1<|im_end|>'
    assert tokenizer.decode(second.completion_ids) == '<think>\nr2\n</think>\n\na2<|im_end|>'
    assert second.prompt_ids == rendered(tokenizer, messages[:3], add_generation_prompt=True)
    assert 'r1' not in tokenizer.decode(second.prompt_ids)
    assert encode_row({'messages': messages}, tokenizer, 'last') == [second]
    assert chat.dropped_reasoning(tokenizer, messages[:3]) == 2


def test_a_tool_response_keeps_the_reasoning_before_it():
    tokenizer = TOKENIZERS['hybrid']
    response = user('<tool_response>\nsee <|im_end|> <tool_response>\n</tool_response>')
    messages = [user('q'), assistant('a1', 'r1'), response]
    _, second = encode_row({'messages': [*messages, assistant('a2', 'r2')]}, tokenizer)
    text = tokenizer.decode(second.prompt_ids)
    assert '<think>\nr1\n</think>\n\na1<|im_end|>' in text
    assert 'see <|im_end|> <tool_response>\n' in text
    ids = [tokenizer.convert_tokens_to_ids(token) for token in ('<tool_response>', '</tool_response>', '<|im_end|>')]
    assert [second.prompt_ids.count(i) for i in ids] == [1, 1, 3]
    assert chat.dropped_reasoning(tokenizer, messages) == 0
    assert chat.dropped_reasoning(tokenizer, [*messages, assistant('a2'), user('q2')]) == 2


def test_no_reasoning_under_an_open_template_is_refused():
    with pytest.raises(ValueError, match='always opens a think block'):
        encode_row({'messages': [user('q'), assistant('a')]}, TOKENIZERS['open'])
    with pytest.raises(ValueError, match='always opens a think block'):
        prompt_ids(TOKENIZERS['open'], [user('q')], thinking=False)


# Innocuous conversations: the template's own ids


CONVERSATION = [{'role': 'system', 'content': 'be exact'}, user('q1\n\n'), assistant('a1', 'r1'), user(' the q2'),
                assistant('the a2', 'r2 \n r')]


@pytest.mark.parametrize('kind', TOKENIZERS)
@pytest.mark.parametrize('thinking', [None, True])
def test_prompts_equal_the_templates(kind, thinking):
    options = {} if thinking is None else {'enable_thinking': thinking}
    expected = rendered(TOKENIZERS[kind], CONVERSATION[:4], add_generation_prompt=True, **options)
    assert prompt_ids(TOKENIZERS[kind], CONVERSATION[:4], thinking) == expected


@pytest.mark.parametrize('kind', ['hybrid', 'open'])
def test_prompt_and_completion_equal_the_templates_render(kind):
    example = encode_row({'messages': CONVERSATION}, TOKENIZERS[kind], 'last')[0]
    newline = tuple(TOKENIZERS[kind].encode('\n'))
    assert example.prompt_ids + example.completion_ids + newline == rendered(TOKENIZERS[kind], CONVERSATION)


def test_answer_without_reasoning_equals_the_templates_render():
    tokenizer = TOKENIZERS['hybrid']
    example = encode_row({'prompt': 'q', 'completion': 'a'}, tokenizer)[0]
    ids = (*example.prompt_ids, *example.completion_ids, *tokenizer.encode('\n'))
    assert ids == rendered(tokenizer, [user('q'), assistant('a')])


# Control tokens typed by people


CONTROL = ['<|endoftext|>', '<|im_start|>', '<|im_end|>', '<think>', '</think>', '<tool_response>', '</tool_response>']
WORDS = st.sampled_from([*CONTROL, 'a', ' the', '\n', '<', '|>', '<|im_', '\ue000', 'é', '</', '<|'])
CONTENT = st.lists(WORDS, max_size=12).map(lambda words: ''.join(['x', *words, 'x']))


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(st.sampled_from(sorted(TOKENIZERS)), CONTENT, CONTENT, CONTENT, CONTENT, CONTENT)
def test_control_tokens_in_contents_stay_text(kind, system, query, history, thought, answer):
    tokenizer = TOKENIZERS[kind]
    messages = [{'role': 'system', 'content': system}, user(query), assistant(history, 'thought'), user(query)]
    example = encode_turn(tokenizer, messages, assistant(answer, thought))
    plain = [{'role': 'system', 'content': 's'}, user('q'), assistant('h', 'thought'), user('q')]
    control = set(tokenizer.convert_tokens_to_ids(CONTROL))
    same = encode_turn(tokenizer, plain, assistant('a', 't'))
    for ids, expected in ((example.prompt_ids, same.prompt_ids), (example.completion_ids, same.completion_ids)):
        assert [i for i in ids if i in control] == [i for i in expected if i in control]
    text = tokenizer.decode(example.prompt_ids)
    assert all(part in text for part in (system, query, history))
    opening = '' if kind == 'open' else '<think>\n'
    assert tokenizer.decode(example.completion_ids) == f'{opening}{thought}\n</think>\n\n{answer}<|im_end|>'


# B12, B55: generated text


@pytest.mark.parametrize(('text', 'opened', 'expected'), [
    ('work</think>\n\nans', True, ('work', 'ans', True)), ('work</think>\n\nans', False, ('work', 'ans', True)),
    ('<think>\nwork\n</think>\n\nans', False, ('work', 'ans', True)),
    ('<think>\nwork\n</think>\n\nans', True, ('work', 'ans', True)),
    ('work', True, ('work', '', False)), ('<think>\nwork', False, ('work', '', False)),
    ('ans', False, ('', 'ans', True)),
    ('work</think>', True, ('work', '', True)), ('', True, ('', '', False)), ('', False, ('', '', True)),
    ('a</think>b</think>c', True, ('a', 'b</think>c', True)),
])
def test_split_thinking(text, opened, expected):
    assert split_thinking(text, opened) == expected


@pytest.mark.parametrize('kind', ['hybrid', 'open'])
def test_sampled_text_comes_back_as_the_sampled_ids(kind):
    tokenizer = TOKENIZERS[kind]
    sampled = ('' if kind == 'open' else '<think>\n') + 'work\n</think>\n\nans'
    ids = (*tokenizer.encode(sampled), tokenizer.eos_token_id)
    for content in (sampled, 'work</think>\n\nans'):
        example = encode_turn(tokenizer, [user('q')], assistant(content))
        assert (example.prompt_ids, example.completion_ids) == (prompt_ids(tokenizer, [user('q')]), ids)
        full = (tokenizer.decode(example.prompt_ids) + tokenizer.decode(example.completion_ids)).partition(HEADER)[2]
        assert full == '<think>\nwork\n</think>\n\nans<|im_end|>'


# B14: contents that templates drop or print as None


@pytest.mark.parametrize(('messages', 'reason'), [
    ([], 'at least one message'), (None, 'at least one message'), (['hi'], r'message 0 \(None\): the role'),
    ([user('q'), assistant(None)], r'message 1 \(assistant\).*NoneType'),
    ([user('q'), {'role': 'assistant'}], r'message 1 .*NoneType'),
    ([{'role': 'system', 'content': None}, user('q')], r'message 0 \(system\)'),
    ([user(''), assistant('a')], r'message 0 \(user\).*empty'),
    ([user([]), assistant('a')], r'message 0 \(user\).*empty'),
    ([{'role': 'bot', 'content': 'x'}], r'message 0 \(bot\): the role'),
    ([user([{'type': 'image', 'url': 'u'}])], r'message 0 \(user\): only text parts'),
    ([user(3)], r'message 0 \(user\).*int'),
    ([user([{'type': 'text', 'text': None}])], 'only text parts'), ([user('q'), assistant('a', 3)], r'message 1 .*int'),
    ([user('q'), assistant('a') | {'tool_calls': [{}]}], r'message 1 \(assistant\): tool_calls'),
    ([user('q'), assistant('<think>\nr\n</think>\n\na', 'r')], r'message 1 .*keep one of them'),
    ([user('q')], 'need an assistant turn'), ([assistant('a')], 'another turn before it'),
    ([{'role': 'system', 'content': 's'}, assistant('a')], r'message 0 \(system\): a prompt must end'),
])
def test_messages_that_cannot_be_rendered(messages, reason):
    with pytest.raises(ValueError, match=reason):
        encode_row({'messages': messages}, TOKENIZERS['hybrid'])


def test_text_parts_and_null_padding_are_read():
    tokenizer = TOKENIZERS['hybrid']
    parts = [{'type': 'text', 'text': 'he'}, {'type': 'text', 'text': 'y'}]
    nulls = {'reasoning_content': None, 'tool_calls': None}
    padded, plain = [user(parts) | nulls, assistant('a') | nulls], [user('hey'), assistant('a')]
    assert encode_row({'messages': padded}, tokenizer) == encode_row({'messages': plain}, tokenizer)


# B16, B18: raw rows and empty completions


@pytest.mark.parametrize(('prompt', 'completion'), [
    ('2+2=', '4'), ('end.', '.'), ('end.', '\nx'), ('i', 'n'), ('\n', '\nx'),
    ('e', '\u0301'), ('t', 'he'), ('', 'text')])
def test_raw_seams(prompt, completion):
    tokenizer = tiny_tokenizer('none')
    tokenizer.chat_template = None
    example, = encode_row({'prompt': prompt, 'completion': completion}, tokenizer)
    assert example.prompt_ids == tuple(tokenizer.encode(prompt))
    assert example.completion_ids == (*tokenizer.encode(completion), tokenizer.eos_token_id)
    assert tokenizer.decode(example.completion_ids) == completion + '<|im_end|>'


def test_rows_of_prompt_and_completion():
    tokenizer = TOKENIZERS['hybrid']
    row = {'prompt': 'q', 'completion': 'a', 'reasoning': 'r'}
    expected = encode_row({'messages': [user('q'), assistant('a', 'r')]}, tokenizer)
    assert encode_row(row, tokenizer) == encode_row(row | {'prompt': [user('q')]}, tokenizer) == expected
    inline = {'prompt': 'q', 'completion': '<think>\nr\n</think>\n\na'}
    assert encode_row(inline, tokenizer) == encode_row(inline | {'reasoning': ''}, tokenizer) == expected
    bare = tiny_tokenizer('none')
    bare.chat_template = None
    with pytest.raises(ValueError, match='no chat template'):
        encode_row(row, bare)


@pytest.mark.parametrize('completion', ['', ' \n', '<think>\nwork', '<think>\nwork\n</think>\n\n'])
def test_completions_without_an_answer_are_refused(completion):
    with pytest.raises(ValueError, match='no answer'):
        encode_row({'prompt': 'q', 'completion': completion}, TOKENIZERS['hybrid'])
    with pytest.raises(ValueError, match='empty'):
        encode_raw('q', ' ', TOKENIZERS['none'])


# What the template tells


def test_chat_format_is_read_from_the_template():
    end = (TOKENIZERS['hybrid'].eos_token_id,)
    forms = {kind: chat.chat_format(tokenizer) for kind, tokenizer in TOKENIZERS.items()}
    assert {kind: (f.end_ids, f.think_open, f.think_close, f.switch) for kind, f in forms.items()} == {
        'hybrid': (end, '<think>\n', '\n</think>\n\n', True), 'open': (end, '', '\n</think>\n\n', False),
        'none': (end, '<think>\n', '\n</think>\n\n', False)}
    changed = tiny_tokenizer('hybrid')
    assert chat.chat_format(changed).switch
    changed.chat_template = TOKENIZERS['none'].chat_template.replace('<|im_end|>', '<|endoftext|>')
    assert chat.chat_format(changed).end_ids == (changed.pad_token_id,)
    changed.chat_template = TOKENIZERS['none'].chat_template.replace('<|im_end|>', '')
    with pytest.raises(ValueError, match='no assistant turn with a control token'):
        chat.chat_format(changed)


def test_stop_ids_are_the_union():
    tokenizer = TOKENIZERS['hybrid']
    assert chat.stop_ids(tokenizer, None) == (265,)
    assert chat.stop_ids(tokenizer, {'eos_token_id': [265, 263]}) == (263, 265)
    assert chat.stop_ids(tokenizer, {'eos_token_id': 7}) == (7, 265)
    base = tiny_tokenizer('hybrid')
    base.eos_token = '<|endoftext|>'
    assert chat.stop_ids(base) == (263, 265)


def test_valid_ids():
    assert chat.num_valid_ids(TOKENIZERS['hybrid']) == 270
    assert max(TOKENIZERS['hybrid'].get_vocab().values()) == 269


def test_tiny_tokenizer_survives_a_save(tmp_path):
    for kind, tokenizer in TOKENIZERS.items():
        tokenizer.save_pretrained(tmp_path / kind)
        again = transformers.AutoTokenizer.from_pretrained(tmp_path / kind)
        assert encode_row({'messages': CONVERSATION}, again) == encode_row({'messages': CONVERSATION}, tokenizer)
        assert (again.eos_token, again.pad_token, len(again)) == ('<|im_end|>', '<|endoftext|>', 270)


# The real tokenizer and template


@pytest.mark.real
def test_qwen3(qwen):
    end, newline = qwen.convert_tokens_to_ids('<|im_end|>'), qwen.encode('\n')[0]
    example = encode_row({'messages': CONVERSATION}, qwen, 'last')[0]
    assert (*example.prompt_ids, *example.completion_ids, newline) == rendered(qwen, CONVERSATION)
    example = encode_row({'prompt': 'q', 'completion': 'a'}, qwen)[0]
    assert (*example.prompt_ids, *example.completion_ids, newline) == rendered(qwen, [user('q'), assistant('a')])
    assert qwen.decode(example.completion_ids) == 'a<|im_end|>'
    assert chat.stop_ids(qwen, {'eos_token_id': [end, qwen.pad_token_id]}) == tuple(sorted((end, qwen.pad_token_id)))
    assert chat.num_valid_ids(qwen) == len(qwen)
    typed = ''.join(token.content for token in qwen.added_tokens_decoder.values())
    ids, plain = prompt_ids(qwen, [user(typed)]), prompt_ids(qwen, [user('q')])
    added = qwen.added_tokens_decoder
    assert [i for i in ids if i in added] == [i for i in plain if i in added]
    assert typed in qwen.decode(ids)


@pytest.mark.real
def test_tiny_template_behaves_as_qwen3s(qwen):
    tokenizer = TOKENIZERS['hybrid']
    tool = [user('q'), assistant('a', 'r'), user('<tool_response>x</tool_response>'), assistant('r</think>\n\nb')]
    for messages in (CONVERSATION, tool):
        for options in ({}, {'add_generation_prompt': True}, {'add_generation_prompt': True, 'enable_thinking': False}):
            ours, theirs = (t.apply_chat_template(messages, tokenize=False, **options) for t in (tokenizer, qwen))
            assert ours == theirs
