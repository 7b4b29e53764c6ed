import json
import logging

import numpy as np
import pytest
import requests
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcascade.cache.errors import BadInput
from kvcascade.model import tokenizer

PROSE = [
    "It wasn't the cache's fault: they'd said we'll keep what's needed, and I'm sure you've read the 1,024 rules.\n",
    "def attend(query, cache):\n    for tier in cache.tiers:\n        if tier.empty:\n\n            continue\n",
    "    \t  tabs\tand   runs of    spaces   \r\n\r\nWindows lines\r\nand a trailing space \n",
    "Größe, naïve café, Привет мир, こんにちは世界, مرحبا, 👩‍👩‍👧‍👦 and 🏳️‍🌈; x² ≠ ½, ١٢٣٤\n",
    "https://example.org/a_b-c?d=1&e=%20#f  ---- ==== !!! ...   \x00\x1f\x7f\u00a0\u2003end",
    "aaaaaaaaaa abababababab mississippi banana bandana   banana\n\n\n\nbandanabanana",
]
CORPUS = PROSE * 3 + [f"line {i}: the value of x_{i} is {i * i}\n" for i in range(300)]


@pytest.fixture(scope="module")
def bpe() -> tiktoken.Encoding:
    return tokenizer.train_bpe(CORPUS, 400)


def same(a: tiktoken.Encoding, b: tiktoken.Encoding) -> bool:
    return tokenizer.fingerprint(a) == tokenizer.fingerprint(b) and all(
        a.encode_ordinary(text) == b.encode_ordinary(text) for text in PROSE
    )


def test_bpe_encodes_as_the_library_that_trained_it(bpe: tiktoken.Encoding) -> None:
    reference = tokenizer.train_reference(CORPUS, 400)
    unseen = ["def unseen_function(values):\n        return {'ünïcödé': values[3:1415]}\n", "line 17: bananas\n" * 5]
    for text in CORPUS + unseen + ["", " ", "\n", "   ", "'s 's're I'LL"]:
        assert bpe.encode_ordinary(text) == reference.encode(text).ids
    assert len(bpe.encode_ordinary("".join(CORPUS))) < len("".join(CORPUS).encode()) / 2


def test_bpe_has_the_size_asked_for_and_is_deterministic(bpe: tiktoken.Encoding) -> None:
    assert bpe.n_vocab == 400
    assert same(bpe, tokenizer.train_bpe(iter(CORPUS), 400))
    assert tokenizer.train_bpe([], 256).n_vocab == 256


@settings(deadline=None)
@given(st.text())
def test_any_text_comes_back(bpe: tiktoken.Encoding, text: str) -> None:
    for encoding in (bpe, tokenizer.bytes_encoding()):
        tokens = encoding.encode_ordinary(text)
        assert encoding.decode_bytes(tokens) == text.encode()
        assert tokenizer.token_bytes(encoding)[np.array(tokens, int)].sum() == len(text.encode())


def test_a_byte_is_its_own_token() -> None:
    encoding = tokenizer.bytes_encoding()
    assert encoding.n_vocab == 256
    assert encoding.encode_ordinary("é\n") == list("é\n".encode())
    assert (tokenizer.token_bytes(encoding) == 1).all()


def test_special_tokens_have_no_bytes() -> None:
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"ab": 256}
    encoding = tiktoken.Encoding("x", pat_str=r"\w+|\W+", mergeable_ranks=ranks, special_tokens={"<|end|>": 300})
    lengths = tokenizer.token_bytes(encoding)
    assert lengths.shape == (301,) and lengths[256] == 2 and not lengths[257:].any()


@pytest.mark.parametrize("vocab", [255, 0, -1])
def test_fewer_tokens_than_bytes(vocab: int) -> None:
    with pytest.raises(BadInput, match=f"at least 256 .* not {vocab}"):
        tokenizer.train_bpe(CORPUS, vocab)


def test_a_corpus_too_small_for_the_vocabulary() -> None:
    with pytest.raises(BadInput, match="too small for a BPE of 5000 tokens: it yields"):
        tokenizer.train_bpe(PROSE, 5000)


def test_make_knows_the_names(monkeypatch: pytest.MonkeyPatch, bpe: tiktoken.Encoding) -> None:
    assert same(tokenizer.make("bytes", [], 0), tokenizer.bytes_encoding())
    assert same(tokenizer.make("bpe", CORPUS, 400), bpe)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: bpe if name == "gpt2" else None)
    assert tokenizer.make("gpt2", [], 0) is bpe
    with pytest.raises(BadInput, match="unknown tokenizer 'gpt-2': choose one of bytes, bpe, gpt2; did you mean gpt2?"):
        tokenizer.make("gpt-2", CORPUS, 400)


@pytest.mark.parametrize("error", [requests.ConnectionError("no route"), ValueError("hash mismatch")])
def test_gpt2_without_a_network_is_a_bpe(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, bpe: tiktoken.Encoding, error: Exception
) -> None:
    def unreachable(name: str) -> tiktoken.Encoding:
        raise error

    monkeypatch.setattr(tiktoken, "get_encoding", unreachable)
    with caplog.at_level(logging.WARNING, "kvcascade"):
        assert same(tokenizer.make("gpt2", CORPUS, 400), bpe)
    assert len(caplog.messages) == 1 and "a BPE of 400 tokens" in caplog.messages[0]


def test_saved_and_loaded(tmp_path, bpe: tiktoken.Encoding) -> None:
    ranks = {bytes([byte]): byte for byte in range(256)}
    special = tiktoken.Encoding("s", pat_str=r".", mergeable_ranks=ranks, special_tokens={"<|end|>": 256})
    for encoding in (bpe, tokenizer.bytes_encoding(), special):
        tokenizer.save(encoding, tmp_path / "folder" / "tokenizer.json")
        loaded = tokenizer.load(tmp_path / "folder" / "tokenizer.json")
        assert same(loaded, encoding) and loaded.name == encoding.name and loaded.n_vocab == encoding.n_vocab
        assert [path.name for path in (tmp_path / "folder").iterdir()] == ["tokenizer.json"]


def test_a_failed_save_leaves_the_old_file_alone(
    tmp_path, monkeypatch: pytest.MonkeyPatch, bpe: tiktoken.Encoding
) -> None:
    path = tmp_path / "tokenizer.json"
    tokenizer.save(bpe, path)

    def full(self, target) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(path), "replace", full)
    with pytest.raises(OSError):
        tokenizer.save(tokenizer.bytes_encoding(), path)
    assert list(tmp_path.iterdir()) == [path] and same(tokenizer.load(path), bpe)


def test_a_damaged_file_is_bad_input(tmp_path, bpe: tiktoken.Encoding) -> None:
    path = tmp_path / "tokenizer.json"
    with pytest.raises(BadInput, match="No such file"):
        tokenizer.load(path)
    tokenizer.save(bpe, path)
    whole = path.read_text()
    content = json.loads(whole)
    swapped = content["ranks"] | {"YQ==": content["ranks"]["Yg=="]}
    for damaged in (
        "",
        whole[: len(whole) // 2],
        "[]",
        "{}",
        "\x00" * 99,
        json.dumps(content | {"ranks": swapped}),
        json.dumps(content | {"ranks": {"?": 0}}),
        json.dumps(content | {"ranks": 7}),
        json.dumps(content | {"pattern": "("}),
    ):
        path.write_text(damaged)
        with pytest.raises(BadInput, match="is not a tokenizer, or is damaged") as caught:
            tokenizer.load(path)
        assert "\n" not in str(caught.value)


def test_fingerprints_tell_tokenizers_apart(bpe: tiktoken.Encoding) -> None:
    others = [tokenizer.bytes_encoding(), tokenizer.train_bpe(CORPUS, 401), tokenizer.train_bpe(CORPUS[50:], 400)]
    assert len({tokenizer.fingerprint(encoding) for encoding in [bpe, *others]}) == 4
