"""The decoder: configuration, rotary positions, attention backends, KV cache and the transformer itself."""
