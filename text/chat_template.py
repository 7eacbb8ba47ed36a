"""Chat templates. A checkpoint's template renders a conversation as a text in the form on which the model was trained.

    render(template, {"eos_token": "</s>"}, [{"role": "user", "content": "Hello"}], add_generation_prompt=True)

A template is a jinja2 program by an unknown author, so render runs it in a sandbox with limited time and memory.
"""

import contextlib
import json
import re
import signal
import threading
from collections.abc import Iterator
from datetime import datetime
from functools import cache

from jinja2 import Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from utils.errors import UsageError

# For checkpoints of Llama 2 and Mistral that have no template
LLAMA2_TEMPLATE = """
{%- if messages[0].role == 'system' -%}
{%- set begin, messages = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n', messages[1:] -%}
{%- endif -%}
{%- for m in messages -%}
{%- if m.role == 'user' -%}
{{ bos_token + '[INST] ' + (begin if loop.first and begin else '') + m.content + ' [/INST]' }}
{%- else -%}
{{ ' ' + m.content + ' ' + eos_token }}
{%- endif -%}
{%- endfor -%}"""
ROLES = ("system", "user", "assistant")
MAX_SECONDS = 10  # to render one conversation
MAX_REPEATED = 10**6  # characters or list items that one multiplication in a template may make


def render(template: str, names: dict[str, str], messages: list[dict], add_generation_prompt: bool) -> str:
    """Renders messages with transformers' variables and functions. names: the texts of special tokens, by a name such
    as bos_token."""
    values = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
    try:
        with time_limit(MAX_SECONDS):
            text = compile_template(template).render(names | values)
        check_unicode(text, "what it renders")
        return text
    except Exception as e:  # a template is a program and fails like one
        why = " ".join(str(e).split()) or type(e).__name__
        raise UsageError(f"the checkpoint's chat template failed: {why}") from None


def read_message(message) -> dict:
    """Returns a message from a user as {"role": ..., "content": text}. Raises UsageError. As in OpenAI's API, content
    may be a list of parts {"type": "text", "text": ...}, and the role "developer" means "system"."""
    try:
        role, content = message["role"], message["content"]
        if isinstance(content, list):
            content = "\n".join(part["text"] for part in content)
    except (KeyError, TypeError):
        role = content = None
    role = "system" if role == "developer" else role
    if role not in ROLES or not isinstance(content, str):
        must = f"a message must have a role ({', '.join(ROLES)}) and a text as content"
        raise UsageError(f"{must}, not {message!r:.80}")
    check_unicode(content, "a message")
    return {"role": role, "content": content}


def check_unicode(text: str, name: str):
    """Raises UsageError if text contains half of a surrogate pair: UTF-8 cannot encode it. name: what the error calls
    the text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{name} is not valid UTF-8") from None


@cache
def compile_template(template: str) -> Template:
    # {% generation %} marks the model's words for training. Replace it with {% with %}, which only opens a scope.
    template = re.sub(r"(\{%[-+]?\s*(?:end)?)generation(\s*[-+]?%\})", r"\1with\2", template)
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    # A single power or product may use all time or memory, and the time limit cannot interrupt it.
    env.intercepted_binops = frozenset({"**", "*"})
    env.binop_table |= {"**": refuse_power, "*": multiply}
    env.filters["tojson"] = to_json
    env.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return env.from_string(template)


def raise_exception(message):
    raise TemplateError(message)


def strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """The filter tojson. Jinja's own filter escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def refuse_power(a, b):
    raise TemplateError("it computes a power")


def multiply(a, b):
    """Computes a * b. Refuses to repeat a text or a list to more than MAX_REPEATED items."""
    is_number = [isinstance(x, (int, float)) for x in (a, b)]
    if not all(is_number):
        sizes = [x if number else len(x) for x, number in zip((a, b), is_number, strict=True)]
        if sizes[0] * sizes[1] > MAX_REPEATED:
            raise TemplateError("it makes a text of millions of characters")
    return a * b


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raises TemplateError if this context takes longer than seconds. Only the main thread has a limit, because only it
    receives signals."""

    def stop(signum, frame):
        raise TemplateError(f"it takes more than {seconds} s")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
