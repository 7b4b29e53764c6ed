"""Write golden_logits.npz: what transformers computes for the models of tiny_models.py. Run by hand where torch and transformers are installed:

python tests/make_golden.py [MODEL …]

Named models alone are made anew, next to those that the file has already.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import tiny_models  # pyright: ignore
import torch  # pyright: ignore
import transformers  # pyright: ignore

FILE = Path(__file__).with_name("golden_logits.npz")
found = dict(np.load(FILE)) if sys.argv[1:] else {}
for name in sys.argv[1:] or tiny_models.CONFIGS:
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        tiny_models.write(name, Path(folder))
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        )
        tokens = torch.tensor(tiny_models.PROMPTS)
        whole = model(tokens).logits.numpy()
        found[name] = whole[:, tiny_models.POSITIONS]
        # Its own cached decode, token by token, must say the same.
        past, steps = None, []
        for t in range(tokens.shape[1]):
            out = model(tokens[:, t : t + 1], past_key_values=past, use_cache=True)
            past = out.past_key_values
            steps.append(out.logits[:, 0].numpy())
        print(name, float(np.abs(np.stack(steps, 1) - whole).max()), float(np.abs(found[name]).max()))
    found[f"{name}/versions"] = np.array([transformers.__version__, torch.__version__])
np.savez_compressed(FILE, **found)
