"""Write golden_tokens.json: a small SentencePiece model and what the `sentencepiece` library makes of texts. Run by hand where it is installed:

python tests/make_golden_tokens.py TEXT              train on a file of text and write the file
python tests/make_golden_tokens.py TEXT 100000       compare so many random and real texts with ours: of this model, of a larger one, and of tekken
"""

import json
import random
import sys
import tempfile
from pathlib import Path

import sentencepiece  # pyright: ignore
import tiktoken
from gguf import TokenType
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from kvcascade.model import tokenizer
from kvcascade.model.vocabulary import BYTES, TEKKEN, FileTokenizer

FILE = Path(__file__).with_name("golden_tokens.json")
DEFINED = ["<think>", "▁▁▁", "café"]
ALPHABET = [
    *"aabcdeettshing   ..,'\"0123\n\n\t\r", "  ", "    ", "the", " the", "ing", "<0x41>", "<s>", "</s>", "<unk>", *DEFINED[::2], "   ", "é", "ñ", "ł",
    "ß", "Ж", "中", "ひ", "한", "👩‍👩‍👧", "\x00", "\x7f", "\u00a0", "\u3000", "\u200b", "e\u0301", "ﬁ", "Ⅷ", "½", "\U0010ffff", "aaaa", "abab",
]  # fmt: skip


def trained(text: Path, vocab: int, folder: Path) -> sentencepiece.SentencePieceProcessor:
    """A BPE with byte fallback as Llama 2's: no normalisation, spaces kept, one put in front."""
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "m"), model_type="bpe", vocab_size=vocab, byte_fallback=True, character_coverage=0.995,
        normalization_rule_name="identity", remove_extra_whitespaces=False, user_defined_symbols=DEFINED, split_digits=True,
        allow_whitespace_only_pieces=True, minloglevel=2,
    )  # fmt: skip
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "m.model"))


def fields(model: sentencepiece.SentencePieceProcessor) -> dict:
    """The model as a GGUF's metadata have it."""
    kinds = []
    for i in range(len(model)):
        control, unknown, byte = model.is_control(i), model.is_unknown(i), model.is_byte(i)
        defined = model.id_to_piece(i) in DEFINED
        kind = TokenType.CONTROL if control else TokenType.UNKNOWN if unknown else TokenType.BYTE if byte else None
        kinds.append(int(kind or (TokenType.USER_DEFINED if defined else TokenType.NORMAL)))
    return {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": [model.id_to_piece(i) for i in range(len(model))],
        "tokenizer.ggml.scores": [model.get_score(i) for i in range(len(model))], "tokenizer.ggml.token_type": kinds,
    }  # fmt: skip


def random_text(rng: random.Random, corpus: str) -> str:
    """Letters and what is hard about them, characters of any kind, or a part of the corpus."""
    kind, length = rng.randrange(4), rng.randrange(1, 60)
    if kind == 0:
        return "".join(rng.choice(ALPHABET) for _ in range(length))
    if kind == 1:
        characters = [
            chr(rng.choice([rng.randrange(0x80), rng.randrange(0x3000), rng.randrange(0x110000)]))
            for _ in range(length)
        ]
        return "".join(each for each in characters if not "\ud800" <= each <= "\udfff")
    start = rng.randrange(len(corpus) - 400)
    part = corpus[start : start + rng.randrange(1, 400)]
    return part if kind == 2 else part[:length] + rng.choice(ALPHABET) + part[length:]


def tekken(corpus: str) -> tuple[FileTokenizer, tiktoken.Encoding]:
    """A byte-level BPE with tekken's way of cutting words: ours, and tiktoken's with the same ranks."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(TEKKEN), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    ])  # fmt: skip
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        [corpus], trainers.BpeTrainer(vocab_size=4000, initial_alphabet=alphabet, show_progress=False)
    )
    model = json.loads(made.to_str())["model"]
    names = sorted(model["vocab"], key=model["vocab"].get)
    table = {"model": "gpt2", "pre": "tekken", "tokens": names, "merges": [" ".join(pair) for pair in model["merges"]]}
    ranks = {bytes(BYTES[character] for character in name): rank for rank, name in enumerate(names)}
    ours = tokenizer.from_gguf({f"tokenizer.ggml.{key}": value for key, value in table.items()}, "tekken")
    return ours, tiktoken.Encoding("tekken", pat_str=TEKKEN, mergeable_ranks=ranks, special_tokens={})


def compare(name: str, ours: FileTokenizer, theirs, corpus: str, count: int) -> None:
    rng, wrong, tokens, lossy = random.Random(name), [], 0, 0
    for _ in range(count):
        text = random_text(rng, corpus)
        found, wanted = ours.encode(text), theirs(text)
        tokens += len(wanted)
        if found != wanted:
            wrong.append((text, found, wanted))
        same = text.replace("▁", " ") if name.startswith("llama") else text  # SentencePiece takes this for a space
        lossy += ours.decode_bytes(found) != same.encode()
    print(f"{name}: {count - len(wrong)} of {count} texts equal, {tokens} tokens; {lossy} texts do not come back")
    for text, found, wanted in sorted(wrong, key=lambda each: len(each[0]))[:3]:
        print(repr(text), [ours.text_of(t) for t in found], [ours.text_of(t) for t in wanted], sep="\n  ")


text, *count = sys.argv[1:]
corpus = Path(text).read_text("utf-8")
with tempfile.TemporaryDirectory() as folder:
    small = trained(Path(text), 600, Path(folder))
    if count:
        for vocab in (600, 8000):
            model = trained(Path(text), vocab, Path(folder))
            compare(
                f"llama, {vocab} tokens", tokenizer.from_gguf(fields(model), "llama"), model.encode, corpus, int(*count)
            )
        ours, theirs = tekken(corpus)
        compare("tekken, 4000 tokens", ours, theirs.encode_ordinary, corpus, int(*count))
        sys.exit()
    rng = random.Random(0)
    cases = [[text, small.encode(text)] for text in ("", " ", "  ", *(random_text(rng, corpus) for _ in range(200)))]
    FILE.write_text(json.dumps({"fields": fields(small), "texts": cases}, ensure_ascii=False).replace("], [", "],\n["))
