"""transformers as a peer of `eval/bench.py`, run by a Python that has it: a JSON line in for each round, a JSON line out.

Nothing of kvcascade is imported. Arguments: the model's GGUF file or directory.
"""

import json
import os
import sys
import time
import traceback
from pathlib import Path


def main(path: Path) -> None:
    """Answer [batch, context, steps] with the seconds of a prefill and of each greedy decode step after it."""
    import torch  # pyright: ignore
    import transformers  # pyright: ignore

    torch.set_num_threads(os.cpu_count() or 1)
    name = {"gguf_file": path.name} if path.is_file() else {}
    folder = path.parent if path.is_file() else path
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **name).eval()
    say({"name": f"transformers {transformers.__version__}, torch {torch.__version__}, DynamicCache"})
    for line in sys.stdin:
        batch, context, steps = json.loads(line)
        tokens = torch.randint(0, model.config.vocab_size, (batch, context))
        with torch.no_grad():
            start = time.perf_counter()
            out = model(tokens, use_cache=True, logits_to_keep=1)
            token = out.logits[:, -1:].argmax(-1)
            prefill, seconds = time.perf_counter() - start, []
            for _ in range(steps):
                start = time.perf_counter()
                out = model(token, past_key_values=out.past_key_values, use_cache=True)
                token = out.logits[:, -1:].argmax(-1)
                seconds.append(time.perf_counter() - start)
        say({"prefill": prefill, "steps": seconds})


def say(answer: dict) -> None:
    """Write one line of JSON."""
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except Exception:
        say({"error": traceback.format_exc().strip().splitlines()[-1]})
