import logging
import sysconfig
from pathlib import Path

import datasets
import datasets.config
import huggingface_hub
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcascade.cache.errors import BadInput
from kvcascade.kernels.files import cache_dir
from kvcascade.model import tokenizer
from kvcascade.train import data

BYTES = tokenizer.bytes_encoding()


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVCASCADE_CACHE", str(tmp_path / "cache"))
    tokenizer._say_once.cache_clear()
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def stdlib() -> data.Text:
    return data.load("stdlib")


def rows(*texts: str) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"text": list(texts)})


# Corpora


def test_stdlib_is_real_text_split_by_file(stdlib: data.Text) -> None:
    train, validation = set(stdlib.train["path"]), set(stdlib.validation["path"])
    assert not train & validation
    assert {"argparse.py", "json/decoder.py"} <= train | validation
    sizes = [sum(map(len, split["text"])) for split in (stdlib.train, stdlib.validation)]
    assert sum(sizes) > 5e6 and 0.04 < sizes[1] / sum(sizes) < 0.12
    assert max(map(len, stdlib.train["text"])) < 0.05 * sizes[0]
    assert max(map(len, stdlib.validation["text"])) < 0.25 * sizes[1]
    assert stdlib.train["path"][:] == sorted(train)


def test_stdlib_has_nothing_of_this_machine(stdlib: data.Text) -> None:
    paths = [*stdlib.train["path"], *stdlib.validation["path"]]
    assert not [path for path in paths if path.startswith("/") or "site-packages" in path or "_sysconfigdata" in path]
    assert not [path for path in paths if {"test", "tests", "encodings"} & set(path.split("/"))]


def test_stdlib_documentation_is_there_once(stdlib: data.Text) -> None:
    topics = [*stdlib.train["path"], *stdlib.validation["path"]]
    topics = [path for path in topics if path.startswith("pydoc_data/")]
    assert "pydoc_data/topics.py/specialnames" in topics and len(topics) > 20
    assert "pydoc_data/topics.py/sequence-types" not in topics  # word for word in specialnames


def test_stdlib_is_the_same_each_time(stdlib: data.Text) -> None:
    again = data.load("stdlib")
    assert (
        again.train["text"][:] == stdlib.train["text"][:]
        and again.validation["path"][:] == stdlib.validation["path"][:]
    )


def test_stdlib_without_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for root in (tmp_path / "python312.zip", tmp_path):
        monkeypatch.setattr(sysconfig, "get_paths", lambda root=root: {"stdlib": str(root)})
        with pytest.raises(BadInput, match="no sources"):
            data.load("stdlib")


def test_a_text_file_is_cut_at_blank_lines(tmp_path: Path) -> None:
    text = "".join(f"Paragraph {i}.\n{'word ' * (i % 50)}\n\n" for i in range(5000))
    (tmp_path / "a.txt").write_text(text)
    corpus = data.load(f"file:{tmp_path}/a.txt")
    train, validation = corpus.train["text"][:], corpus.validation["text"][:]
    assert len(validation) == (len(train) + len(validation)) // 20 > 0
    assert all(part.startswith("Paragraph") and part in text for part in train + validation)
    assert all(20_000 <= len(part) < 20_400 for part in train[:-1] + validation)
    assert sum(map(len, train + validation)) == len(text)


def test_a_short_text_file_gives_its_last_tenth(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("0123456789" * 10)
    corpus = data.load(f"file:{tmp_path}/a.txt")
    assert corpus.train["text"][:] == ["0123456789" * 9] and corpus.validation["text"][:] == ["0123456789"]


@pytest.mark.parametrize("ending", ["parquet", "jsonl", "json", "csv"])
def test_files_with_a_text_column(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    texts = [f"Document {i},\n\nsays “hello” \t" for i in range(40)]
    source = datasets.Dataset.from_dict({"id": list(range(41)), "text": [*texts, None]})
    writers = {"parquet": source.to_parquet, "csv": source.to_csv}
    writers.get(ending, lambda path: source.to_json(path, lines=ending == "jsonl"))(path)
    corpus = data.load(f"file:{path}")
    assert corpus.train.column_names == ["text"]
    assert corpus.validation["text"][:] == texts[19::20]
    assert corpus.train["text"][:] == texts[:19] + texts[20:39]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("none.txt", None, "there is no such file"),
        ("empty.txt", b"", "the file is empty"),
        ("empty.json", b"", "the file is empty"),
        ("blank.txt", b" \n\n ", "there is no text in it"),
        ("short.txt", b"a", "too few"),
        ("latin.txt", b"caf\xe9 " * 100, "not a text in UTF-8 .byte 3."),
        ("broken.json", b"{nothing", "not a readable .json file"),
        ("broken.parquet", b"nothing", "not a readable .parquet file"),
        ("header.csv", b"text\n", "there is no text in it"),
        ("other.csv", b"id,body\n1,a\n2,b\n", "no column called text, only id, body"),
        ("number.jsonl", b'{"text": 3}\n', "line 1: the column called text holds int, not strings"),
        ("nested.jsonl", b'{"text": ["a"]}\n', "not strings"),
        ("null.jsonl", b'{"text": null}\n{"text": " "}\n', "there is no text in it"),
    ],
)
def test_bad_files(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=message) as caught:
        data.load(f"file:{tmp_path / name}")
    assert name in str(caught.value) and "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def fake_hub(monkeypatch: pytest.MonkeyPatch, info: Exception | None, splits: object) -> list[tuple]:
    calls = []

    def dataset_info(self, repository, timeout) -> None:
        if info:
            raise info

    def load_dataset(*arguments) -> object:
        calls.append((*arguments, datasets.config.HF_HUB_OFFLINE))
        if isinstance(splits, Exception):
            raise splits
        return splits

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_a_hub_data_set_keeps_its_own_validation_split(monkeypatch: pytest.MonkeyPatch) -> None:
    splits = datasets.DatasetDict({"train": rows("a", "b"), "validation": rows("c"), "test": rows("d")})
    calls = fake_hub(monkeypatch, None, splits)
    corpus = data.load("wikitext-2")
    assert corpus.train["text"][:] == ["a", "b"] and corpus.validation["text"][:] == ["c"]
    data.load("wikitext-103")
    data.load("some/name:config")
    data.load("some/name")
    assert [call[:2] for call in calls] == [
        ("Salesforce/wikitext", "wikitext-2-raw-v1"),
        ("Salesforce/wikitext", "wikitext-103-raw-v1"),
        ("some/name", "config"),
        ("some/name", None),
    ]


def test_a_hub_data_set_without_validation_is_split(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"document {i}" for i in range(60)]
    fake_hub(monkeypatch, None, {"train": rows(*texts)})
    assert data.load("some/name").validation["text"][:] == texts[19::20]


def test_an_unreachable_hub_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    before = datasets.config.HF_HUB_OFFLINE
    calls = fake_hub(monkeypatch, OSError("Name or service not known"), ConnectionError("offline\nand more"))
    with pytest.raises(BadInput) as caught:
        data.load("wikitext2")
    assert str(caught.value) == (
        "wikitext2: the Hugging Face hub cannot be reached; stdlib and file:PATH work offline; did you mean wikitext-2?"
    )
    assert calls == [("wikitext2", None, True)] and datasets.config.HF_HUB_OFFLINE == before


def test_an_unreachable_hub_still_gives_what_was_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_hub(monkeypatch, OSError("down"), {"train": rows("a"), "validation": rows("b")})
    assert data.load("wikitext-2").train["text"][:] == ["a"]


@pytest.mark.parametrize(
    "info, splits, message",
    [
        (huggingface_hub.errors.HFValidationError("no"), {}, "no such data set that you may read"),
        (None, ValueError("Config name is missing.\nPick one"), "Config name is missing.$"),
        (None, {"test": rows("a")}, "no split called train, only test"),
        (None, {"train": datasets.Dataset.from_dict({"body": ["a"]})}, "no column called text, only body"),
    ],
)
def test_bad_hub_data_sets(
    monkeypatch: pytest.MonkeyPatch, info: Exception | None, splits: object, message: str
) -> None:
    fake_hub(monkeypatch, info, splits)
    with pytest.raises(BadInput, match=f"^some/name: .*{message}"):
        data.load("some/name")


def test_a_path_without_file(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="given as file:/"):
        data.load(str(tmp_path))


# Tokens and their cache


def test_tokens_are_the_documents_in_order() -> None:
    assert data.tokenize(rows("ab", "c\n", ""), BYTES).tobytes() == b"a\0b\0\n\0c\0\n\0\n\0"
    assert data.tokenize(rows("ab"), BYTES).dtype == np.uint16
    assert data.tokenize(rows(), BYTES).shape == (0,)


def test_a_document_of_a_million_spaces_does_not_abort() -> None:
    encoding = tokenizer.train_bpe(["a b"], 256)
    assert len(data.tokenize(rows(" " * 10**6), encoding)) == 10**6 + 1


def test_tokens_come_from_the_cache(folder: Path, monkeypatch: pytest.MonkeyPatch, stdlib: data.Text) -> None:
    encoding = data.encoding_for(stdlib, "bpe", 512)
    tokens = data.tokenize(stdlib.validation, encoding)
    assert encoding.decode(tokens[:2000].tolist()) in stdlib.validation["text"][0] + stdlib.validation["text"][1]
    monkeypatch.setattr(tokenizer, "train_bpe", None)
    again = data.encoding_for(stdlib, "bpe", 512)
    assert tokenizer.fingerprint(again) == tokenizer.fingerprint(encoding)
    monkeypatch.setattr(type(encoding), "encode_to_numpy", None)
    cached = data.tokenize(stdlib.validation, again)
    np.testing.assert_array_equal(cached, tokens)
    assert cached.dtype == tokens.dtype and len(list(folder.iterdir())) == 2


@pytest.mark.parametrize("damage", [b"", b"short", None])
def test_damaged_cache_files_are_rebuilt(folder: Path, damage: bytes | None) -> None:
    text = data.Text("x", rows("abcabcabc " * 9, "ab"), rows("abc"))
    encoding = data.encoding_for(text, "bpe", 258)
    tokens = data.tokenize(text.train, encoding)
    whole = {path: path.read_bytes() for path in folder.iterdir()}
    assert len(whole) == 2
    for path, content in whole.items():
        flipped = content[:-40] + bytes([content[-40] ^ 1]) + content[-39:]
        path.write_bytes(flipped if damage is None else damage)
    assert tokenizer.fingerprint(data.encoding_for(text, "bpe", 258)) == tokenizer.fingerprint(encoding)
    np.testing.assert_array_equal(data.tokenize(text.train, encoding), tokens)
    assert {path: path.read_bytes() for path in folder.iterdir()} == whole


def test_another_text_or_tokenizer_is_another_cache_file(folder: Path) -> None:
    other = tokenizer.train_bpe(["ab"], 256)
    for dataset, encoding in ((rows("ab", "c"), BYTES), (rows("a", "bc"), BYTES), (rows("ab", "c"), other)):
        data.tokenize(dataset, encoding)
    assert len(list(folder.iterdir())) == 3


def test_a_cache_that_cannot_be_written_is_no_obstacle(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder.write_text("a file where the folder should be")
    text = data.Text("x", rows("abcabcabc " * 9), rows("abc"))
    with caplog.at_level(logging.WARNING, "kvcascade"):
        tokens = data.tokenize(text.train, data.encoding_for(text, "bpe", 258))
        data.tokenize(text.validation, BYTES)
    assert len(tokens) and len(caplog.messages) == 1 and "nothing is kept in" in caplog.messages[0]


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVCASCADE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_dir() == Path("/x/kvcascade")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "kvcascade"


# Windows and batches


def test_windows_follow_one_another() -> None:
    tokens = np.arange(23, dtype=np.uint16)
    np.testing.assert_array_equal(data.windows(tokens, 5, 4), np.arange(20).reshape(4, 5))
    with pytest.raises(BadInput, match="5 windows of 5 tokens were asked for, but the text has 4"):
        data.windows(tokens, 5, 5)


@settings(deadline=None)
@given(st.integers(1, 100), st.integers(1, 20), st.integers(1, 9), st.integers(0, 10**6), st.integers(0, 2**32))
def test_an_epoch_visits_each_window_once(extra: int, context: int, size: int, first: int, seed: int) -> None:
    tokens = np.arange(context + extra, dtype=np.uint16)  # a token tells its place
    per_epoch = max(1, extra // context)
    steps = range(first * per_epoch, (first + 3) * per_epoch)
    every = np.concatenate([data.batch(tokens, seed, step, 1, context) for step in steps])
    assert (np.diff(every, axis=1) == 1).all()
    for epoch in every[:, 0].reshape(3, per_epoch):
        starts = np.sort(epoch)
        assert (np.diff(starts) == context).all() and starts[0] < context
    # The same windows in larger batches, asked for in another order.
    for step in reversed(range(-(-steps.start // size), steps.stop // size)):
        rows = data.batch(tokens, seed, step, size, context)
        np.testing.assert_array_equal(rows, every[step * size - steps.start :][:size])


def test_all_starts_are_visited_in_as_many_epochs_as_a_window_has_tokens() -> None:
    tokens = np.arange(103, dtype=np.uint32)
    starts = np.concatenate([data.batch(tokens, 0, step, 9, 10)[:, 0] for step in range(10)])
    np.testing.assert_array_equal(np.sort(starts), np.arange(90))


@settings(deadline=None)
@given(st.integers(100, 400), st.integers(2, 20), st.integers(1, 32), st.integers(0, 10**9), st.integers(0, 99))
def test_rows_of_a_batch_are_distinct(length: int, context: int, size: int, step: int, seed: int) -> None:
    starts = data.batch(np.arange(length, dtype=np.uint16), seed, step, size, context)[:, 0]
    assert len(set(starts.tolist())) == size or size > (context - 1) * ((length - context) // context)


def test_batches_depend_on_seed_and_step_alone() -> None:
    tokens = np.random.default_rng(0).integers(0, 256, 5000).astype(np.uint16)
    draw = {(seed, step): data.batch(tokens, seed, step, 4, 32) for seed in (0, 1) for step in (0, 1, 999)}
    data._permutation.cache_clear()
    for (seed, step), rows in reversed(draw.items()):
        np.testing.assert_array_equal(data.batch(tokens, seed, step, 4, 32), rows)
    assert len({rows.tobytes() for rows in draw.values()}) == 6


def test_too_few_tokens_for_a_batch() -> None:
    assert data.batch(np.arange(9), 0, 5, 2, 8).tolist() == [list(range(9))] * 2
    with pytest.raises(BadInput, match="the text has 8 tokens, and one window takes 9"):
        data.batch(np.arange(8), 0, 0, 1, 8)
    with pytest.raises(BadInput, match="a seed is 0 or more, not -1"):
        data.batch(np.arange(9), -1, 0, 1, 8)


def test_what_was_seen_is_counted_in_runs_of_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: copied parts count wherever they stand, also over the seams of a long text; one token in 32 changed is not copied."""
    monkeypatch.setattr(data, "PART", 2000)
    random = np.random.default_rng(0)
    train = random.integers(0, 300, 5000).astype(np.uint16)
    for start in (0, 5, 1990, 3700, len(train) - 320):
        assert data.seen(train[start : start + 320], train) == 1
    fresh = random.integers(0, 300, 320).astype(np.uint16)
    assert data.seen(fresh, train) == 0
    assert data.seen(np.concatenate([fresh, train[:320]]), train) == pytest.approx(0.5, abs=0.03)
    changed = train[:320].copy()
    changed[::32] += 1
    assert data.seen(changed, train) == 0
    assert data.seen(train[:20], train) == 0


def test_unigram_baseline() -> None:
    train, validation, lengths = np.array([0, 0, 0, 1]), np.array([0, 1, 2, 2]), np.array([1, 2, 3], np.int32)
    bits = -np.log2([4 / 7, 2 / 7, 1 / 7, 1 / 7]).sum()
    assert data.unigram_bits_per_byte(train, validation, lengths) == pytest.approx(bits / 9)
    uniform = np.repeat(np.arange(256), 5).astype(np.uint16)
    assert data.unigram_bits_per_byte(uniform, uniform, tokenizer.token_bytes(BYTES)) == pytest.approx(8)
    with pytest.raises(BadInput, match="empty"):
        data.unigram_bits_per_byte(train, train[:0], lengths)
