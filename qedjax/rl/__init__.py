"""Reinforcement learning: groups of graded answers in, better weights out."""
