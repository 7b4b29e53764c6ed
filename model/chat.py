"""Chat templates: the text that a model was taught to read as a conversation."""

import datetime
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
import jinja2.utils

from kvcascade.cache.errors import BadInput
from kvcascade.model.pretrained import Model

type Message = dict[str, str]
"""`role` (system, user, assistant) and `content`."""

STEPS = 300_000  # lines of a template that may run: a long conversation takes some thousand
LARGEST = 10_000_000  # characters or items that a product in a template may have


def encode(model: Model, messages: list[Message]) -> list[int]:
    """The tokens of a conversation, up to where the model's next answer begins; BadInput for a model without a template.

    The template writes what its text begins and ends with: nothing is added.
    """
    return list(model.encoding.encode(text(model, messages), allowed_special="all"))


def text(model: Model, messages: list[Message]) -> str:
    """The text of a conversation, up to where the model's next answer begins; BadInput for a model without a template."""
    return render(template(model), messages, model.special)


def template(model: Model) -> str:
    """A model's chat template, of several `default` or the only one; BadInput where there is none."""
    templates = model.chat_template
    if not templates:
        raise BadInput(f"{model.name} has no chat template; give it a text to continue")
    if isinstance(templates, dict):
        if "default" not in templates and len(templates) > 1:
            raise BadInput(f"{model.name} has no default chat template, only {', '.join(sorted(templates))}")
        return templates.get("default") or next(iter(templates.values()))
    return templates


def render(
    template: str, messages: list[Message], special: Mapping[str, str | list[str]] = {}, tools: list | None = None
) -> str:
    """Fill a template, in a sandbox, as Hugging Face's `apply_chat_template` does; BadInput if it is broken, endless or refuses the messages.

    `special` are the texts of `bos_token`, `eos_token` and so on; a BOS or EOS that the model has not is undefined, and empty in a sum.
    """
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
    known = {name: _Absent(name=name) for name in ("bos_token", "eos_token")} | dict(special)
    try:
        with _bounded():
            return environment.from_string(template).render(
                messages=messages, tools=tools, documents=None, add_generation_prompt=True, **known
            )
    except BadInput:
        raise
    except Exception as error:  # a template may raise whatever Python code can
        reason = " ".join(str(error).split())
        raise BadInput(f"the chat template does not work: {reason or type(error).__name__}") from error


class _Absent(jinja2.Undefined):
    """A special token that the model has not: undefined, and adds nothing to a text."""

    def __add__(self, other):
        return other

    def __radd__(self, other):
        return other


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """A sandbox whose products cannot fill the memory."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context, operator, left, right):
        sizes = [len(each) if isinstance(each, str | list | tuple) else abs(each) for each in (left, right)]
        sequence = any(isinstance(each, str | list | tuple) for each in (left, right))
        if (operator == "**" and (sizes[0] > 10**6 or sizes[1] > 1000)) or (sequence and sizes[0] * sizes[1] > LARGEST):
            raise OverflowError("a product is too large")
        return super().call_binop(context, operator, left, right)


class _Generation(jinja2.ext.Extension):
    """The block `generation`, which marks in templates what a model is trained to say: it is written as it stands."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


@contextmanager
def _bounded() -> Iterator[None]:
    """Raise TimeoutError once a template has run more than STEPS of its lines."""
    left = STEPS

    def trace(frame, event, arg):
        nonlocal left
        if frame.f_code.co_filename != "<template>":
            return None
        left -= 1
        if left < 0:
            raise TimeoutError(f"it runs more than {STEPS:,} lines")
        if any(len(value) > LARGEST for value in _texts(frame.f_locals.values())):
            raise OverflowError("a text in it is too large")
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def _texts(values: Iterable) -> Iterator[str]:
    for value in values:
        if isinstance(value, str):
            yield value
        elif isinstance(value, jinja2.utils.Namespace):
            yield from _texts(object.__getattribute__(value, "_Namespace__attrs").values())


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _refuse(message: str) -> None:
    raise BadInput(f"the chat template refuses the messages: {' '.join(str(message).split())}")
