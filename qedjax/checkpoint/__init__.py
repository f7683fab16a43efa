"""Saving and loading: step checkpoints of a run, and weights from and to Hugging Face folders."""
