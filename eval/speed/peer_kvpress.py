"""kvpress as a peer of `bench.py`: transformers' cache, pruned after the prompt to as many tokens as a press is to keep."""

import peer_transformers

NEEDS = (*peer_transformers.NEEDS, "kvpress")
KEPT = 128
VARIANTS = (f"StreamingLLMPress to {KEPT}", f"SnapKVPress to {KEPT}", f"KnormPress to {KEPT}")


class Variant(peer_transformers.Variant):
    """A model in float32 whose prompt a press prunes to 128 tokens per head; what is decoded afterwards is all kept."""

    libraries, loop = NEEDS, f"transformers' {peer_transformers.Variant.loop}"

    def read(self) -> None:
        """Put the prompts into the empty cache, each layer pruned as soon as it is there."""
        import kvpress  # pyright: ignore

        context = self.prompts.shape[1]
        press = getattr(kvpress, self.variant.split()[0])(compression_ratio=max(0, 1 - KEPT / context))
        with press(self.model):
            super().read()
