"""Attention over tokens and over slots, fused activations: a reference in jnp behind each signature."""
