"""transformers as a peer of `bench.py`: its caches, eagerly or compiled, in float32 or bfloat16."""

import importlib.metadata
import inspect
import itertools
import time
from pathlib import Path
from typing import Any

NEEDS = ("torch", "transformers")
VARIANTS = ("DynamicCache", "DynamicCache, bfloat16", "StaticCache, compiled", "QuantizedCache, 4 bits")


class Variant:
    """A model behind one of transformers' caches."""

    libraries, loop = NEEDS, "model.generate, greedy, without a streamer"

    def __init__(self, variant: str, model: Path, threads: int):
        import torch  # pyright: ignore
        import transformers  # pyright: ignore

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        transformers.logging.set_verbosity_error()
        self.torch, self.transformers, self.variant = torch, transformers, variant
        named = {"gguf_file": model.name} if model.is_file() else {}
        folder = model.parent if model.is_file() else model
        weights = "bfloat16" if variant.endswith("bfloat16") else "float32"
        dtype = getattr(torch, weights)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **named).eval()
        newer = "cache" in inspect.signature(self.model.forward).parameters
        self.named = "cache" if newer else "past_key_values"  # what the model takes a cache as
        self.step, self.settings = self.model, {}
        self.cache: Any = None
        if variant.endswith("compiled"):
            compiled = transformers.CompileConfig(fullgraph=True, mode="default")
            compiled._compile_all_devices = True  # else on a CPU it is not
            self.step, self.settings = self.model.get_compiled_call(compiled), {"compile_config": compiled}
        versions = [f"{name} {importlib.metadata.version(name)}" for name in self.libraries]
        self.about = {
            "peer": ", ".join(versions),
            "weights": weights,
            "weight_bytes": sum(parameter.nbytes for parameter in self.model.parameters()),
            "kv": "int4" if variant.endswith("bits") else "bf16" if weights == "bfloat16" else "f32",
            "loop": self.loop,
        }

    def prepare(self, prompts: list[list[int]], room: int) -> None:
        """Warm up with the whole prompts and some steps of both kinds; what is compiled, is compiled here."""
        self.room, self.prompts = room, self.torch.tensor(prompts)
        self.prefill()
        for loop in (True, False, True, False):
            self.decode(2, loop)

    def prefill(self) -> float:
        """Seconds from the prompts to each row's first token."""
        self.cache = None  # two would be held otherwise
        self.cache = self.empty()
        start = time.perf_counter()
        self.read()
        return time.perf_counter() - start

    def read(self) -> None:
        """Put the prompts into the empty cache."""
        out = self.model(self.prompts, **{self.named: self.cache}, use_cache=True, logits_to_keep=1)
        self.token, self.position = out.logits[:, -1:].argmax(-1), self.prompts.shape[1]

    def decode(self, steps: int, loop: bool) -> list[float]:
        """Seconds of each greedy step, going on where the last ended, in the loop of `model.generate` or one by one."""
        if loop:
            return self.generated(steps)
        seconds = []
        for _ in range(steps):
            start = time.perf_counter()
            # Said, not counted from the cache: a pruned one is shorter than what it has read.
            positions = self.torch.full_like(self.token, self.position)
            out = self.step(self.token, **{self.named: self.cache}, position_ids=positions, use_cache=True)
            self.token = out.logits[:, -1:].argmax(-1)
            self.token.tolist()
            self.position += 1
            seconds.append(time.perf_counter() - start)
        return seconds

    def generated(self, steps: int) -> list[float]:
        """Seconds between the tokens that `model.generate` draws; the first one is counted from the call."""
        torch, rows = self.torch, len(self.token)
        never, times = torch.zeros(rows, dtype=torch.bool), [time.perf_counter()]

        def stamp(tokens, scores, **more):
            times.append(time.perf_counter())
            return never

        # As many tokens as the cache holds, and the newest: generate looks at that one alone, and a pruned cache holds fewer than it has read.
        held = torch.ones((rows, int(self.cache.get_seq_length())), dtype=torch.long)
        tokens = torch.cat([held, self.token], -1)
        drawn = self.model.generate(
            tokens, attention_mask=torch.ones_like(tokens), position_ids=torch.full_like(self.token, self.position), **{self.named: self.cache},
            max_new_tokens=steps, min_new_tokens=steps, do_sample=False, stopping_criteria=[stamp], **self.settings,
        )  # fmt: skip
        if drawn.shape[1] != tokens.shape[1] + steps:
            raise ValueError(f"generate drew {drawn.shape[1] - tokens.shape[1]} tokens and not {steps}")
        self.token = drawn[:, -1:].clone(memory_format=torch.contiguous_format)  # other strides are compiled anew
        self.position += steps
        return [after - before for before, after in itertools.pairwise(times)]

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
