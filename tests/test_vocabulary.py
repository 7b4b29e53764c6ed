"""Tokenisers that come with a model: the same tokens as the libraries that made them, bytes that add up, and everything that can be wrong with one."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import tiny_models
from gguf import TokenType
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from kvcascade.cache.errors import BadInput
from kvcascade.model import tokenizer, vocabulary

GOLDEN = json.loads(Path(__file__).with_name("golden_tokens.json").read_text("utf-8"))  # made by make_golden_tokens.py
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


@pytest.fixture(scope="module")
def spm() -> vocabulary.FileTokenizer:
    return tokenizer.from_gguf(GOLDEN["fields"], "spm.gguf")


def ggml(**fields) -> dict:
    return {f"tokenizer.ggml.{key}": value for key, value in fields.items()}


def byte_level(**changes) -> dict:
    """A byte-level vocabulary of 258 tokens."""
    kinds = [TokenType.NORMAL] * 257 + [TokenType.CONTROL]
    fields = {"model": "gpt2", "tokens": [*ALPHABET, "he", "<|end|>"], "token_type": kinds, "merges": ["h e"]} | changes
    return ggml(**{key: value for key, value in fields.items() if value is not None})


def test_tokens_of_sentencepiece(spm):
    """Of 203 texts, with runs of spaces, control characters, rare letters, texts that look like tokens, and user-defined tokens."""
    assert len(GOLDEN["texts"]) == 203
    for text, tokens in GOLDEN["texts"]:
        assert spm.encode(text) == tokens
        assert spm.decode(tokens) == text.replace("▁", " ")


@given(st.text() | st.text(alphabet="ab\n \u00e9\u4e2d<think>", max_size=30))
def test_bytes_add_up_to_the_text(spm, text):
    """One space more, which SentencePiece puts before a text."""
    text = text.replace("▁", " ")
    tokens = spm.encode(text)
    lengths = tokenizer.token_bytes(spm)
    assert lengths[np.asarray(tokens, int)].sum() == len(text.encode()) + bool(text)
    assert spm.decode_bytes(tokens) == text.encode()
    # In the middle of a text no space is put before, and none is lost.
    assert b"".join(map(spm.decode_single_token_bytes, spm.encode_within(text))) == text.encode()


def test_special_tokens_of_sentencepiece(spm):
    """They are text unless they are said to be more; a space is put before each piece of text between them."""
    begin = spm.id_of("<s>")
    assert begin not in spm.encode("<s>")
    assert spm.encode("<s>a", allowed_special="all") == [begin, *spm.encode("a")]
    assert begin is not None and spm.decode_single_token_bytes(begin) == b""
    for name, content in {"<think>": b"<think>", "<0x0A>": b"\n", "   ": b"   ", "▁the": b" the"}.items():
        token = spm.id_of(name)
        assert token is not None and spm.decode_single_token_bytes(token) == content


def test_the_highest_score_is_merged_first():
    pieces = ["<unk>", "▁", "a", "b", "ab", "ba", "aba"]
    fields = ggml(model="llama", tokens=pieces, scores=[0.0, -9, -9, -9, -2, -1, -3], add_space_prefix=False)
    kinds = [TokenType.UNKNOWN] + [TokenType.NORMAL] * 6
    ours = tokenizer.from_gguf(fields | ggml(token_type=kinds), "x.gguf")
    names = [ours.text_of(token) for token in ours.encode("ababa")]
    assert names == ["aba", "ba"]  # of a, ba, ba


@pytest.mark.parametrize("name", vocabulary.PRE_TOKENIZERS)
def test_words_are_cut_as_by_their_pattern(name):
    """GGUF's byte-level vocabularies equal tiktoken's over the same words, where one pattern cuts them."""
    patterns = vocabulary.PRE_TOKENIZERS[name]
    merges = ["Ġ t", "h e", "Ġ Ġ", "Ġt he", "1 2", "' s", "Ċ Ċ", "L L"]
    names = [*ALPHABET, *(merge.replace(" ", "") for merge in merges)]
    ours = tokenizer.from_gguf(byte_level(pre=name, tokens=names, token_type=None, merges=merges), "x.gguf")
    ranks = {bytes(vocabulary.BYTES[each] for each in token): rank for rank, token in enumerate(names)}
    text = "The  12345 cats' tails; THEY'LL/\n see 3½ of\r\n\n\t²them.  \u00a0éñ 中文12 don't  \n"
    assert ours.decode(ours.encode(text)) == text
    if len(patterns) == 1:
        theirs = tiktoken.Encoding("x", pat_str=patterns[0], mergeable_ranks=ranks, special_tokens={})
        assert ours.encode(text) == theirs.encode_ordinary(text)


def test_merges_in_an_order_of_their_own():
    """Tokens need not be numbered as they are merged; whole words go before merges only where the model does so."""
    tokens, merges = [*ALPHABET, "abc", "ab", "bc", "xyz"], ["b c", "a b", "a bc"]
    for pre, xyz in (("qwen2", 3), ("llama-bpe", 1)):
        ours = tokenizer.from_gguf(byte_level(pre=pre, tokens=tokens, token_type=None, merges=merges), "x.gguf")
        assert ours.encode("abc") == [256] and len(ours.encode("xyz")) == xyz


def test_user_defined_tokens_and_those_without_text():
    kinds = [TokenType.NORMAL] * 256 + [TokenType.USER_DEFINED, TokenType.CONTROL, TokenType.UNUSED, TokenType.NORMAL]
    tokens = [*ALPHABET, "<think>", "<|end|>", "<unused0>", ""]
    ours = tokenizer.from_gguf(byte_level(pre="qwen2", tokens=tokens, token_type=kinds, merges=[]), "x.gguf")
    assert ours.encode("a<think>b<|end|>") == [64, 256, 65, *ours.encode("<|end|>")]
    assert ours.encode("a<|end|>", allowed_special="all") == [64, 257]
    assert tokenizer.token_bytes(ours).tolist() == [1] * 256 + [7, 0, 0, len("[EMPTY_259]")]
    assert ours.decode_single_token_bytes(5000) == b"" and ours.n_vocab == 260


def test_truncation_and_padding_are_not_a_models(tmp_path):
    file = tiny_models.write("llama", tmp_path) / "tokenizer.json"
    theirs = Tokenizer.from_file(str(file))
    theirs.enable_truncation(max_length=16)
    theirs.enable_padding(length=8)
    theirs.save(str(file))
    ours = tokenizer.HubTokenizer(file)
    assert len(ours.encode("x" * 1000)) == 1000 and len(ours.encode("hi")) == 2
    assert len(ours.encode("caf\udce9")) == len("caf\ufffd".encode())  # half a character


def test_bytes_come_from_the_decoder(tmp_path):
    """SentencePiece's letters, byte fallback and spaces, byte-level letters, and added tokens, with a decoder and without."""
    pieces = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *"caféñdúł"]
    theirs = Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    )
    theirs.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    theirs.add_tokens([AddedToken("<é>", normalized=False)])
    text = "café ñandú łódź\n"
    strip = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    for decoder in (decoders.Sequence(strip), decoders.Metaspace()):
        theirs.decoder = decoder
        theirs.save(str(tmp_path / "tokenizer.json"))
        ours = tokenizer.HubTokenizer(tmp_path / "tokenizer.json")
        found = ours.encode(text)
        assert found == theirs.encode(text, add_special_tokens=False).ids
        assert ours.decode_single_token_bytes(found[0]) == b" "  # in the middle of a text
        assert tokenizer.token_bytes(ours)[ours.encode_within("<é>")].sum() == 4
        if decoder is not theirs.decoder and isinstance(decoder, decoders.Sequence):
            assert ours.decode(found) == text and ours.decode_bytes(ours.encode(" x" + text)).startswith(b" ")
    file = tiny_models.write("llama", tmp_path / "m") / "tokenizer.json"
    added = Tokenizer.from_file(str(file))
    added.add_tokens([AddedToken("café", special=False)])
    added.save(str(file))
    ours = tokenizer.HubTokenizer(file)
    assert ours.encode("café") == [257] and ours.decode_single_token_bytes(257) == "café".encode()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "lacks tokenizer.ggml.model"),
        (ggml(model="t5"), "t5/default"),
        (ggml(model=["gpt2"]), "tokenizer.ggml.model must be a text"),
        (byte_level(pre="new"), "gpt2/new"),
        (byte_level(tokens=None), "lacks tokenizer.ggml.tokens"),
        (byte_level(tokens=[]), "tokenizer.ggml.t"),
        (byte_level(tokens=[*ALPHABET, 5, "x"]), "tokenizer.ggml.tokens[256]"),
        (byte_level(tokens="abc"), "tokenizer.ggml.tokens must be a list"),
        (byte_level(tokens=[*ALPHABET, "a", "x"]), "has the token 'a' twice"),
        (byte_level(token_type=[1, 2]), "tokenizer.ggml.token_type has 2"),
        (byte_level(token_type=["x"] * 258), "tokenizer.ggml.token_type[0]"),
        (byte_level(merges=None), "lacks tokenizer.ggml.merges"),
        (byte_level(merges=["he"]), "tokenizer.ggml.merges[0] is 'he'"),
        (byte_level(merges=["h e", "he x"]), "tokenizer.ggml.merges[1]"),
        (byte_level(merges=[7]), "tokenizer.ggml.merges[0]"),
        (ggml(model="llama", tokens=["a"]), "lacks tokenizer.ggml.scores"),
        (ggml(model="llama", tokens=["a"], scores=[1.0, 2.0]), "tokenizer.ggml.scores has 2"),
        (ggml(model="llama", tokens=["a"], scores=[float("nan")]), "tokenizer.ggml.scores[0]"),
        (
            ggml(model="llama", tokens=["a"], scores=[0.0], add_space_prefix="x"),
            "add_space_prefix must be true or false",
        ),
    ],
)
def test_a_vocabulary_that_is_not_whole_is_one_line(fields, words):
    with pytest.raises(BadInput) as caught:
        tokenizer.from_gguf(fields, "x.gguf")
    assert "x.gguf" in str(caught.value) and words in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_token_type_is_normal():
    ours = tokenizer.from_gguf(byte_level(token_type=None), "x.gguf")
    assert ours.encode("the") == [*ours.encode("t"), 256] and ours.special_tokens == frozenset()


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5), lambda each: st.lists(each, max_size=4), max_leaves=6
)  # fmt: skip


@given(
    st.sampled_from(["gpt2", "llama"]),
    st.dictionaries(st.sampled_from(["tokens", "token_type", "merges", "scores", "pre", "add_space_prefix", "model"]), ANYTHING),
    st.lists(st.text(alphabet="ab▁<0x>", max_size=4), max_size=8),
)  # fmt: skip
def test_any_vocabulary_is_a_tokenizer_or_one_line(kind, changes, tokens):
    whole = {"model": kind, "tokens": tokens, "scores": [0.0] * len(tokens), "merges": []} | changes
    try:
        ours = tokenizer.from_gguf(ggml(**whole), "x.gguf")
    except BadInput as error:
        assert "\n" not in str(error)
    else:
        assert len(tokenizer.token_bytes(ours)) == ours.n_vocab
        ours.encode("a b<|end|>\u00e9")


TINY = json.loads(Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")])).to_str())


@given(
    st.dictionaries(
        st.sampled_from([*TINY]), ANYTHING | st.dictionaries(st.sampled_from(["type", "vocab", "merges"]), ANYTHING)
    )
)
def test_any_tokenizer_json_is_a_tokenizer_or_one_line(tmp_path_factory, changes):
    file = tmp_path_factory.mktemp("t") / "tokenizer.json"
    file.write_text(json.dumps(TINY | changes))
    try:
        ours = tokenizer.HubTokenizer(file)
        assert len(tokenizer.token_bytes(ours)) == ours.n_vocab
        ours.encode("ab")
    except BadInput as error:
        assert "\n" not in str(error) and "tokenizer.json" in str(error)
