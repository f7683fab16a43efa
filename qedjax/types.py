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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RLBatch(TrainBatch):
    """Packed rows of sampled answers; the extra fields, float32 [B, T] too, are of the prediction made at each position.

    Attributes:
      advantages: of the answer that the predicted id is part of.
      logprobs: of that id when it was sampled.
      references: the same under the reference model; `logprobs` again where there is none.

    `weights` carries the whole normaliser of the loss: what a batch sums to is the loss.
    """

    advantages: jax.Array
    logprobs: jax.Array
    references: jax.Array


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How to sample one request. There are no implicit defaults: nothing is read from a generation config.

    Attributes:
      temperature: 0 is greedy; otherwise logits are divided by it before the softmax.
      max_tokens: most ids to produce, the stop id included; None is what the context leaves.
      seed: in [0, 2^32); the stream depends on (seed, sample, position in the completion) and on nothing else in the batch.
      stop_ids: ids that end the completion; the one sampled is kept as its last id.
      stop: strings that end the completion; text is cut before the first, ids and log-probs are kept up to the id that completed it.
      top_k: choose among the k most likely ids (ties of the k-th included); 0 is off.
      top_p: choose among the fewest most likely ids whose share reaches p (ties of the last included); 1 is off.
      min_p: choose among ids at least min_p times as likely as the most likely one; 0 is off.
      min_tokens: no stop id is chosen before this many ids.
      logit_bias: (id, bias) pairs, added to the logits before the choice.
      sample: index of this request among the samples of one prompt, in [0, 2^31).
      deadline: seconds from submission after which the request ends with what it has; None is never.

    top_k, top_p, min_p, min_tokens and logit_bias bear on the choice alone: log-probs stay those of the whole distribution.
    """

    temperature: float = 1.0
    max_tokens: int | None = 256
    seed: int = 0
    stop_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    min_tokens: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()
    sample: int = 0
    deadline: float | None = None


FAULTS = ('cancelled', 'error', 'deadline')  # finish reasons of a completion that say nothing about its text


@dataclasses.dataclass(frozen=True)
class Completion:
    """What a language model returned for one prompt.

    Attributes:
      text: decoded `ids` without the stop id, cut before a stop string.
      ids: the sampled ids themselves.
      logprobs: of each sampled id under log-softmax(logits / temperature) over the decodable vocabulary (temperature 1 if greedy).
      finish_reason: 'stop' (a stop id or string), 'length' (budget spent), 'deadline', 'cancelled', 'error' (non-finite logits).
      prompt_ids: ids that the completion continues.
      versions: (version of the weights, number of ids) runs that make up `ids`.
      entropies: of the same distributions, in nats, where the endpoint was asked for them.
      top_logprobs: for each id, the most likely (id, log-prob) pairs, where the endpoint was asked for them.
    """

    text: str
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str
    prompt_ids: tuple[int, ...] = ()
    versions: tuple[tuple[int, int], ...] = ()
    entropies: tuple[float, ...] = ()
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] = ()


@dataclasses.dataclass(frozen=True)
class Rollout:
    """One answer to a problem and what it earned.

    Attributes:
      completion: the sampled ids, which are what is trained on.
      answer: its text after thinking ends; '' if that never came.
      reward: in [0, 1]; None if it could not be graded, which is not 0.
      feedback: of the grader, or why there is no grade.
    """

    completion: Completion
    answer: str
    reward: float | None
    feedback: str = ''


@dataclasses.dataclass(frozen=True)
class Group:
    """All answers to one prompt.

    Attributes:
      draw: number of the prompt in the order of the run, which fixes the problem and all seeds.
      problem: its text, for people.
      rollouts: the answers, in the order of their sample index.
      turn, summary: of the state that was answered, with the reasoning cache; turn is None without.
    """

    draw: int
    problem: str
    rollouts: tuple[Rollout, ...]
    turn: int | None = None
    summary: str = ''

    @property
    def oldest_version(self) -> int:
        """Version of the weights that sampled the group's oldest id."""
        return min((version for rollout in self.rollouts for version, _ in rollout.completion.versions), default=0)
