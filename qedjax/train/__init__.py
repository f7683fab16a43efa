"""Training: the chunked LM head, optimizers, the compiled step and the SFT loop."""
