"""What a cache does to the answers: perplexity, fidelity to the full cache, retrieval, weights in fewer bits."""
