"""Sampling from the decoder."""
