"""Tokenisers: bytes, a byte-level BPE trained on the corpus, or GPT-2's, each one a `tiktoken.Encoding`; and those that come with a model."""

import base64
import difflib
import functools
import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tiktoken
import tokenizers
from jaxtyping import Int32
from tokenizers import decoders, models, pre_tokenizers, trainers

from kvcascade.cache.errors import BadInput
from kvcascade.kernels.files import write_whole
from kvcascade.model.vocabulary import BYTES, FileTokenizer
from kvcascade.model.vocabulary import HubTokenizer as HubTokenizer
from kvcascade.model.vocabulary import from_gguf as from_gguf

NAMES = ("bytes", "bpe", "gpt2")

# GPT-4's way of cutting text: a run of spaces leaves its last one to the next word, so indentation is one token.
# Without its case-insensitive group, which the two regex engines that read this line fold differently.
PATTERN = r"'(?:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

log = logging.getLogger("kvcascade")
_say_once = functools.cache(log.warning)


def bytes_encoding() -> tiktoken.Encoding:
    """Return the tokeniser with one token per byte: V = 256, and a token's number is its byte."""
    return tiktoken.Encoding(
        "bytes", pat_str=r"(?s:.)", mergeable_ranks={bytes([byte]): byte for byte in range(256)}, special_tokens={}
    )


def train_bpe(texts: Iterable[str], vocab: int) -> tiktoken.Encoding:
    """Train a byte-level BPE of exactly `vocab` tokens on the texts; the same texts give the same tokeniser.

    Raises BadInput if `vocab` is below 256, one token per byte, or the texts yield fewer tokens than that.
    """
    ranks = {_token(text): rank for text, rank in train_reference(texts, vocab).get_vocab().items()}
    return tiktoken.Encoding(f"bpe-{vocab}", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})


def train_reference(texts: Iterable[str], vocab: int) -> tokenizers.Tokenizer:
    """Train the BPE of `train_bpe` and return it as the `tokenizers` library holds it; both give the same tokens."""
    if vocab < 256:
        raise BadInput(f"a BPE needs a vocabulary of at least 256 tokens, one per byte, not {vocab}")
    reference = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(PATTERN), behavior="isolated")
    to_characters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    reference.pre_tokenizer = pre_tokenizers.Sequence([split, to_characters])
    reference.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, min_frequency=2, initial_alphabet=alphabet, special_tokens=[], show_progress=False
    )
    reference.train_from_iterator(texts, trainer)
    if (size := reference.get_vocab_size()) != vocab:
        raise BadInput(f"the corpus is too small for a BPE of {vocab} tokens: it yields {size}")
    return reference


def make(name: str, texts: Sequence[str], vocab: int, folder: Path | None = None) -> tiktoken.Encoding:
    """Return the tokeniser called `bytes`, `bpe` or `gpt2`; texts and vocab matter only where one is trained.

    A trained one is kept in the folder, if one is given, and found there the next time.
    Where GPT-2's merges can neither be found nor fetched, logs one line and trains a BPE instead.
    Raises BadInput for another name, and as `train_bpe` does.
    """
    if name not in NAMES:
        close = difflib.get_close_matches(name, NAMES, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise BadInput(f"unknown tokenizer {name!r}: choose one of {', '.join(NAMES)}{hint}")
    if name == "bytes":
        return bytes_encoding()
    if name == "gpt2":
        try:
            return tiktoken.get_encoding("gpt2")
        except (OSError, ValueError) as error:  # no network, or a proxy's page in place of the file
            log.warning(
                "GPT-2's tokenizer could not be fetched (%s): a BPE of %d tokens is trained on the corpus instead",
                type(error).__name__,
                vocab,
            )
    if folder is None:
        return train_bpe(texts, vocab)
    path = folder / f"bpe-{vocab}-{content_key(texts, PATTERN)}.json"
    try:
        return load(path)
    except BadInput:  # not there yet, or damaged
        encoding = train_bpe(texts, vocab)
    keep(path, _json(encoding))
    return encoding


def save(encoding: tiktoken.Encoding, path: Path) -> None:
    """Write the tokeniser to a JSON file that `load` reads back; the file appears whole or not at all."""
    write_whole(path, _json(encoding))


def load(path: Path) -> tiktoken.Encoding:
    """Read a tokeniser that `save` wrote; raises BadInput if the file is missing or not what was written."""
    try:
        content = json.loads(path.read_bytes())
        pattern, special = content["pattern"], content["special_tokens"]
        ranks = {base64.b64decode(token, validate=True): rank for token, rank in content["ranks"].items()}
        # Compared before tiktoken sees the ranks: it aborts on some wrong ones instead of raising.
        if content["fingerprint"] != _digest(pattern, ranks, special):
            raise ValueError("its content does not match its fingerprint")
        return tiktoken.Encoding(content["name"], pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    except OSError as error:
        raise BadInput(f"cannot read the tokenizer {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{path} is not a tokenizer, or is damaged: {type(error).__name__}: {error}") from error


type Tokenizer = tiktoken.Encoding | FileTokenizer


def fingerprint(encoding: Tokenizer) -> str:
    """Return 16 hexadecimal digits that differ between tokenisers that differ in pattern, tokens or special tokens."""
    if isinstance(encoding, FileTokenizer):
        return encoding.fingerprint
    return _digest(encoding._pat_str, encoding._mergeable_ranks, encoding._special_tokens)


def special_texts(encoding: Tokenizer) -> frozenset[str]:
    """Return what special tokens are called: text that a template, and nobody else, may write."""
    if isinstance(encoding, FileTokenizer):
        return frozenset(filter(None, map(encoding.text_of, encoding.special_tokens)))
    return frozenset(encoding.special_tokens_set)


def encode_within(encoding: Tokenizer, text: str) -> list[int]:
    """Return the tokens of a text that other text precedes."""
    if isinstance(encoding, FileTokenizer):
        return encoding.encode_within(text)
    return encoding.encode(text, disallowed_special=())


def token_bytes(encoding: Tokenizer) -> Int32[np.ndarray, " V"]:
    """Return how many bytes of UTF-8 each token stands for; 0 for special tokens and unused numbers."""
    if isinstance(encoding, FileTokenizer):
        return encoding.token_bytes()
    lengths = np.zeros(encoding.n_vocab, np.int32)
    for token, rank in encoding._mergeable_ranks.items():
        lengths[rank] = len(token)
    return lengths


def keep(path: Path, content: bytes) -> None:
    """Write a file that only saves time later; where that cannot be done, log one line, once, and go on."""
    try:
        write_whole(path, content)
    except OSError as error:
        _say_once("nothing is kept in %s: %s", str(path.parent), error.strerror)


def content_key(texts: Iterable[str], how: str) -> str:
    """Return 24 hexadecimal digits that differ between sequences of texts, or ways of treating them."""
    digest = hashlib.sha256(how.encode())
    for text in texts:
        content = text.encode()
        digest.update(len(content).to_bytes(8) + content)  # the length, or documents cut elsewhere would look the same
    return digest.hexdigest()[:24]


def _json(encoding: tiktoken.Encoding) -> bytes:
    by_rank = sorted(encoding._mergeable_ranks.items(), key=lambda item: item[1])  # the same bytes each time
    content = {
        "name": encoding.name,
        "pattern": encoding._pat_str,
        "ranks": {base64.b64encode(token).decode(): rank for token, rank in by_rank},
        "special_tokens": encoding._special_tokens,
        "fingerprint": fingerprint(encoding),
    }
    return json.dumps(content, indent=0).encode()


def _digest(pattern: str, ranks: dict[bytes, int], special: dict[str, int]) -> str:
    by_rank = sorted((rank, token.hex()) for token, rank in ranks.items())
    return hashlib.sha256(json.dumps([pattern, by_rank, sorted(special.items())]).encode()).hexdigest()[:16]


def _token(text: str) -> bytes:
    return bytes(BYTES[character] for character in text)
