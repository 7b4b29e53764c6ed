"""transformers as a peer of `bench.py`: its caches, in float32, eagerly or compiled."""

import importlib.metadata
import time
from pathlib import Path

NEEDS = ("torch", "transformers")
VARIANTS = ("DynamicCache", "StaticCache, compiled", "QuantizedCache, 4 bits")


class Variant:
    """A model in float32 behind one of transformers' caches."""

    def __init__(self, variant: str, model: Path, threads: int):
        import torch  # pyright: ignore
        import transformers  # pyright: ignore

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self.torch, self.transformers, self.variant = torch, transformers, variant
        named = {"gguf_file": model.name} if model.is_file() else {}
        folder = model.parent if model.is_file() else model
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **named).eval()
        self.step = self.model.forward
        if variant.endswith("compiled"):
            self.step = torch.compile(self.model.forward, fullgraph=True)
        versions = [f"{name} {importlib.metadata.version(name)}" for name in self.libraries]
        self.about = {
            "peer": ", ".join(versions),
            "weights": "float32",
            "weight_bytes": sum(parameter.nbytes for parameter in self.model.parameters()),
            "kv": "int4" if variant.endswith("bits") else "f32",
        }

    libraries = NEEDS

    def prepare(self, batch: int, context: int, room: int) -> None:
        """Prompts, and a part of them and three steps to warm up; a step that is compiled, is compiled here."""
        self.room = room
        self.prompts = self.torch.randint(0, self.model.config.vocab_size, (batch, context))
        prompts, self.prompts = self.prompts, self.prompts[:, :64]
        self.prefill()
        self.decode(3)
        self.prompts = prompts

    def prefill(self) -> float:
        """Seconds from the prompts to each row's first token."""
        self.cache = self.empty()
        start = time.perf_counter()
        self.read()
        return time.perf_counter() - start

    def read(self) -> None:
        """Put the prompts into the empty cache."""
        out = self.model(self.prompts, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.token, self.position = out.logits[:, -1:].argmax(-1), self.prompts.shape[1]

    def decode(self, steps: int) -> list[float]:
        """Seconds of each greedy step, going on where the last ended."""
        seconds = []
        for _ in range(steps):
            start = time.perf_counter()
            # Said, not counted from the cache: a pruned one is shorter than what it has read.
            positions = self.torch.full_like(self.token, self.position)
            out = self.step(self.token, past_key_values=self.cache, position_ids=positions, use_cache=True)
            self.token = out.logits[:, -1:].argmax(-1)
            self.position += 1
            seconds.append(time.perf_counter() - start)
        return seconds

    def empty(self):
        """A cache as the variant says."""
        config = self.model.config
        if self.variant.startswith("Static"):
            return self.transformers.StaticCache(config=config, max_cache_len=self.room)
        if self.variant.startswith("Quantized"):
            return self.transformers.QuantizedCache("quanto", config, nbits=4)
        return self.transformers.DynamicCache(config=config)

    def kv_bytes(self) -> int | None:
        """Bytes of keys and values per row; None where a cache does not say."""
        if self.variant.startswith("Quantized"):
            return None
        total = sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers)
        return total // len(self.token)
