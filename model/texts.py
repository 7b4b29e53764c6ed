"""What a model's files say about text: its tokeniser, what a text begins and ends with, its special tokens and chat templates."""

import dataclasses
from pathlib import Path
from typing import Any

import gguf

from kvcascade.cache.errors import BadInput
from kvcascade.model import tokenizer
from kvcascade.model.metadata import Metadata
from kvcascade.model.tokenizer import Tokenizer
from kvcascade.model.vocabulary import BEGIN, PREFIX

KINDS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
# Texts of tokens that end an answer wherever a model has them as special tokens, after llama.cpp.
ENDS = {
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>", "<|endoftext|>", "</s>",
    "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>",
    "<｜end▁of▁sentence｜>", "[e~[",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Texts:
    """The fields of a `Model` that are about text."""

    encoding: Tokenizer
    chat_template: str | dict[str, str] | None
    special: dict[str, str | list[str]]
    before: tuple[int, ...]
    after: tuple[int, ...]
    bos: int | None
    end: frozenset[int]


def from_gguf(fields: dict[str, Any], source: str, vocab: int) -> Texts:
    """Read what a GGUF's metadata say, for a model with rows for so many tokens; BadInput for what is missing, wrong or past them."""
    encoding = tokenizer.from_gguf(fields, source)
    _check_vocabulary(encoding, vocab, source)
    table = Metadata(fields, source)
    ggml = Metadata({key.removeprefix(PREFIX): fields[key] for key in fields if key.startswith(PREFIX)}, source, PREFIX)
    names = ggml.texts("tokens")
    llama = ggml.text("model") == "llama"
    default = {"unk": 0, "bos": 1, "eos": 2} if llama else {}  # llama.cpp's
    ids = {kind: ggml.whole(f"{_KEYS.get(kind, kind)}_token_id", None, least=0, most=vocab - 1) for kind in KINDS}
    ids = {kind: default.get(kind) if ids[kind] is None else ids[kind] for kind in KINDS}
    ids = {kind: token for kind, token in ids.items() if token is not None and token < len(names)}
    more = (ggml.whole(f"{kind}_token_id", None, least=0, most=vocab - 1) for kind in ("eot", "eom"))
    kinds = ggml.wholes("token_type", [gguf.TokenType.NORMAL] * len(names))
    special = {index for index, kind in enumerate(kinds) if kind == gguf.TokenType.CONTROL}
    end = {ids.get("eos"), *more} | _ends({names[index]: index for index in special})
    add_bos = ggml.flag("add_bos_token", llama or ggml.text("pre", "default") in BEGIN)
    add_eos = ggml.flag("add_eos_token", False)
    template = table.text("tokenizer.chat_template", None)
    named = {key.removeprefix(_NAMED): table.text(key) for key in table if key.startswith(_NAMED)}
    if template is not None and named:
        named["default"] = template
    return Texts(
        encoding,
        named or template,
        {f"{kind}_token": names[token] for kind, token in ids.items()},
        (ids["bos"],) if add_bos and "bos" in ids else (),
        (ids["eos"],) if add_eos and "eos" in ids else (),
        ids.get("bos"),
        frozenset(token for token in end if token is not None),
    )


_NAMED = "tokenizer.chat_template."
_KEYS = {"unk": "unknown", "sep": "seperator", "pad": "padding"}  # as GGUF spells them


def from_directory(folder: Path, config: Metadata, vocab: int) -> Texts:
    """Read what a directory's tokenizer.json, tokenizer_config.json, generation_config.json and templates say; BadInput as above."""
    encoding = tokenizer.HubTokenizer(folder / "tokenizer.json")
    _check_vocabulary(encoding, vocab, str(folder))
    settings = Metadata.read(folder / "tokenizer_config.json", optional=True)
    older = Metadata.read(folder / "special_tokens_map.json", optional=True)
    special: dict[str, str | list[str]] = {}
    for kind in (f"{kind}_token" for kind in KINDS):
        text = next((text for text in (_text(table, kind) for table in (settings, older)) if text is not None), None)
        if text is not None:
            special[kind] = text
    if "additional_special_tokens" in settings:
        several = settings.many(
            "additional_special_tokens", of="texts or tokens", right=lambda value: _content(value) is not None
        )
        special["additional_special_tokens"] = [_content(value) or "" for value in several]
    bos, eos = (encoding.id_of(str(special.get(kind, ""))) for kind in ("bos_token", "eos_token"))
    before, after = encoding.before, encoding.after
    add_bos, add_eos = settings.flag("add_bos_token", None), settings.flag("add_eos_token", None)
    if add_bos is not None or add_eos is not None:
        # As transformers does, one that is set takes the place of the tokenizer.json's own.
        before = (bos,) if add_bos and bos is not None else ()
        after = (eos,) if add_eos and eos is not None else ()
    end = {eos} | _ends({encoding.text_of(token): token for token in encoding.special_tokens})
    for table in (Metadata.read(folder / "generation_config.json", optional=True), config):
        end |= set(_ids(table, "eos_token_id", vocab))
    if bos is None and (ids := _ids(config, "bos_token_id", vocab)):
        bos = ids[0]
    end = frozenset(token for token in end if token is not None)
    return Texts(encoding, _templates(folder, settings), special, before, after, before[0] if before else bos, end)


def _ids(table: Metadata, key: str, vocab: int) -> list[int]:
    """A token's number, or several."""
    if isinstance(table.content.get(key), list):
        return list(table.wholes(key, most=vocab - 1))
    token = table.whole(key, None, least=0, most=vocab - 1)
    return [] if token is None else [token]


def _content(value: object) -> str | None:
    """The text of a special token, which is there as text or with more about it."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _text(table: Metadata, key: str) -> str | None:
    return _content(
        table.take(key, None, "a text or a token with its content", lambda value: _content(value) is not None)
    )


def _templates(folder: Path, settings: Metadata) -> str | dict[str, str] | None:
    """The chat template, or several by their names: from files of their own, else from tokenizer_config.json."""
    files = {"default": folder / "chat_template.jinja"}
    files |= {file.stem: file for file in sorted(folder.glob("additional_chat_templates/*.jinja"))}
    try:
        found = {name: file.read_text("utf-8") for name, file in files.items() if file.is_file()}
    except (OSError, ValueError) as error:
        raise BadInput(f"cannot read a chat template of {folder}: {error}") from error
    if found:
        return found
    if not isinstance(settings.content.get("chat_template"), list):
        return settings.text("chat_template", None)
    right = lambda value: (
        isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("name", "template"))
    )
    several = settings.many("chat_template", of="templates with a name", right=right)
    return {each["name"]: each["template"] for each in several}


def _ends(special: dict[str, int]) -> set[int]:
    """The tokens that end an answer by their text."""
    found = {text for text in special if text in ENDS}
    if found >= {"<|return|>", "<|call|>"} or found >= {"<|calls|>", "<|flush|>"}:
        found.discard("<|end|>")  # there it ends a part of an answer
    return {special[text] for text in found}


def _check_vocabulary(encoding: Tokenizer, vocab: int, name: str) -> None:
    if encoding.n_vocab > vocab:
        raise BadInput(
            f"{name}: the tokenizer has tokens up to {encoding.n_vocab - 1}, but the model only {vocab} rows for them"
        )
