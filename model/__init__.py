"""The GPT, its conversion from one attention shape to another, and generation.

Dimension key, used by names, einsum letters and jaxtyping alike:
`B` batch, `T` tokens of this call, `S` slots, `L` layers, `M` model width, `N` query heads, `K` KV heads, `G` = N/K,
`H` head width, `W` value width, `F` MLP width, `V` vocabulary. Arrays of rank three and up carry the suffix: `q_BTNH`.
"""
