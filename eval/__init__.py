"""What a cache costs and what it saves: loss, perplexity, bytes, latency, and the report that shows them."""
