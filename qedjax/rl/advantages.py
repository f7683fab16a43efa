"""Advantages of the answers of one group, and shaping of their rewards: pure functions over host arrays."""

from collections.abc import Sequence

import numpy as np

STD_FLOOR = 1e-4  # added to the standard deviation: rewards closer than this count as nearly equal


def mean_centred(rewards: np.ndarray) -> np.ndarray:
    """r_i - mean(r): the reference's default (QED-Nano, arXiv 2604.04898; Dr. GRPO, arXiv 2503.20783)."""
    return rewards - rewards.mean()


def standardised(rewards: np.ndarray) -> np.ndarray:
    """(r_i - mean(r)) / (std(r) + 1e-4) with the sample standard deviation: GRPO (DeepSeekMath, arXiv 2402.03300)."""
    return mean_centred(rewards) / (rewards.std(ddof=1) + STD_FLOOR)


def leave_one_out(rewards: np.ndarray) -> np.ndarray:
    """r_i - mean of the others: RLOO (Ahmadian et al., arXiv 2402.14740)."""
    return mean_centred(rewards) * (len(rewards) / (len(rewards) - 1))


ADVANTAGES = {'mean': mean_centred, 'std': standardised, 'loo': leave_one_out}


def group_advantages(rewards: Sequence[float | None], kind: str = 'mean') -> np.ndarray | None:
    """Advantages [G] of a group, float32; NaN where there is no reward; None if fewer than two answers have one.

    Equal rewards give exactly 0, whatever rounding does to their mean. Raises ValueError for a reward that is not a finite number: what
    could not be graded is None.
    """
    numbers = [_number(reward) for reward in rewards if reward is not None]
    if len(numbers) < 2:
        return None
    graded = np.array(numbers, np.float64)
    values = np.zeros_like(graded) if graded.max() == graded.min() else ADVANTAGES[kind](graded)
    advantages = np.full(len(rewards), np.nan, np.float32)
    advantages[[reward is not None for reward in rewards]] = values
    return advantages


def overlong_penalty(length: int, limit: int, buffer: int) -> float:
    """0 up to limit - buffer tokens, then linearly down to -1 at the limit: soft overlong punishment (DAPO, arXiv 2503.14476)."""
    return -min(max(length - (limit - buffer), 0) / buffer, 1.0) if buffer else 0.0


def _number(reward: float) -> float:
    if isinstance(reward, bool) or not isinstance(reward, (int, float, np.integer, np.floating)) or not np.isfinite(reward):
        raise ValueError(f'a reward is {reward!r}; it must be a finite number, or None for an answer that could not be graded')
    return float(reward)
