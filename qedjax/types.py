"""Data contracts shared by every layer. Producers and consumers of these never import each other.

Shape letters, here and everywhere: B batch rows, T positions of a row, D embed, N heads, K kv heads, H head_dim, F mlp, V vocab, L layers.
"""

import dataclasses
from typing import TypedDict

import jax


class Message(TypedDict, total=False):
    """One chat turn. `content` is text; `reasoning_content` (assistant only) is the text of its think block."""

    role: str
    content: str
    reasoning_content: str


@dataclasses.dataclass(frozen=True)
class Example:
    """One tokenised training document: the ids that the sampler would have been given, then the ids it should have produced.

    Attributes:
      prompt_ids: ids before the first trained token; equal to the inference prompt, token for token.
      completion_ids: trained ids, the end-of-turn id included.
    """

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainBatch:
    """Packed rows. Every field is [B, T]; what a position predicts is written beside it, so nothing is shifted on device.

    Attributes:
      tokens: int32 input ids.
      targets: int32 id that each position predicts (the next token of the same document; 0 where there is none).
      weights: float32 loss weight of that prediction; 0 on prompts, on last tokens and on padding.
      positions: int32 position inside the document, from 0.
      segment_ids: int32 document number inside the row, from 1; 0 is padding. Attention never crosses segments.
    """

    tokens: jax.Array
    targets: jax.Array
    weights: jax.Array
    positions: jax.Array
    segment_ids: jax.Array


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How to sample one request.

    Attributes:
      temperature: 0 is greedy; otherwise logits are divided by it before the softmax.
      max_tokens: most ids to produce, the stop id included.
      seed: the stream depends on (seed, sample index, position) and on nothing else in the batch.
      stop_ids: ids that end the completion; the one sampled is kept as its last id.
    """

    temperature: float = 1.0
    max_tokens: int = 256
    seed: int = 0
    stop_ids: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Completion:
    """What a language model returned for one prompt.

    Attributes:
      text: decoded `ids` without the stop token.
      ids: the sampled ids themselves.
      logprobs: of each sampled id under log-softmax(logits / temperature) over the decodable vocabulary (temperature 1 if greedy).
      finish_reason: 'stop' (a stop id was sampled), 'length' (budget spent), 'error' (non-finite logits).
    """

    text: str
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str
