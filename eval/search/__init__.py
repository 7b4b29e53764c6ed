"""A search for the best cache of so many bytes."""
