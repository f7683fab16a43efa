"""Conversations to token ids: each assistant turn becomes the exact inference prompt and the ids that must follow it.

A chat template may rewrite history (Qwen3 drops old think blocks): a render need not be a prefix of a longer one, so
a mask taken from prefixes shifts. Here the template writes prompts only; completions are built from its pieces.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from qedjax.types import Completion, Example, Message

RawMessages = Sequence[Mapping[str, Any]]  # as they come from a file
ROLES = ('system', 'user', 'assistant', 'tool')
OPEN, CLOSE = '<think>', '</think>'
_TOOL_RESPONSE = re.compile(r'(<tool_response>)(.*)(</tool_response>)', re.DOTALL)
_PRIVATE = [chr(code) for code in range(0xE000, 0xF900)]  # Unicode's private use area: no text means anything by these


@dataclasses.dataclass(frozen=True)
class ChatFormat:
    """The pieces of a tokenizer's chat template.

    Attributes:
      end_ids: what ends an assistant turn, without the whitespace after it, e.g. (<|im_end|>,).
      think_open: what the model writes to begin thinking; empty if the generation prompt has begun already.
      think_close: what stands between reasoning and answer.
      switch: whether enable_thinking=False makes another generation prompt.
      control: matches the control tokens' texts.
    """

    end_ids: tuple[int, ...]
    think_open: str
    think_close: str
    switch: bool
    control: re.Pattern


class Thought(NamedTuple):
    """A generated text in two; `closed` is False where it ended inside its think block."""

    reasoning: str
    answer: str
    closed: bool


def chat_format(tokenizer: PreTrainedTokenizerBase) -> ChatFormat:
    """The pieces of the tokenizer's template, found by rendering probes. Raises ValueError if it has no usable one."""
    if not tokenizer.chat_template:
        raise ValueError(f'{tokenizer.name_or_path}: has no chat template; use rows of prompt and completion text')
    return _chat_format(tokenizer, str(tokenizer.chat_template))


@functools.lru_cache(maxsize=16)
def _chat_format(tokenizer: PreTrainedTokenizerBase, template: str) -> ChatFormat:
    control = _control(tokenizer)
    answer, reasoning = _PRIVATE[1], _PRIVATE[2]
    query: Message = {'role': 'user', 'content': _PRIVATE[0]}
    reply: Message = {'role': 'assistant', 'content': answer}
    plain = _render([query, reply], tokenizer, prompt=False)
    thoughtful = _render([query, {**reply, 'reasoning_content': reasoning}], tokenizer, prompt=False)
    on, off = (_render([query], tokenizer, prompt=True, thinking=thinking) for thinking in (True, False))
    ending = plain.partition(answer)[2]
    end = control.search(ending)
    if not end:
        raise ValueError(f'{tokenizer.name_or_path}: its chat template ends no assistant turn with a control token, '
                         'so a model could not learn to stop; correct the template')
    head, rendered, tail = thoughtful.partition(reasoning)
    if rendered and head.startswith(on):
        think_open, think_close = head.removeprefix(on), tail.partition(answer)[0]
    else:
        think_open, think_close = '' if on.rstrip().endswith(OPEN) else OPEN + '\n', f'\n{CLOSE}\n\n'
    return ChatFormat(tuple(_encode(ending[: end.end()], tokenizer)), think_open, think_close, on != off, control)


def _control(tokenizer: PreTrainedTokenizerBase) -> re.Pattern:
    """Special tokens and added tokens that look like <markup>; added words and runs of spaces are text."""
    added = tokenizer.added_tokens_decoder.values()
    texts = {token.content for token in added if token.special or re.fullmatch(r'<\S+>', token.content)}
    return re.compile('|'.join(map(re.escape, sorted(texts, key=len, reverse=True))) or r'(?!)')


def _render(messages: list[Message], tokenizer, prompt: bool, thinking: bool | None = None) -> str:
    options = {} if thinking is None else {'enable_thinking': thinking}
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, **options)


def _encode(text: str, tokenizer, mark: str | None = None) -> list[int]:
    """Ids of the pieces between marks. Without special tokens around them: a template writes its own."""
    pieces = text.split(mark) if mark else [text]
    return [token for piece in pieces for token in tokenizer.encode(piece, add_special_tokens=False, verbose=False)]


def _unused(messages: list[Message]) -> list[str]:
    used = {character for message in messages for text in message.values() for character in str(text)}
    return [character for character in _PRIVATE if character not in used]


def _cut(text: str, control: re.Pattern, mark: str) -> str:
    """Puts the mark after the first character of each control token: encoded in pieces, it can only be text."""
    return re.sub(f'(?=(?:{control.pattern}))(.)', lambda match: match[1] + mark, text)


def _cut_message(message: Message, control: re.Pattern, mark: str) -> Message:
    """Cuts every text; a user turn that is wholly a tool response keeps its two tags: the template looks for them."""
    block = _TOOL_RESPONSE.fullmatch(message['content']) if message['role'] == 'user' else None
    if block:
        return {**message, 'content': block[1] + _cut(block[2], control, mark) + block[3]}
    cut: Message = {'role': message['role'], 'content': _cut(message['content'], control, mark)}
    if 'reasoning_content' in message:
        cut['reasoning_content'] = _cut(message['reasoning_content'], control, mark)
    return cut


def split_thinking(text: str, opened: bool) -> Thought:
    """Splits generated text at the first </think>; `opened` says that the prompt had begun the think block."""
    tagged = text.lstrip().startswith(OPEN)
    body = text.lstrip().removeprefix(OPEN) if tagged else text
    reasoning, close, answer = body.partition(CLOSE)
    if close:
        return Thought(reasoning.strip('\n'), answer.lstrip('\n'), True)
    return Thought(body.strip('\n'), '', False) if tagged or opened else Thought('', text, True)


def thought_of(tokenizer: Any, completion: Completion) -> Thought:
    """The same for a completion, whose prompt tells whether it had begun the think block."""
    return split_thinking(completion.text, tokenizer.decode(completion.prompt_ids[-8:]).rstrip().endswith(OPEN))


def normalize_messages(messages: RawMessages) -> list[Message]:
    """Messages with text contents, and the assistant's think blocks split off into reasoning_content if that is blank.

    Raises:
      ValueError: naming index and role, on what a template would drop, print as 'None' or fail on.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise ValueError('messages must be a list of at least one message')
    return [_normalize(message, index) for index, message in enumerate(messages)]


def _normalize(message: Mapping[str, Any], index: int) -> Message:
    role = message.get('role') if isinstance(message, dict) else None
    where = f'message {index} ({role})'
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(f'{where}: the role must be one of {", ".join(ROLES)}')
    if message.get('tool_calls'):
        raise ValueError(f'{where}: tool_calls are not supported; write the call into the content')
    content, reasoning = message.get('content'), message.get('reasoning_content')
    if isinstance(content, list):
        content = _join(content, where)
    if not isinstance(content, str) or not isinstance(reasoning, str | None):
        raise ValueError(f'{where}: content must be text and reasoning_content text or absent; '
                         f'they are {type(content).__name__} and {type(reasoning).__name__}')
    if role == 'user' and not content.strip():
        raise ValueError(f'{where}: the content is empty')
    if role == 'assistant' and not (reasoning or '').strip():
        reasoning, content, _ = split_thinking(content, opened=False)
    if role == 'assistant' and reasoning and content.lstrip().startswith(OPEN):
        raise ValueError(f'{where}: the content begins with a think block beside the reasoning given; keep one of them')
    turn: Message = {'role': role, 'content': content}
    if reasoning and reasoning.strip():
        turn['reasoning_content'] = reasoning
    return turn


def _join(parts: list, where: str) -> str:
    for part in parts:
        if not isinstance(part, dict) or part.get('type') != 'text' or not isinstance(part.get('text'), str):
            raise ValueError(f'{where}: only text parts are supported')
    return ''.join(part['text'] for part in parts)


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, messages: RawMessages, thinking: bool | None = None
) -> tuple[int, ...]:
    """The ids to sample from: the template's generation prompt, control tokens inside contents kept as text.

    `thinking` sets enable_thinking; None leaves the template's default.

    Raises:
      ValueError: if the messages end with no query, or thinking is False and the template always opens a think block.
    """
    return spliced_ids(tokenizer, messages, {}, thinking)


def placeholders(count: int, text: str) -> list[str]:
    """Characters that `text` does not hold and that mean nothing, to stand for ids in `spliced_ids`."""
    return [character for character in reversed(_PRIVATE) if character not in text][:count]


def spliced_ids(tokenizer: PreTrainedTokenizerBase, messages: RawMessages, values: Mapping[str, Sequence[int]],
                thinking: bool | None = None) -> tuple[int, ...]:
    """As `prompt_ids`, of messages that hold placeholders: each becomes the ids that `values` has for it, whatever their text is.

    The text on both sides of a placeholder is encoded by itself. Raises ValueError as prompt_ids does.
    """
    form, turns = chat_format(tokenizer), normalize_messages(messages)
    last = turns[-1]['role']
    if last not in ('user', 'tool'):
        raise ValueError(f'message {len(turns) - 1} ({last}): a prompt must end with a user or tool message')
    if thinking is False and not form.switch and not form.think_open:
        raise ValueError(f'{tokenizer.name_or_path}: its chat template always opens a think block; give rows with '
                         'reasoning, or use a template that heeds enable_thinking')
    mark = _unused(turns)[0]
    cut = [_cut_message(message, form.control, mark) for message in turns]
    text = _render(cut, tokenizer, prompt=True, thinking=thinking)
    pieces = re.split(f'([{"".join(values)}])', text) if values else [text]
    return tuple(token for piece in pieces for token in (values[piece] if piece in values else _encode(piece, tokenizer, mark)))


def as_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text whose control tokens mean nothing: each is encoded as the characters that it is written with."""
    mark = _unused([{'role': 'user', 'content': text}])[0]
    return _encode(_cut(text, chat_format(tokenizer).control, mark), tokenizer, mark)


def dropped_reasoning(tokenizer: PreTrainedTokenizerBase, messages: RawMessages) -> int:
    """Characters of earlier reasoning that the template leaves out of the prompt made from these messages."""
    turns = normalize_messages(messages)
    thoughts = [message['reasoning_content'] for message in turns if 'reasoning_content' in message]
    signs = dict(zip(_unused(turns), thoughts, strict=False))
    names = iter(signs)
    text = _render([message | {'reasoning_content': next(names)} if 'reasoning_content' in message else message
                    for message in turns], tokenizer, prompt=True)
    return sum(len(thought) for sign, thought in signs.items() if sign not in text)


def encode_turn(tokenizer: PreTrainedTokenizerBase, messages: RawMessages, reply: Mapping[str, Any]) -> Example:
    """The prompt of `messages` in the reply's mode (thinking or not), and the ids that the model must produce after it.

    Raises:
      ValueError: on an empty answer, or one without reasoning under a template that always opens a think block.
    """
    form, (turn,) = chat_format(tokenizer), normalize_messages([reply])
    reasoning, answer = turn.get('reasoning_content', ''), turn['content']
    if not answer.strip():
        raise ValueError('the completion has no answer: nothing to learn, or a thought that was cut')
    prompt = prompt_ids(tokenizer, messages, thinking=bool(reasoning))
    mark = _unused([turn])[0]
    reasoning, answer = (_cut(text, form.control, mark) for text in (reasoning, answer))
    if reasoning:
        text = form.think_open + reasoning.strip('\n') + form.think_close + answer.lstrip('\n')
    else:
        text = answer.lstrip('\n') if form.switch else answer
    return Example(prompt, (*_encode(text, tokenizer, mark), *form.end_ids))


def encode_raw(prompt: str, completion: str, tokenizer: PreTrainedTokenizerBase) -> Example:
    """Plain text without a template, control tokens read as such; the two are encoded apart, and EOS ends it.

    Encoded together, a token could span the seam, and the prompt would not be the one that a sampler is given.
    """
    if not completion.strip():
        raise ValueError('the completion is empty: nothing to learn')
    if tokenizer.eos_token_id is None:
        raise ValueError(f'{tokenizer.name_or_path}: has no EOS token, so a model could not learn to stop; set one')
    completion_ids = (*_encode(completion, tokenizer), tokenizer.eos_token_id)
    return Example(tuple(tokenizer.encode(prompt, verbose=False)), completion_ids)


def encode_row(row: dict, tokenizer: PreTrainedTokenizerBase, turns: str = 'all') -> list[Example]:
    """One example per assistant turn of a `messages` row (turns 'all' or 'last'), or that of a prompt/completion row.

    A text prompt is one user message if the tokenizer has a chat template, and plain text otherwise.

    Raises:
      ValueError: on a row that cannot be trained on, saying why.
    """
    if 'messages' in row:
        messages = normalize_messages(row['messages'])
        replies = [index for index, message in enumerate(messages) if message['role'] == 'assistant']
        if not replies or not replies[0]:
            raise ValueError('messages need an assistant turn, and another turn before it')
        chosen = {'all': replies, 'last': replies[-1:]}[turns]
        return [encode_turn(tokenizer, messages[:index], messages[index]) for index in chosen]
    prompt, reasoning = row['prompt'], row.get('reasoning')
    if not tokenizer.chat_template and isinstance(prompt, str) and not reasoning:
        return [encode_raw(prompt, row['completion'], tokenizer)]
    messages = [{'role': 'user', 'content': prompt}] if isinstance(prompt, str) else prompt
    reply = {'role': 'assistant', 'content': row['completion'], 'reasoning_content': reasoning}
    return [encode_turn(tokenizer, messages, reply)]


def stop_ids(tokenizer: PreTrainedTokenizerBase, generation_config: dict | None = None) -> tuple[int, ...]:
    """Every id that ends a completion: the tokenizer's EOS, the template's end of turn, those of generation_config."""
    listed = (generation_config or {}).get('eos_token_id')
    ids = {*(listed if isinstance(listed, list) else [listed]), tokenizer.eos_token_id}
    if tokenizer.chat_template:
        ids.add(chat_format(tokenizer).end_ids[-1])
    return tuple(sorted(ids - {None}))


def num_valid_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """Ids from 0 that decode to something; a model's vocabulary may be padded beyond them."""
    count = len(tokenizer)
    if set(tokenizer.get_vocab().values()) != set(range(count)):
        raise ValueError(f'{tokenizer.name_or_path}: its ids are not 0 to {count - 1}; a sampler could not bound them')
    return count
