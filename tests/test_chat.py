"""Chat templates: as transformers renders them, and everything that can be wrong with one."""

import json
from pathlib import Path

import pytest
import tiny_models
from hypothesis import given
from hypothesis import strategies as st

from kvcascade.cache.errors import BadInput
from kvcascade.model import chat, pretrained

GOLDEN = json.loads(Path(__file__).with_name("golden_chats.json").read_text("utf-8"))  # made by make_golden_chats.py
USER = [{"role": "user", "content": "it's <b> & é"}]


@pytest.mark.parametrize("name", GOLDEN["templates"])
def test_renders_as_transformers(name):
    """Every conversation, with and without tools, gives the same text, or is refused."""
    cases = [each for each in GOLDEN["rendered"] if each["template"] == name]
    assert len(cases) == 8
    for case in cases:
        tools = GOLDEN["tools"] if case["tools"] else None
        render = lambda tools=tools, case=case: chat.render(
            GOLDEN["templates"][name], GOLDEN["chats"][case["chat"]], GOLDEN["special"], tools
        )
        if case["text"] is None:
            with pytest.raises(BadInput):
                render()
        else:
            assert render() == case["text"]


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ messages[0].content | tojson }}", '"it\'s <b> & é"'),
        ("{{ [1, 2] | tojson(indent=1) }}", "[\n 1,\n 2\n]"),
        ("{% for i in [1, 2, 3] %}{{ i }}{% if i == 2 %}{% break %}{% endif %}{% endfor %}", "12"),
        ("{% for i in [1, 2, 3] %}{% if i == 2 %}{% continue %}{% endif %}{{ i }}{% endfor %}", "13"),
        ("{% if tools is not none or documents is not none %}no{% endif %}yes", "yes"),
        ("a{% generation %}{{ messages[0].role }}{% endgeneration %}b", "auserb"),
    ],
)
def test_what_templates_use(template, text):
    assert chat.render(template, USER) == text


def test_a_special_token_that_a_model_has_not_adds_nothing():
    assert chat.render("{{ 'a' + eos_token }}{{ bos_token + 'b' }}{{ eos_token is defined }}", USER) == "abFalse"
    special = {"additional_special_tokens": ["<x>", "<y>"]}
    assert chat.render("{{ additional_special_tokens[1] }}", USER, special) == "<y>"


@pytest.mark.parametrize(
    ("template", "words"),
    {
        "{{ 'a' + 1 }}": "can only concatenate",
        "{{ 1 // 0 }}": "zero",
        "{{ range(10 ** 9) | list }}": "Range too big",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "recursion",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}": "more than 3,000 lines",
        "{{ 'x' * 10 ** 11 }}": "too large",
        "{{ [0] * 10 ** 9 }}": "too large",
        "{{ 10 ** 10 ** 10 }}": "too large",
        "{% set n = namespace(x='xx') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}": "too large",
        "{% if %}": "Expected an expression",
        "{{ x.y.z }}": "'x' is undefined",
        "{{ ''.__class__.__mro__ }}": "unsafe",
        "{{ raise_exception('no\n  more') }}": "refuses the messages: no more",
        "{{ messages[0].content | nofilter }}": "nofilter",
        "{% break %}": "break",
    }.items(),
)
def test_a_template_that_does_not_work_is_one_line(template, words, monkeypatch):
    monkeypatch.setattr(chat, "STEPS", chat.STEPS // 100)
    with pytest.raises(BadInput) as caught:
        chat.render(template, USER)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_named_templates(tmp_path):
    """The default, else the only one, else a line with their names; from tokenizer_config.json and from files, which come first."""
    folder = tiny_models.write("llama", tmp_path)

    def encoded(*names: str) -> list[int]:
        several = [{"name": name, "template": f"{name} {{{{ messages[0].content }}}}"} for name in names]
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
        model = pretrained.load(str(folder))
        return list(model.encoding.decode_bytes(chat.encode(model, USER)))

    assert bytes(encoded("rag", "default")).startswith(b"default it's")
    assert bytes(encoded("rag")).startswith(b"rag it's")
    with pytest.raises(BadInput, match="no default chat template, only rag, tools"):
        encoded("tools", "rag")
    with pytest.raises(BadInput, match="has no chat template"):
        encoded()
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("a file")
    assert bytes(encoded("default")) == b"a file"
    (folder / "chat_template.jinja").write_text("the file: é", "utf-8")
    assert bytes(encoded("default")).decode() == "the file: é"


PIECES = [
    "{% for m in messages %}", "{% endfor %}", "{% if x %}", "{% else %}", "{% endif %}", "{{ ", " }}", "messages", "[0]", ".content", "| tojson",
    "| join(9)", " + ", "1", "'a'", "range(99999)", "{% set x = ", " %}", "{% break %}", "{% generation %}", "{% endgeneration %}", "{#", "#}",
    "loop.index", "* 99999", "** 9", "namespace(a=1)", "{% macro f(a) %}", "{% endmacro %}", "f(f)", "| list", "strftime_now('%s')", "\n", "bos_token",
    "raise_exception(1)", "{% include 'x' %}", "{% import 'x' as y %}", "| groupby('a')", "| batch(0)", "| format(1)", "| map('f')", "(", ")", "~", "{%",
]  # fmt: skip


@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=12).map("".join))
def test_any_text_is_a_template_or_one_line(template):
    try:
        assert isinstance(chat.render(template, USER), str)
    except BadInput as error:
        assert "\n" not in str(error)
