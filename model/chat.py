"""Chat templates: the text that a model was taught to read as a conversation."""

import datetime
import json
from collections.abc import Mapping

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from kvcascade.cache.errors import BadInput
from kvcascade.model.pretrained import Model

type Message = dict[str, str]
"""`role` (system, user, assistant) and `content`."""


def encode(model: Model, messages: list[Message]) -> list[int]:
    """The tokens of a conversation, up to where the model's next answer begins; BadInput for a model without a template."""
    if not model.chat_template:
        raise BadInput(f"{model.name} has no chat template; give it a text to continue")
    return list(model.encoding.encode(render(model.chat_template, messages, model.special), allowed_special="all"))


def render(template: str, messages: list[Message], special: Mapping[str, str] = {}) -> str:
    """Fill a template, in a sandbox, as Hugging Face's `apply_chat_template` does; BadInput if it is broken or refuses the messages.

    `special` are the texts of `bos_token` and `eos_token`; one that the model has not is empty.
    """
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _refuse,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
    }
    try:
        known = {"bos_token": "", "eos_token": "", **special}
        return environment.from_string(template).render(
            messages=messages, tools=None, documents=None, add_generation_prompt=True, **known
        )
    except BadInput:
        raise
    except Exception as error:  # a template may raise whatever Python code can
        raise BadInput(f"the chat template does not work: {error or type(error).__name__}") from error


class _Generation(jinja2.ext.Extension):
    """The block `generation`, which marks in templates what a model is trained to say: it is written as it stands."""

    tags = frozenset({"generation"})

    def parse(self, parser):
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    raise BadInput(f"the chat template refuses the messages: {message}")
