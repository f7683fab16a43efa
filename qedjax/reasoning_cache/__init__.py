"""Think, summarise, think again from the summary: decoding at constant context, and states to train from."""
