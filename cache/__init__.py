"""A KV cache as a cascade of tiers: what one tier evicts, the next takes in; the last one forgets."""
