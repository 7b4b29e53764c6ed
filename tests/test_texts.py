"""What a model's files say about text: where one begins and ends, special tokens, sizes; and everything that can be wrong with it."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import tiny_models
from gguf import TokenType
from test_pretrained import write_gguf
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import kvcascade
from kvcascade.cache.errors import BadInput
from kvcascade.model import pretrained, tokenizer
from kvcascade.train import data

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
A = ALPHABET.index("a")


def with_settings(folder: Path, **files: dict) -> pretrained.Model:
    """The tiny llama with these in its JSON files."""
    tiny_models.write("llama", folder)
    for name, content in files.items():
        file = folder / f"{name}.json"
        before = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(before | content))
    return pretrained.load(str(folder))


def add_template(folder: Path, single: str) -> None:
    """Have the tokenizer.json put tokens around a text."""
    file = str(tiny_models.write("llama", folder) / "tokenizer.json")
    theirs = Tokenizer.from_file(file)
    theirs.add_special_tokens(["<s>"])
    template = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 257), ("<|end|>", 256)])
    theirs.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    theirs.save(file)


def test_where_a_text_ends(tmp_path):
    """The union of every file's word for it, and the well-known ends among special tokens."""
    generation = {"eos_token_id": [4, 5]}
    model = with_settings(
        tmp_path / "a", config={"eos_token_id": 3}, generation_config=generation, tokenizer_config={"eos_token": "a"}
    )
    assert model.end == {3, 4, 5, A, 256}
    model = with_settings(
        tmp_path / "b", config={"eos_token_id": None}, tokenizer_config={"eos_token": {"content": "a"}}
    )
    assert model.end == {A, 256}
    ids = lambda writer: (writer.add_eos_token_id(1), writer.add_eot_token_id(2), writer.add_eom_token_id(3))
    assert pretrained.load(f"gguf:{write_gguf('llama', tmp_path / 'm.gguf', extra=ids)}").end == {1, 2, 3, 257}


def test_an_end_of_a_part_is_not_the_end(tmp_path):
    """Where answers end with return or call, `<|end|>` is among them."""
    names = [*ALPHABET, "he", "<|end|>", "<|return|>", "<|call|>", "<|start|>"]
    kinds = [TokenType.NORMAL] * 257 + [TokenType.CONTROL] * 4
    file = write_gguf("llama", tmp_path / "m.gguf", tokens=names, kinds=kinds)
    assert pretrained.load(f"gguf:{file}").end == {258, 259}


@pytest.mark.parametrize("value", [True, 1.5, "x", -1, 270, [[1]], [1, None], {"a": 1}])
@pytest.mark.parametrize("file", ["config", "generation_config"])
def test_an_end_that_is_no_token_is_one_line(tmp_path, file, value):
    with pytest.raises(BadInput, match=rf"{file}.json: eos_token_id"):
        with_settings(tmp_path, **{file: {"eos_token_id": value}})


@pytest.mark.parametrize(
    "settings",
    [
        {"eos_token": 5}, {"bos_token": ["a"]}, {"pad_token": {"content": 1}}, {"additional_special_tokens": "a"}, {"add_bos_token": "yes"},
        {"chat_template": 5}, {"chat_template": [{"name": "a"}]}, {"additional_special_tokens": [1]},
    ],
)  # fmt: skip
def test_settings_of_another_type_are_one_line(tmp_path, settings):
    with pytest.raises(BadInput, match=rf"tokenizer_config.json: {[*settings][0]}"):
        with_settings(tmp_path, tokenizer_config=settings)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(BadInput, match="tokenizer_config.json must be a table"):
        pretrained.load(str(tmp_path))


@pytest.mark.parametrize(
    ("key", "add"),
    {
        "tokenizer.ggml.eos_token_id": lambda writer: writer.add_eos_token_id(270),
        "tokenizer.ggml.bos_token_id": lambda writer: writer.add_string("tokenizer.ggml.bos_token_id", "x"),
        "tokenizer.ggml.add_bos_token": lambda writer: writer.add_string("tokenizer.ggml.add_bos_token", "x"),
        "tokenizer.chat_template": lambda writer: writer.add_uint32("tokenizer.chat_template", 5),
    }.items(),
)
def test_ggufs_of_another_type_are_one_line(tmp_path, key, add):
    with pytest.raises(BadInput, match=rf"m.gguf: {key} must be"):
        pretrained.load(f"gguf:{write_gguf('llama', tmp_path / 'm.gguf', extra=add)}")


def test_special_tokens_have_names_for_a_template(tmp_path):
    settings = {
        "bos_token": {"content": "<s>"}, "pad_token": "p", "unk_token": None, "additional_special_tokens": ["x", {"content": "y"}],
    }  # fmt: skip
    older = {"sep_token": "s", "pad_token": "q"}
    model = with_settings(tmp_path, tokenizer_config=settings, special_tokens_map=older)
    more = {"additional_special_tokens": ["x", "y"]}
    assert model.special == {"bos_token": "<s>", "pad_token": "p", "sep_token": "s"} | more
    ids = lambda writer: (writer.add_pad_token_id(1), writer.add_unk_token_id(2), writer.add_bos_token_id(3))
    model = pretrained.load(f"gguf:{write_gguf('llama', tmp_path / 'm.gguf', extra=ids)}")
    assert model.special == {"pad_token": ALPHABET[1], "unk_token": ALPHABET[2], "bos_token": ALPHABET[3]}


def test_named_templates_of_a_gguf(tmp_path):
    extra = lambda writer: (
        writer.add_string("tokenizer.chat_template", "D"),
        writer.add_string("tokenizer.chat_template.rag", "R"),
    )
    model = pretrained.load(f"gguf:{write_gguf('llama', tmp_path / 'm.gguf', extra=extra)}")
    assert model.chat_template == {"default": "D", "rag": "R"}


@pytest.mark.parametrize(
    ("single", "settings", "before", "after"),
    [
        ("$A", {}, [], []),
        ("<s> $A", {}, [257], []),
        ("<s> $A <|end|>", {"bos_token": "<s>"}, [257], [256]),
        ("<s> $A", {"bos_token": "<s>", "add_bos_token": False}, [], []),
        ("$A", {"bos_token": "<s>", "add_bos_token": True}, [257], []),
        ("<s> $A", {"eos_token": "<|end|>", "add_eos_token": True}, [], [256]),
    ],
)
def test_what_a_tokenizer_puts_around_a_text(tmp_path, single, settings, before, after):
    """In prompts, as transformers does: the post-processor's, unless the settings say whether BOS and EOS are added."""
    add_template(tmp_path, single)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    model = pretrained.load(str(tmp_path))
    assert model.encode("hi") == [*before, 71, 72, *after]
    assert model.encoding.encode("hi") == [71, 72]


@pytest.mark.parametrize(
    ("settings", "pre", "found"),
    [
        ({}, "smollm", []),
        ({"add_bos_token": True}, "smollm", [3]),
        ({}, "llama-bpe", [3]),
        ({"add_bos_token": False}, "tekken", []),
    ],
)
def test_what_a_gguf_puts_around_a_text(tmp_path, settings, pre, found):
    """Its flags, or llama.cpp's default for its kind of tokeniser."""

    def extra(writer) -> None:
        writer.add_bos_token_id(3)
        for key, value in settings.items():
            writer.add_bool(f"tokenizer.ggml.{key}", value)

    model = pretrained.load(f"gguf:{write_gguf('llama', tmp_path / 'm.gguf', extra=extra, pre=pre)}")
    assert model.encode("xy") == [*found, ALPHABET.index("x"), ALPHABET.index("y")]


def test_windows_begin_with_bos(tmp_path, monkeypatch):
    """A window is as long as without; no token of the text is left out between two."""
    monkeypatch.setenv("KVCASCADE_CACHE", str(tmp_path / "cache"))
    add_template(tmp_path / "bos", "<s> $A")
    tiny_models.write("llama", tmp_path / "no")
    model, without = pretrained.load(str(tmp_path / "bos")), pretrained.load(str(tmp_path / "no"))
    assert model.begins_with_bos("auto") and model.begins_with_bos("yes") and not model.begins_with_bos("no")
    assert not without.begins_with_bos("auto")
    with pytest.raises(BadInput, match="has no BOS token"):
        without.begins_with_bos("yes")
    (tmp_path / "text.txt").write_text("".join(chr(97 + i % 26) for i in range(100)))
    source = f"file:{tmp_path / 'text.txt'}"
    rows = kvcascade.windows(model, source, 8, 3, "first").rows_BT
    plain = kvcascade.windows(model, source, 21, 1, "first", bos="no").rows_BT
    assert rows.shape == (3, 8) and (rows[:, 0] == 257).all()
    np.testing.assert_array_equal(rows[:, 1:].ravel(), plain[0])


def sentencepiece(folder: Path) -> pretrained.Model:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "b", "ab", "▁ab"]
    kinds = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL] + [TokenType.BYTE] * 256 + [TokenType.NORMAL] * 5
    scores = [0.0] * 259 + [-9.0, -9.0, -9.0, -1.0, -2.0]
    file = write_gguf("llama", folder / "m.gguf", tokenizer="llama", tokens=pieces, kinds=kinds, scores=scores)
    return pretrained.load(f"gguf:{file}")


def test_a_gguf_of_sentencepiece_is_loaded(tmp_path):
    """With BOS, a space before a text, and where it ends, by llama.cpp's defaults."""
    model = sentencepiece(tmp_path)
    encoding = model.encoding
    assert isinstance(encoding, tokenizer.FileTokenizer)
    assert [encoding.text_of(token) for token in model.encode("ab ab\n")] == ["<s>", "▁ab", "▁ab", "<0x0A>"]
    assert model.end == {2}
    assert model.special == {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}


def test_a_text_without_words_is_not_cut(tmp_path, monkeypatch):
    """SentencePiece's tokens of a long text are those of the whole, with one space before it."""
    monkeypatch.setattr(data, "LONGEST", 50)
    monkeypatch.setenv("KVCASCADE_CACHE", str(tmp_path))
    encoding, text = sentencepiece(tmp_path).encoding, "ab ba aab " * 20 + "\n"
    found = data.tokenize(datasets.Dataset.from_dict({"text": [text]}), encoding)
    np.testing.assert_array_equal(found, encoding.encode(text))


def test_ids_past_the_models_rows(tmp_path):
    """Numbers count, not tokens: a hole is a number without text, one past the rows is refused, more rows than tokens are taken."""
    folder = tiny_models.write("llama", tmp_path)
    for last in (269, 270):
        vocab = {each: index for index, each in enumerate(ALPHABET)} | {"zz": last}
        theirs = Tokenizer(models.BPE(vocab, [("z", "z")]))
        theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        theirs.save(str(folder / "tokenizer.json"))
        if last == 270:
            with pytest.raises(BadInput, match="tokens up to 270, but the model only 270 rows"):
                pretrained.load(str(folder))
            continue
        encoding = pretrained.load(str(folder)).encoding
        assert encoding.n_vocab == 270 and encoding.encode("zz") == [269]
        assert encoding.decode_single_token_bytes(260) == b""
        assert tokenizer.token_bytes(encoding).tolist() == [1] * 256 + [0] * 13 + [2]
