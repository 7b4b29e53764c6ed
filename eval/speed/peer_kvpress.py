"""kvpress as a peer of `bench.py`, of `parity.py` and of `prompt.py`: transformers' cache, pruned after the prompt to as many tokens as a press is to keep."""

import contextlib
import gc
import re
import time
from pathlib import Path

import peer_transformers

NEEDS = (*peer_transformers.NEEDS, "kvpress")
KEPT = 128
VARIANTS = tuple(
    f"{press} to {KEPT}" for press in ("StreamingLLMPress", "SnapKVPress", "KnormPress", "AdaKVPress(SnapKVPress())")
)


class Variant(peer_transformers.Variant):
    """A model in float32 whose prompt a press prunes to 128 tokens per head; what is decoded afterwards is all kept."""

    libraries, loop = NEEDS, f"transformers' {peer_transformers.Variant.loop}"

    def read(self, kept: int = KEPT) -> None:
        """Put the prompts into the empty cache, each layer pruned as soon as it is there."""
        with self.press(self.variant.split()[0], kept, self.prompts.shape[1])(self.model):
            super().read()

    def press(self, text: str, kept: int, tokens: int):
        """A press as it is written in Python, with its defaults where it is a name, that keeps so many tokens a head of a prompt."""
        import kvpress  # pyright: ignore

        press = eval(text if "(" in text else f"{text}()", {"__builtins__": {}}, vars(kvpress))
        press.compression_ratio = max(0, 1 - kept / tokens)
        return press

    def grown(self, kept: int, prompt: list[int]) -> dict[str, float | None]:
        """Bytes by which this process' peak grew over a prompt that the press prunes to so many tokens a head, those of its cache then, and seconds."""
        status = lambda: Path("/proc/self/status").read_text("utf-8")
        bytes_of = lambda name: 1024 * int(re.findall(rf"^{name}:\s+(\d+) kB", status(), re.MULTILINE)[0])
        self.prepare([prompt[:64]], 64)  # what happens only once is over
        self.cache, self.prompts = self.empty(), self.torch.tensor([prompt])
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5", "utf-8")  # VmHWM starts anew
        before, start = bytes_of("VmHWM"), time.perf_counter()
        self.read(kept)
        seconds = time.perf_counter() - start
        return {
            "kv_bytes": self.kv_bytes(),
            "grown": bytes_of("VmHWM") - before,
            "peak": bytes_of("VmHWM"),
            "prefill_seconds": seconds,
        }

    def scored(self, cases: list[tuple[str, int]], row: list[int], prefix: int, seed: int) -> list[tuple[float, int]]:
        """Mean nats per token after a row's first `prefix`, and tokens that a head holds of those: for each press and number of tokens that it keeps.

        A press is written as in Python, `CriticalKVPress(SnapKVPress())`; with none nothing is pruned. What presses see does not depend on
        what they prune, so the prompt is read once for all.
        """
        self.torch.manual_seed(seed)  # of presses that draw
        eager = [
            "ObservedAttention" in press for press, _ in cases
        ]  # it asks for attention weights, and others refuse them
        found = {}
        for one in sorted(set(eager)):
            self.model.set_attn_implementation("eager" if one else "sdpa")
            mine = [index for index, each in enumerate(eager) if each == one]
            logits, caches = self.pruned([cases[index] for index in mine], row[:prefix])
            self.model.set_attn_implementation("sdpa")
            found |= {at: self.continued(cache, logits, row, prefix) for at, cache in zip(mine, caches, strict=True)}
        return [found[index] for index in range(len(cases))]

    def pruned(self, cases: list[tuple[str, int]], prompt: list[int]):
        """The logits after a prompt, and a cache as each press leaves it by its own hook."""
        empty = lambda: self.transformers.DynamicCache(config=self.model.config)
        presses, caches = [], [empty() for _ in cases]
        for text, kept in cases:
            press = self.press(text, kept, len(prompt)) if text else None
            if press:
                press.post_init_from_model(self.model)
            presses.append(press)

        def hook(module, inputs, named, output):
            layer = named["past_key_values"].layers[module.layer_idx]
            for press, cache in zip(presses, caches, strict=True):
                cache.update(layer.keys, layer.values, module.layer_idx)
                if press:
                    press.forward_hook(module, inputs, {**named, "past_key_values": cache}, output)

        with contextlib.ExitStack() as hooks:
            for layer in self.model.model.layers:
                layer.self_attn.rotary_emb = self.model.model.rotary_emb  # as a press does that is entered
                hooks.callback(layer.self_attn.register_forward_hook(hook, with_kwargs=True).remove)
            tokens = self.torch.tensor([prompt])
            logits = self.model(tokens, past_key_values=empty(), use_cache=True, logits_to_keep=1).logits
        return logits, caches

    def continued(self, cache, logits, row: list[int], prefix: int) -> tuple[float, int]:
        """Mean nats per token of what follows a prompt that left these logits and this cache, and what a head held at first."""
        torch, tokens = self.torch, self.torch.tensor([row])
        held = cache.layers[0].keys.shape[2]
        positions = torch.arange(prefix, len(row) - 1)[
            None
        ]  # said, since a pruned cache is shorter than what it has read
        rest = self.model(tokens[:, prefix:-1], past_key_values=cache, position_ids=positions, use_cache=True).logits
        nats = torch.nn.functional.cross_entropy(torch.cat([logits, rest], 1)[0], tokens[0, prefix:])
        return nats.item(), held
