"""llama.cpp as a peer of `bench.py`, through the low-level binding of llama-cpp-python: all rows of a batch in one call."""

import ctypes
import importlib.metadata
import tempfile
import time
from pathlib import Path
from typing import Any

NEEDS = ("llama_cpp", "numpy")
TYPES = {
    "f32": (0, 0),
    "f16": (1, 1),
    "q4_0": (2, 2),
    "q8_0": (8, 7),
}  # by name: ggml's type, and llama's of a whole file
VARIANTS = {
    "f16 keys": ("", "f16"),
    "q8_0 keys": ("", "q8_0"),
    "q4_0 weights, f16 keys": ("q4_0", "f16"),
    "q8_0 weights, f16 keys": ("q8_0", "f16"),
    "f32 weights, f16 keys": ("f32", "f16"),
}
UBATCH = 512


class Variant:
    """A GGUF file, as it is or with its weights in another format, and a format of keys and values."""

    def __init__(self, variant: str, model: Path, threads: int):
        import llama_cpp  # pyright: ignore

        self.api, self.threads = llama_cpp, threads
        self.quiet = llama_cpp.llama_log_callback(lambda level, text, user: None)
        llama_cpp.llama_log_set(self.quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        weights, self.kv = VARIANTS[variant]
        with tempfile.TemporaryDirectory() as folder:
            if weights:
                model = self._converted(model, Path(folder, "model.gguf"), TYPES[weights][1])
            params = llama_cpp.llama_model_default_params()
            params.use_mmap = False
            self.model = llama_cpp.llama_model_load_from_file(str(model).encode(), params)
        if not self.model:
            raise ValueError(f"llama.cpp cannot load {model}")
        text = ctypes.create_string_buffer(256)
        llama_cpp.llama_model_desc(self.model, text, 256)
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.context: Any = None
        self.batch: Any = None
        self.about = {
            "peer": f"llama-cpp-python {importlib.metadata.version('llama-cpp-python')}",
            "weights": weights or text.value.decode().split(" ", 2)[2],
            "weight_bytes": llama_cpp.llama_model_size(self.model),
            "kv": self.kv,
            "loop": "llama_decode, a token at a time: as alone",
            "built_for": llama_cpp.llama_print_system_info().decode(),
        }

    def prepare(self, prompts: list[list[int]], room: int) -> None:
        """A context with just enough room; the whole prompts and some steps to warm up."""
        api, self.tokens = self.api, prompts
        batch, context = self.rows, self.length = len(prompts), len(prompts[0])
        self._free()
        params = api.llama_context_default_params()
        params.n_seq_max, params.n_ctx = batch, batch * -(-room // 256) * 256
        params.n_batch, params.n_ubatch, params.n_outputs_max = batch * context, UBATCH, batch
        params.n_threads = params.n_threads_batch = self.threads
        params.type_k = params.type_v = TYPES[self.kv][0]
        params.flash_attn_type, params.kv_unified = api.LLAMA_FLASH_ATTN_TYPE_ENABLED, False
        self.context = api.llama_init_from_model(self.model, params)
        if not self.context:
            raise ValueError(f"llama.cpp cannot make a context of {batch} × {room} tokens")
        self.batch = api.llama_batch_init(batch * context, 0, 1)
        self.prefill()
        self.decode(8)

    def prefill(self) -> float:
        """Seconds from the prompts to each row's first token."""
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), False)
        self._fill(self.tokens, 0)
        start = time.perf_counter()
        self._run()
        self.position = self.length
        return time.perf_counter() - start

    def decode(self, steps: int, loop: bool = True) -> list[float]:
        """Seconds of each greedy step, going on where the last ended; its own loop takes them one by one."""
        seconds = []
        for _ in range(steps):
            start = time.perf_counter()
            self._fill([[token] for token in self.next], self.position)
            self._run()
            self.position += 1
            seconds.append(time.perf_counter() - start)
        return seconds

    def kv_bytes(self) -> int:
        """Bytes of the cache's state per row."""
        return self.api.llama_state_seq_get_size(self.context, 0)

    def _converted(self, model: Path, to: Path, kind: int) -> Path:
        params = self.api.llama_model_quantize_default_params()
        params.ftype, params.allow_requantize, params.pure = kind, True, True
        if self.api.llama_model_quantize(str(model).encode(), str(to).encode(), ctypes.byref(params)):
            raise ValueError(f"llama.cpp cannot convert {model}")
        return to

    def _fill(self, rows: list[list[int]], position: int) -> None:
        batch, index = self.batch, 0
        for row, tokens in enumerate(rows):
            for offset, token in enumerate(tokens):
                batch.token[index], batch.pos[index] = token, position + offset
                batch.n_seq_id[index], batch.seq_id[index][0] = 1, row
                batch.logits[index] = offset == len(tokens) - 1
                index += 1
        batch.n_tokens = index

    def _run(self) -> None:
        import numpy as np

        if code := self.api.llama_decode(self.context, self.batch):
            raise RuntimeError(f"llama_decode: {code}")
        logits = np.ctypeslib.as_array(self.api.llama_get_logits(self.context), (self.rows, self.vocab))
        self.next = logits.argmax(-1).tolist()

    def _free(self) -> None:
        if self.context:
            self.api.llama_batch_free(self.batch)
            self.api.llama_free(self.context)
