"""Chat templates render as Hugging Face's `apply_chat_template` does, and whatever goes wrong in one is one line."""

import pytest

from kvcascade.cache.errors import BadInput
from kvcascade.model import chat

SAID = [{"role": "user", "content": "it's <b> & é"}]


@pytest.mark.parametrize(
    "template, text",
    [
        ("{{ messages[0].content | tojson }}", '"it\'s <b> & é"'),
        ("{{ [1, 2] | tojson(indent=1) }}", "[\n 1,\n 2\n]"),
        ("{% for i in [1, 2, 3] %}{{ i }}{% if i == 2 %}{% break %}{% endif %}{% endfor %}", "12"),
        ("{% for i in [1, 2, 3] %}{% if i == 2 %}{% continue %}{% endif %}{{ i }}{% endfor %}", "13"),
        ("{% if tools is not none or documents is not none %}no{% endif %}yes", "yes"),
        ("a{% generation %}{{ messages[0].role }}{% endgeneration %}b", "auserb"),
    ],
)
def test_as_apply_chat_template(template, text):
    assert chat.render(template, SAID) == text


@pytest.mark.parametrize(
    "template", ["{{ 1 / 0 }}", "{{ 1 + 'x' }}", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"]
)
def test_any_exception_is_one_line(template):
    with pytest.raises(BadInput, match="the chat template does not work"):
        chat.render(template, SAID)
