"""What lm-evaluation-harness is tested on: tiny models with their tokenizers, and the tasks in harness_tasks/."""

import json
from pathlib import Path

import tiny_models
from tokenizers import processors

from kvcascade.model import tokenizer

TASKS = Path(__file__).with_name("harness_tasks")
NAMES = ("tiny_wiki", "tiny_lambada", "tiny_choice", "tiny_sums", "tiny_needle")
CONTEXT = 96  # below the longest text, so that there are windows, and prompts are cut
MODELS = {"plain": False, "bos": True}
"""Whether its tokenizer begins a text with BOS."""
CHAT = """\
{{ bos_token }}{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"""


def write(name: str, folder: Path) -> Path:
    """A tiny Llama as a Hugging Face directory, with a BPE of twelve merges, an end token, BOS and a chat template."""
    tiny_models.write("llama", folder)
    config = tiny_models.CONFIGS["llama"] | {
        "max_position_embeddings": CONTEXT,
        "bos_token_id": 269,
        "eos_token_id": 268,
    }
    (folder / "config.json").write_text(json.dumps(config))
    texts = [file.read_text("utf-8") for file in sorted(TASKS.glob("*.jsonl"))]
    bpe = tokenizer.train_reference(texts, tiny_models.VOCAB - 2)
    bpe.add_special_tokens(["<|end|>", "<|begin|>"])
    if MODELS[name]:
        begin = ("<|begin|>", 269)
        bpe.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[begin])
    bpe.save(str(folder / "tokenizer.json"))
    special = {"eos_token": "<|end|>", "pad_token": "<|end|>"} | ({"bos_token": "<|begin|>"} if MODELS[name] else {})
    said = special | {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHAT}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    return folder
