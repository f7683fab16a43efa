"""Sources, chat rendering, packing and the loader; and the synthetic proof family."""
