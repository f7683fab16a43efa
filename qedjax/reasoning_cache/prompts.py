"""The prompts of a chain, the same ones for decoding and for training: a template's text around the very ids that were sampled.

The pieces of text around a sampled part are encoded apart from it, and its ids stand between them as they were drawn. Text is encoded
anew only where no ids could stand: a remote endpoint returns none; another model's belong to another vocabulary; control tokens
(<|im_end|>, </think>) in a part would end the message or its thinking, so that part is spelled out; and where thinking closes in the
middle of an id, the part has no ids of its own. In mode 'append' the parts keep their ids, and what joins them is encoded by itself.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from qedjax import prompts
from qedjax.data.chat import as_text, placeholders, spliced_ids
from qedjax.llm.client import Prompt
from qedjax.reasoning_cache.state import Sampled, State
from qedjax.types import Message

JOIN = '\n\n'  # between the summaries of mode 'append'


@dataclasses.dataclass(unsafe_hash=True)
class PromptsConfig:
    """Names of files in qedjax/prompts.

    Attributes:
      first: of a turn without a summary, with {problem}.
      later: of a turn with one, with {problem} and {summary}.
      summarise: with {problem} and {reasoning}, and perhaps {summary}.
      thinking: enable_thinking of the chat template; None leaves its default.
    """

    first: str = 'prove'
    later: str = 'rc_continue'
    summarise: str = 'rc_summarise'
    thinking: bool | None = None


# Two sets: of proofs, and of data/derivations.py, where a turn is asked the problem and, in a second line, the summary; a summary is asked
# for by a question mark below problem and reasoning. The last spend no token on instructions: a tiny model has none to spare.
RENDERINGS = {'proof': PromptsConfig(), 'derivations': PromptsConfig('bare', 'derivations_continue', 'derivations_summarise')}


def validate(cfg: PromptsConfig) -> None:
    """Raises ValueError for a prompt that does not exist or has not the fields that it needs."""
    for name, needed, allowed in ((cfg.first, {'problem'}, set()), (cfg.later, {'problem', 'summary'}, set()),
                                  (cfg.summarise, {'problem', 'reasoning'}, {'summary'})):
        fields = prompts.fields(name)
        if not needed <= fields <= needed | allowed:
            raise ValueError(f'the prompt {name!r} has the fields {sorted(fields)}, but must have {sorted(needed)}')


def reasoning_prompt(cfg: PromptsConfig, state: State, tokenizer: Any) -> Prompt:
    """What a turn reasons from: ids, or messages where there is no tokenizer."""
    if not any(part.text for part in state.summary):
        return _prompt(cfg.first, cfg, tokenizer, state.problem, {})
    return _prompt(cfg.later, cfg, tokenizer, state.problem, {'summary': state.summary})


def summary_prompt(cfg: PromptsConfig, state: State, reasoning: Sampled, tokenizer: Any) -> Prompt:
    """What a turn is summarised from: ids, or messages where there is no tokenizer."""
    return _prompt(cfg.summarise, cfg, tokenizer, state.problem, {'summary': state.summary, 'reasoning': (reasoning,)})


def _prompt(name: str, cfg: PromptsConfig, tokenizer: Any, problem: str, sampled: Mapping[str, Sequence[Sampled]]) -> Prompt:
    fields = prompts.fields(name) & set(sampled)
    if tokenizer is None:
        texts = {field: JOIN.join(part.text for part in sampled[field]) for field in fields}
        message: Message = {'role': 'user', 'content': prompts.render(name, problem=problem, **texts)}
        return [message]
    signs = dict(zip(sorted(fields), placeholders(len(fields), problem), strict=True))
    text = prompts.render(name, problem=problem, **signs)
    values = {signs[field]: _ids(sampled[field], tokenizer) for field in fields}
    return spliced_ids(tokenizer, [{'role': 'user', 'content': text}], values, cfg.thinking)


def _ids(parts: Sequence[Sampled], tokenizer: Any) -> list[int]:
    ids: list[int] = []
    for number, part in enumerate(parts):
        ids += as_text(tokenizer, JOIN) if number else []
        ids += as_text(tokenizer, part.text) if part.ids is None else part.ids  # None: stored by a chain of a remote model
    return ids
