"""Sizes of the rollout engine, which fix every shape it compiles, and the counters it keeps."""

import dataclasses
from collections.abc import Sequence

from qedjax.model.config import ModelConfig
from qedjax.rollout.requests import Limits


@dataclasses.dataclass(unsafe_hash=True)
class EngineConfig:
    """Sizes of the engine; all of them fix shapes. Counts are over all data shards of the mesh, which must divide them.

    Attributes:
      slots: requests decoded at a time.
      staged: requests held ready, prompt in the cache, to take a row inside the loop as soon as one ends.
      max_length: positions of prompt and completion together; 0 is the model's max_positions.
      cache_tokens: positions that the cache holds; 0 is enough for all slots and staged requests at max_length.
      page_size: positions a page.
      steps: decode steps a call: more cost less host time, fewer stream and react sooner.
      prefill_tokens: positions a prefill call.
      prefill_rows: prompts a prefill call may take, most first; the more, the shorter they may be.
      max_stop_ids, max_bias: places a request has for stop ids and logit biases.
      top_logprobs: most likely ids reported beside each id.
      entropy: whether the entropy of each distribution is reported.
    """

    slots: int = 16
    staged: int = 16
    max_length: int = 0
    cache_tokens: int = 0
    page_size: int = 64
    steps: int = 16
    prefill_tokens: int = 1024
    prefill_rows: tuple[int, ...] = (16, 4, 1)
    max_stop_ids: int = 8
    max_bias: int = 8
    top_logprobs: int = 0
    entropy: bool = False


@dataclasses.dataclass
class Stats:
    """Counters since the engine was made; seconds are of the host.

    Attributes:
      tokens: ids drawn.
      row_steps, slot_steps: rows that drew an id, and rows that were computed.
      chunks: decode calls.
      prefill_tokens, prefill_positions: prompt ids prefilled, and positions computed for them.
      preemptions: requests that had to give their pages back and start again.
      compilations: programs compiled since warm-up, by whatever in this process.
      waited: seconds in decode calls and in waiting for what they drew.
      worked: all other seconds inside step.
    """

    tokens: int = 0
    row_steps: int = 0
    slot_steps: int = 0
    chunks: int = 0
    prefill_tokens: int = 0
    prefill_positions: int = 0
    preemptions: int = 0
    compilations: int = 0
    waited: float = 0.0
    worked: float = 0.0


def table_width(config: EngineConfig, cfg: ModelConfig) -> int:
    """Pages that a request may come to hold."""
    return -(-(config.max_length or cfg.max_positions) // config.page_size)


def pages_a_shard(config: EngineConfig, cfg: ModelConfig, shards: int) -> int:
    """Pages of the cache on each shard: one more than asked for, because a prompt's last page exists twice while it is shared."""
    if config.cache_tokens:
        return 1 + -(-config.cache_tokens // (config.page_size * shards))
    return 1 + (config.slots + config.staged) // shards * table_width(config, cfg)


def limits_of(config: EngineConfig, cfg: ModelConfig, num_valid: int, shards: int) -> Limits:
    """What requests an engine of these sizes takes. Raises ValueError for more decodable ids than the model has rows."""
    if not 0 < num_valid <= cfg.vocab_size:
        raise ValueError(f'the tokenizer has {num_valid} ids, but the model has only {cfg.vocab_size} rows')
    if config.top_logprobs > num_valid:
        raise ValueError(f'engine.top_logprobs={config.top_logprobs} is more than the {num_valid} ids of the tokenizer')
    cached = (pages_a_shard(config, cfg, shards) - 1) * config.page_size
    return Limits(config.max_length or cfg.max_positions, num_valid, config.max_stop_ids, config.max_bias, cached)


def validate(config: EngineConfig, shards: int, cfg: ModelConfig) -> None:
    """Raises ValueError, in one sentence, for sizes that do not fit each other, the mesh or the model."""
    for name in ('slots', 'page_size', 'steps', 'prefill_tokens', 'max_stop_ids', 'max_bias'):
        if getattr(config, name) < 1:
            raise ValueError(f'engine.{name} must be at least 1, not {getattr(config, name)}')
    for name in ('staged', 'cache_tokens', 'max_length', 'top_logprobs'):
        if getattr(config, name) < 0:
            raise ValueError(f'engine.{name} must not be negative, but is {getattr(config, name)}')
    if config.slots % shards or config.staged % shards:
        raise ValueError(f'engine.slots={config.slots} and engine.staged={config.staged} must be multiples of the {shards} data shards')
    if config.max_length > cfg.max_positions:
        raise ValueError(f'engine.max_length={config.max_length} is more than the {cfg.max_positions} positions of the model')
    if config.prefill_rows != tuple(sorted(config.prefill_rows, reverse=True)) or config.prefill_rows[-1:] != (1,):
        raise ValueError(f'engine.prefill_rows={config.prefill_rows} must fall and end with 1')
    if any(config.prefill_tokens % rows for rows in config.prefill_rows):
        raise ValueError(f'engine.prefill_tokens={config.prefill_tokens} must be a multiple of every one of '
                         f'prefill_rows={config.prefill_rows}')


def prefill_shapes(config: EngineConfig) -> list[tuple[int, int]]:
    """(rows a shard, length) of every prefill program; the longer the rows, the fewer."""
    choices = config.prefill_rows
    return [(rows, config.prefill_tokens // most) for most in choices for rows in sorted(choices) if rows <= most]


def prefill_shape(config: EngineConfig, left: Sequence[int], shards: int) -> tuple[int, int]:
    """The shape for prompts that have `left` ids to go, first come first: just long enough for the first, with rows for all if it can."""
    shapes = prefill_shapes(config)
    length = next((length for _, length in shapes if length >= left[0]), config.prefill_tokens)
    rows = [rows for rows, other in shapes if other == length]
    return next((r for r in rows if r * shards >= len(left)), rows[-1]), length
