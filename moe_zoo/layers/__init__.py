"""Plain transformer parts: attention, norms, rotary positions, embeddings, dense feed-forward."""
