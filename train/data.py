"""Text to tokens to batches: corpora, their tokens kept on disk, and batches that are a function of (seed, step)."""

import contextlib
import difflib
import functools
import hashlib
import itertools
import logging
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
import datasets.config
import huggingface_hub
import numpy as np
import tiktoken
from jaxtyping import Int32, Integer

from kvcascade.cache.errors import BadInput
from kvcascade.kernels.files import cache_dir
from kvcascade.model import tokenizer
from kvcascade.model.vocabulary import FileTokenizer
from kvcascade.train import text_files

HUB = {
    "wikitext-2": ("Salesforce/wikitext", "wikitext-2-raw-v1"),
    "wikitext-103": ("Salesforce/wikitext", "wikitext-103-raw-v1"),
}
LONGEST = 200_000  # characters for tiktoken at once: it aborts on a million spaces in a row
HEADING = re.compile(r"^ = (?!=)[^\n]*[^=\n] = ?$", re.MULTILINE)
RUN = 32  # tokens in a row: so many are the same in two texts only where one was copied
PART = 2**20  # tokens looked through at once
HUB_SECONDS = 3.0  # for each address of the hub, of which there are a few

# Not text that a model could learn from, or not the same on every machine:
# `encodings` is generated code pages (1.3 MB) and codecs that are copies of one another, which would end up in both
# splits; `pydoc_data` is read topic by topic; `_sysconfigdata` and `sitecustomize` tell how this Python was built;
# `html/entities.py` is a table. Tests are left out for their tables and copies, and some distributions lack them.
EXCLUDED_FOLDERS = re.compile(r"__pycache__|(site|dist)-packages|config-.*|test|tests|idle_test|encodings|pydoc_data")
EXCLUDED_FILES = re.compile(r"_sysconfigdata.*|sitecustomize\.py|html/entities\.py")


@dataclass(frozen=True)
class Text:
    """A corpus in two splits that share no document; each row of a split has its document in the column `text`."""

    name: str
    train: datasets.Dataset
    validation: datasets.Dataset


def load(source: str) -> Text:
    """Load a corpus: `stdlib`, `file:PATH`, or a Hugging Face data set as `NAME` or `NAME:CONFIG`.

    Raises BadInput if there is no such corpus, it cannot be had offline, or it holds no text.
    """
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # it logs what it also raises, and the user is to see one line
    if source == "stdlib":
        return _load_stdlib()
    if source.startswith("file:"):
        return _split(source, datasets.Dataset.from_dict({"text": text_files.documents(source)}))
    return _load_hub(source)


def unseen(source: str) -> datasets.Dataset:
    """Load text to evaluate on that nothing was trained on: all of a file as one document, else the validation split."""
    if not source.startswith("file:"):
        return load(source).validation
    whole = "\n".join(text.removesuffix("\n") for text in text_files.documents(source))
    return datasets.Dataset.from_dict({"text": [whole]})


def fingerprint(text: Text) -> str:
    """Return the content key of a corpus, which another character in either split changes."""
    train = text.train["text"][:]
    return tokenizer.content_key([*train, *text.validation["text"][:]], f"{len(train)} documents to train on")


def seen(tokens: Integer[np.ndarray, " T"], train: Integer[np.ndarray, " U"]) -> float:
    """Return the share of a text, cut into runs of 32 tokens, that stands word for word somewhere in a training text: 0 to 1."""
    wanted = np.unique(_run_hashes(tokens)[::RUN])
    if not len(wanted):
        return 0.0
    found = np.zeros(len(wanted), bool)
    for start in range(0, len(train), PART):
        hashes = _run_hashes(train[start : start + PART + RUN - 1])
        places = np.searchsorted(wanted, hashes).clip(max=len(wanted) - 1)
        found[places[wanted[places] == hashes]] = True
    return float(found.mean())


def _run_hashes(tokens: Integer[np.ndarray, " T"]) -> Integer[np.ndarray, " S"]:
    """The hash of the RUN tokens from each place on: a polynomial in 64 bits, from two halves five times."""
    hashes, width, base = tokens.astype(np.uint64), 1, 0x9E3779B97F4A7C15
    while width < RUN:
        hashes = hashes[:-width] * np.uint64(base) + hashes[width:]
        width, base = 2 * width, base * base % 2**64
    return hashes


def encoding_for(text: Text, name: str, vocab: int) -> tiktoken.Encoding:
    """Return the tokeniser that `tokenizer.make` gives for the training split; a trained one is kept in the cache."""
    return tokenizer.make(name, text.train["text"][:], vocab, cache_dir())


def tokenize(dataset: datasets.Dataset, encoding: tokenizer.Tokenizer) -> Integer[np.ndarray, " T"]:
    """Return the tokens of all documents in order, each document ending in a newline.

    The array is read-only, uint16 for up to 65536 tokens and uint32 above. It is kept in `cache_dir()`
    under a key of the texts and the tokeniser, and made anew if the file there is damaged.
    """
    dtype = np.dtype("<u2" if encoding.n_vocab <= 2**16 else "<u4")
    texts = dataset["text"][:]  # a list; going through the column row by row is a hundred times slower
    path = cache_dir() / f"tokens-{tokenizer.content_key(texts, tokenizer.fingerprint(encoding))}"
    raw = _read(path)
    if raw is None:
        lines = (text if text.endswith("\n") else text + "\n" for text in texts)
        whole = isinstance(encoding, FileTokenizer) and encoding.whole
        parts = lines if whole else (part for line in lines for part in _parts(line))
        pieces = [encoding.encode_to_numpy(part, disallowed_special=()).astype(dtype) for part in parts]
        raw = np.concatenate([np.empty(0, dtype), *pieces]).tobytes()
        tokenizer.keep(path, hashlib.sha256(raw).digest() + raw)
    return np.frombuffer(raw, dtype)


def document_starts(
    dataset: datasets.Dataset, tokens: Integer[np.ndarray, " T"], lengths: Integer[np.ndarray, " V"]
) -> Integer[np.ndarray, " D"]:
    """Where each document of a text begins in its tokens; `lengths` is in bytes per token.

    Documents are the data set's rows; in a text with WikiText's headings (` = Title = `) its articles.
    """
    texts = [text if text.endswith("\n") else text + "\n" for text in dataset["text"][:]]
    whole = "".join(texts)
    headings = [match.start() for match in HEADING.finditer(whole)]
    if len(headings) > 1:
        places = [0, *(headings if whole[: headings[0]].strip() else headings[1:])]
        sizes = [len(whole[start:stop].encode()) for start, stop in itertools.pairwise([*places, len(whole)])]
    else:
        sizes = [len(text.encode()) for text in texts]
    ends = np.cumsum(lengths[tokens], dtype=np.int64)
    # A tokeniser that changes its text, say the number of spaces, tells it in a few bytes more or less.
    offsets = np.cumsum([0, *sizes[:-1]]) * (ends[-1] / max(1, sum(sizes)))
    return np.searchsorted(ends, offsets, side="right")


def _parts(text: str) -> Iterator[str]:
    """The text in parts of at most LONGEST characters, cut between two words: every tokeniser starts one with the space before it."""
    start = 0
    while len(text) - start > LONGEST:
        end = start + LONGEST
        # From the end of the part backwards, for the last place where a letter is followed by a space and a letter.
        back = re.search(r"[^\W\d_] (?=[^\W\d_])", text[end:start:-1])
        end = end - back.end() + 1 if back else end
        yield text[start:end]
        start = end
    yield text[start:]


def windows(tokens: Integer[np.ndarray, " T"], context: int, count: int) -> Int32[np.ndarray, "{count} {context}"]:
    """Return the first `count` windows of `context` consecutive tokens, one after the other without overlap.

    Raises BadInput if the tokens are too few, or nothing is asked for.
    """
    if count < 1 or context < 1:
        raise BadInput(f"{count} windows of {context} tokens are none")
    there = len(tokens) // context
    if there < count:
        raise BadInput(f"{count} windows of {context} tokens were asked for, but the text has {there}")
    return tokens[: count * context].reshape(count, context).astype(np.int32)


def batch(
    tokens: Integer[np.ndarray, " T"], seed: int, step: int, batch_size: int, context: int
) -> Int32[np.ndarray, "{batch_size} {context}+1"]:
    """Return the training batch of a step, a pure function of its arguments: inputs and targets overlap in a row.

    An epoch lays a grid of windows over the tokens and visits each once, in an order drawn from (seed, epoch). The next
    epoch shifts the grid, so that the rows of a batch are distinct windows wherever the corpus has that many; after
    `context` epochs every start was visited once, but for fewer than `context` tokens at the end of the corpus.
    Raises BadInput if not even one window fits, or the seed is negative.
    """
    if seed < 0:
        raise BadInput(f"a seed is 0 or more, not {seed}")
    if len(tokens) <= context:
        raise BadInput(f"the text has {len(tokens)} tokens, and one window takes {context + 1}")
    per_epoch = max(1, (len(tokens) - context) // context)  # as many as fit at any shift: a step tells its epoch
    shifts = min(context, len(tokens) - per_epoch * context)
    epochs, places = np.divmod(step * batch_size + np.arange(batch_size), per_epoch)
    starts = np.empty(batch_size, np.int64)
    for epoch in np.unique(epochs).tolist():
        rows = epochs == epoch
        shift = _permutation(seed, 0, shifts)[epoch % shifts]
        starts[rows] = shift + context * _permutation(seed, epoch + 1, per_epoch)[places[rows]]
    return tokens[starts[:, None] + np.arange(context + 1)].astype(np.int32)


def unigram_bits_per_byte(
    train_tokens: Integer[np.ndarray, " T"],
    validation_tokens: Integer[np.ndarray, " U"],
    lengths: Integer[np.ndarray, " V"],
) -> float:
    """Return the loss, in bits per byte, of a model that knows only how often each token occurs in the training text.

    Counts are smoothed by adding one; `lengths` is in bytes per token. Raises BadInput if nothing is to be predicted.
    """
    if not len(validation_tokens):
        raise BadInput("the validation text is empty")
    counts = np.bincount(train_tokens, minlength=len(lengths)) + 1
    bits = np.log2(counts.sum()) - np.log2(counts)
    return float(bits[validation_tokens].mean() / lengths[validation_tokens].mean())


@functools.lru_cache(maxsize=8)
def _permutation(seed: int, stream: int, length: int) -> Integer[np.ndarray, " length"]:
    return np.random.default_rng([seed, stream]).permutation(length)


def _load_stdlib() -> Text:
    root = Path(sysconfig.get_paths()["stdlib"])
    documents: dict[str, str] = {}
    for folder, folders, files in root.walk():
        folders[:] = [name for name in folders if not EXCLUDED_FOLDERS.fullmatch(name)]
        for path in (folder / name for name in files if name.endswith((".py", ".txt"))):
            name = path.relative_to(root).as_posix()
            if not EXCLUDED_FILES.fullmatch(name):
                with contextlib.suppress(UnicodeDecodeError):  # a few modules are in another encoding on purpose
                    documents[name] = path.read_text("utf-8")
    if (root / "pydoc_data" / "topics.py").is_file():
        documents |= _language_reference()
    documents = {name: text for name, text in sorted(documents.items()) if text.strip()}
    if sum(map(len, documents.values())) < 10**6:
        raise BadInput("this Python's standard library has no sources to read; use file:PATH instead of stdlib")

    def split(held_out: bool) -> datasets.Dataset:
        # By a hash of its name, a file is on the same side in every version of Python.
        names = [name for name in documents if (hashlib.sha256(name.encode()).digest()[0] < 18) == held_out]
        return datasets.Dataset.from_dict({"path": names, "text": [documents[name] for name in names]})

    return Text("stdlib", split(False), split(True))


def _language_reference() -> dict[str, str]:
    # A topic may be a part of a longer one, word for word: only those mostly not seen before count, the longest first.
    from pydoc_data.topics import topics

    kept: dict[str, str] = {}
    seen = ""
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        text = topics[name]
        if sum(len(paragraph) for paragraph in text.split("\n\n") if paragraph in seen) < len(text) / 2:
            kept[f"pydoc_data/topics.py/{name}"] = text
            seen += text
    return kept


def _load_hub(source: str) -> Text:
    name, _, config = source.partition(":")
    repository, config = HUB.get(source, (name, config or None))
    close = difflib.get_close_matches(source, ["stdlib", *HUB], n=1)
    hint = f"; did you mean {close[0]}?" if close and source not in HUB else ""
    if Path(repository).exists():
        raise BadInput(f"{source} is a path; a file of text is given as file:{source}")
    offline = False
    try:
        # Asked first because datasets itself tries for 25 seconds before it gives up.
        huggingface_hub.HfApi().dataset_info(repository, timeout=HUB_SECONDS)
    except (huggingface_hub.errors.RepositoryNotFoundError, huggingface_hub.errors.HFValidationError) as error:
        raise BadInput(f"{source}: the Hugging Face hub has no such data set that you may read{hint}") from error
    except Exception:  # whatever the transport raises; a copy from an earlier download may still be here
        offline = True
    try:
        with _offline() if offline else contextlib.nullcontext():
            splits = datasets.load_dataset(repository, config)
    except Exception as error:
        reason = _first_line(error)
        if offline:
            reason = f"the Hugging Face hub cannot be reached; stdlib and file:PATH work offline{hint}"
        raise BadInput(f"{source}: {reason}") from error
    if "train" not in splits:
        raise BadInput(f"{source}: there is no split called train, only {', '.join(map(str, splits))}")
    if "validation" not in splits:
        return _split(source, splits["train"])
    return Text(source, _texts(source, splits["train"]), _texts(source, splits["validation"]))


def _texts(source: str, rows: datasets.Dataset) -> datasets.Dataset:
    if "text" not in rows.column_names:
        raise BadInput(f"{source}: there is no column called text, only {', '.join(rows.column_names)}")
    if (dtype := getattr(rows.features["text"], "dtype", "nested")) not in {"string", "large_string", "string_view"}:
        raise BadInput(f"{source}: the column called text holds {dtype}, not strings")
    rows = rows.select_columns("text")
    if rows.data.column("text").null_count:
        rows = rows.select([i for i, text in enumerate(rows["text"][:]) if text is not None])
    if not any(text.strip() for text in rows["text"][:]):
        raise BadInput(f"{source}: there is no text in it")
    return rows


def _split(source: str, rows: datasets.Dataset) -> Text:
    rows = _texts(source, rows)
    if len(rows) >= 20:
        held_out = range(19, len(rows), 20)
        return Text(source, rows.select([i for i in range(len(rows)) if i % 20 != 19]), rows.select(held_out))
    whole = "\n".join(rows["text"][:])
    cut = len(whole) * 9 // 10
    if not whole[:cut].strip() or not whole[cut:].strip():
        raise BadInput(f"{source}: {len(whole)} characters are too few to train on some and validate on others")
    return Text(source, *(datasets.Dataset.from_dict({"text": [part]}) for part in (whole[:cut], whole[cut:])))


def _read(path: Path) -> bytes | None:
    try:
        content = path.read_bytes()
    except OSError:
        return None
    return content[32:] if hashlib.sha256(content[32:]).digest() == content[:32] else None


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    before = datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE = before


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
