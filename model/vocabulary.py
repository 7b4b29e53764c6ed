"""Tokenisers that come with a model, from tokenizer.json or a GGUF's vocabulary: one class, on the `tokenizers` library."""

import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal

import gguf
import numpy as np
import tokenizers
from jaxtyping import Int32, UInt32
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from kvcascade.cache.errors import BadInput
from kvcascade.model.metadata import Metadata

PREFIX = "tokenizer.ggml."
SPACE = "\u2581"  # SentencePiece writes a space as this

# How a text is cut into words before their letters are merged, by GGUF's name for it, as llama.cpp and the models' tokenizer.json cut it.
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = LLAMA3.replace("{1,3}", "")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK3 = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# One after the other: SmolLM's takes every digit by itself first, so spaces before a digit stay together.
PRE_TOKENIZERS = {
    **dict.fromkeys(("gpt-2", "default", "phi-2", "olmo", "mpt"), [GPT2]),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "minerva-7b"), [r"\p{N}", GPT2]),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "smaug-bpe", "dbrx", "glm4"), [LLAMA3]),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "hunyuan", "megrez"), [QWEN2]),
    "tekken": [TEKKEN],
    "deepseek-v3": [r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+", DEEPSEEK3],
}
# Those that take a word as one token wherever there is such a token, merges or not; and those that begin with BOS if nothing else is said.
WHOLE_WORDS = {"llama-bpe", "llama3", "llama-v3", "falcon3", "tekken", "glm4"}
BEGIN = {"llama-bpe", "llama3", "llama-v3", "falcon3", "tekken"}


# A byte as a character, as `tokenizers` writes it: printable Latin-1 as itself, the others in order from U+0100 on.
_PRINTABLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
BYTES = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(256 + index): byte for index, byte in enumerate(byte for byte in range(256) if byte not in _PRINTABLE)
}


class FileTokenizer:
    """A model's tokeniser behind the calls of a `tiktoken.Encoding` that are used here; text never becomes special tokens by accident.

    `prefix`: a space is put before a text, as SentencePiece does. `silent` are tokens without text, besides the special ones.
    """

    def __init__(
        self, name: str, tokenizer: tokenizers.Tokenizer, prefix: bool = False, silent: Iterable[int] = frozenset()
    ):
        self.name, self._tokenizer, self._prefix = name, tokenizer, prefix
        tokenizer.no_truncation()  # settings of its training, saved with it
        tokenizer.no_padding()
        self.n_vocab = max(tokenizer.get_vocab().values(), default=-1) + 1
        self._added = tokenizer.get_added_tokens_decoder()
        self.special_tokens = frozenset(token for token, added in self._added.items() if added.special)
        self._silent = self.special_tokens | frozenset(silent)
        cut = _kinds(tokenizer.pre_tokenizer)
        self._decoder = tokenizer.decoder or _decoder("ByteLevel" in cut)
        kinds = _kinds(self._decoder)
        self._byte_level, self._byte_fallback = "ByteLevel" in kinds, "ByteFallback" in kinds
        self._strips = prefix or (not self._byte_level and self._decoder.decode([SPACE + "a"]) == "a")
        self.whole = not cut & {"ByteLevel", "Split", "Digits", "Whitespace", "WhitespaceSplit"}
        """Whether a text has to be given as one: it is not cut into words before anything else, or it gets something in front."""
        special = sorted((self._added[token].content for token in self.special_tokens), key=len, reverse=True)
        self._special = re.compile(f"({'|'.join(map(re.escape, special)) or '(?!)'})")
        # What stands before and after each text: whatever the post-processor adds to one.
        bare, all_ = (tokenizer.encode("a", add_special_tokens=add).ids for add in (False, True))
        places = (i for i in range(len(all_)) if bare and all_[i : i + len(bare)] == bare)
        at = next(places, len(all_))
        self.before, self.after = tuple(all_[:at]), tuple(all_[at + len(bare) :])

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that differ between tokenisers that differ in anything."""
        return hashlib.sha256(f"{self._prefix}{self._tokenizer.to_str()}".encode()).hexdigest()[:16]

    def id_of(self, text: str) -> int | None:
        """The number of the token of that name, if there is one."""
        return self._tokenizer.token_to_id(text)

    def text_of(self, token: int) -> str:
        """The name of a token, empty where there is none."""
        return self._tokenizer.id_to_token(token) or ""

    def encode(
        self, text: str, *, allowed_special: Literal["all"] | frozenset[str] = frozenset(), disallowed_special=()
    ) -> list[int]:
        """The tokens of a text, nothing put before or after; its special tokens are taken for such with `allowed_special="all"`."""
        text = text.encode("utf-16", "surrogatepass").decode(
            "utf-16", "replace"
        )  # as tiktoken does with half characters
        special = allowed_special == "all"
        self._tokenizer.encode_special_tokens = not special
        one = lambda piece: self._tokenizer.encode(piece, add_special_tokens=False).ids
        if not self._prefix:
            return one(text)
        # A space before each piece of text, and none before a token among it, as SentencePiece has it.
        pieces = enumerate(self._special.split(text) if special else [text])
        return [token for index, piece in pieces if piece for token in one(piece if index % 2 else " " + piece)]

    def encode_within(self, text: str) -> list[int]:
        """The tokens of a text that others precede: without the space that a whole text gets."""
        if not self._strips:
            return self.encode(text)
        if self._prefix:
            self._tokenizer.encode_special_tokens = True
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        before, both = self.encode("\n"), self.encode("\n" + text)
        return both[len(before) :] if both[: len(before)] == before else self.encode(text)

    def encode_to_numpy(self, text: str, *, disallowed_special=()) -> UInt32[np.ndarray, " T"]:
        """The tokens of a text as an array."""
        return np.asarray(self.encode(text), np.uint32)

    def decode_single_token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for in the middle of a text; none for a special token or a number that has no text."""
        if token in self._silent or token < 0:
            return b""
        if token in self._added:
            return self._added[token].content.encode()
        name = self._tokenizer.id_to_token(token)
        if name is None:
            return b""
        if self._byte_level:
            known = all(character in BYTES for character in name)
            return bytes(BYTES[character] for character in name) if known else name.encode()
        if self._byte_fallback and re.fullmatch("<0x[0-9A-Fa-f]{2}>", name):
            return bytes([int(name[3:5], 16)])
        # Behind another token: at the begin of a text a space is taken for the one put before it.
        return self._decoder.decode(["a", name]).removeprefix("a").encode()

    def decode_bytes(self, tokens: Sequence[int]) -> bytes:
        """The bytes of tokens that are a whole text: without the space that was put before it."""
        found = b"".join(map(self.decode_single_token_bytes, tokens))
        return found.removeprefix(b" ") if self._strips else found

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens that are a whole text."""
        return self.decode_bytes(tokens).decode(errors="replace")

    def token_bytes(self) -> Int32[np.ndarray, " V"]:
        """How many bytes each token stands for."""
        return np.asarray([len(self.decode_single_token_bytes(token)) for token in range(self.n_vocab)], np.int32)

    def written(self, before: Sequence[int]) -> str:
        """The text of a tokenizer.json, with the tokens that stand before a text; BadInput where that cannot say all."""
        if self._prefix:
            raise BadInput(f"{self.name}: a tokenizer that puts a space before a text cannot be written")
        copy = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
        if before:
            names = [(str(copy.id_to_token(token)), token) for token in before]
            single = " ".join([*(name for name, _ in names), "$A"])
            copy.post_processor = processors.TemplateProcessing(single=single, special_tokens=names)
        return copy.to_str()


class HubTokenizer(FileTokenizer):
    """The tokeniser in a tokenizer.json; BadInput if it is missing or damaged."""

    def __init__(self, path: Path):
        try:
            content = path.read_text("utf-8-sig")
        except FileNotFoundError as error:
            raise BadInput(f"{path.parent} lacks {path.name}") from error
        except (OSError, ValueError) as error:
            raise BadInput(f"cannot read {path}: {error}") from error
        make = lambda: super(HubTokenizer, self).__init__(path.parent.name, tokenizers.Tokenizer.from_str(content))
        _checked(f"{path} is not a tokenizer, or is damaged", make)


def from_gguf(fields: dict, source: str) -> FileTokenizer:
    """Make the tokeniser of a GGUF's vocabulary, of the kinds `gpt2` (byte-level BPE) and `llama` (SentencePiece's BPE with scores).

    BadInput for another kind, and for a vocabulary that is not whole.
    """
    table = Metadata(
        {key.removeprefix(PREFIX): fields[key] for key in fields if key.startswith(PREFIX)}, source, PREFIX
    )
    kind, cut = table.text("model"), table.text("pre", "default")
    if kind not in ("gpt2", "llama") or (kind == "gpt2" and cut not in PRE_TOKENIZERS):
        known = ", ".join(PRE_TOKENIZERS)
        raise BadInput(f"{source} has a tokenizer of the kind {kind}/{cut}; there are llama, and gpt2/ with {known}")
    names = table.texts("tokens")
    kinds = table.wholes("token_type", [gguf.TokenType.NORMAL] * len(names), count=len(names))
    # A run of spaces is written as it is where a text is searched for it.
    names = [
        (name.replace(SPACE, " ") if kind == "llama" and each == gguf.TokenType.USER_DEFINED else name)
        or f"[EMPTY_{i}]"
        for i, (name, each) in enumerate(zip(names, kinds, strict=True))
    ]
    vocab = {name: index for index, name in enumerate(names)}
    if not names or len(vocab) < len(names):
        twice = next((name for index, name in enumerate(names) if vocab[name] != index), None)
        raise table.bad("tokens", "is empty" if twice is None else f"has the token {twice!r} twice")
    if kind == "gpt2":
        merges = []
        for index, merge in enumerate(table.texts("merges")):
            left, space, right = merge.partition(" ") if not merge.startswith(" ") else (merge, "", "")
            if not space or not {left, right, left + right} <= vocab.keys():
                raise table.bad(f"merges[{index}]", f"is {merge!r}, which are not two tokens that make a third")
            merges.append((left, right))
        model = lambda: models.BPE(vocab, merges, ignore_merges=cut in WHOLE_WORDS)
        words = [pre_tokenizers.Split(tokenizers.Regex(each), "isolated") for each in PRE_TOKENIZERS[cut]]
        before = pre_tokenizers.Sequence([*words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    else:
        scores = table.numbers("scores", count=len(names))
        pieces = {name: float(scores[index]) for name, index in vocab.items() if kinds[index] == gguf.TokenType.NORMAL}
        unknown = next((name for name, each in zip(names, kinds, strict=True) if each == gguf.TokenType.UNKNOWN), None)
        merges = _merges(pieces)
        model = lambda: models.BPE(vocab, merges, unk_token=unknown, byte_fallback=True, fuse_unk=True)
        before = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    whole = _checked(f"{source}: {PREFIX}tokens are no vocabulary", lambda: tokenizers.Tokenizer(model()))
    whole.pre_tokenizer, whole.decoder = before, _decoder(kind == "gpt2")
    special = (gguf.TokenType.CONTROL, gguf.TokenType.UNKNOWN)
    whole.add_tokens([
        AddedToken(name, special=each in special, normalized=False)
        for name, each in zip(names, kinds, strict=True)
        if each in (*special, gguf.TokenType.USER_DEFINED)
    ])  # fmt: skip
    known = (gguf.TokenType.NORMAL, gguf.TokenType.USER_DEFINED, gguf.TokenType.BYTE)
    silent = {index for index, each in enumerate(kinds) if each not in known}
    prefix = kind == "llama" and table.flag("add_space_prefix", True)
    return _checked(source, lambda: FileTokenizer(Path(source).stem, whole, prefix, silent))


def _merges(pieces: dict[str, float]) -> list[tuple[str, str]]:
    """The pairs of pieces that make a piece, the one of the highest score first, as SentencePiece merges them."""
    found = [
        (-score, -at, piece[:at], piece[at:])
        for piece, score in pieces.items()
        for at in range(1, len(piece))
        if piece[:at] in pieces and piece[at:] in pieces
    ]
    return [(left, right) for *_, left, right in sorted(found)]


def _decoder(byte_level: bool) -> decoders.Decoder:
    if byte_level:
        return decoders.ByteLevel()
    return decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])


def _kinds(part: decoders.Decoder | pre_tokenizers.PreTokenizer | None) -> set[str]:
    """The names of what a part of a tokeniser is made of."""
    if part is None:
        return set()
    todo, found = [json.loads(part.__getstate__())], set()
    while todo:
        each = todo.pop()
        found.add(each.get("type"))
        todo += each.get("decoders") or each.get("pretokenizers") or []
    return found


def _checked[T](problem: str, make: Callable[[], T]) -> T:
    """What is made by the library, which tells of damage by an exception of no narrower kind, or panics."""
    try:
        return make()
    except (BadInput, KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        raise BadInput(f"{problem}: {' '.join(str(error).split())[:300]}") from error
