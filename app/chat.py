"""A chat as the one text that a model continues: its own chat template, rendered in a sandbox. Reads small files; no torch.

The template comes with the model and is not trusted: it runs in Jinja's immutable sandbox, as transformers runs it.
"""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from bitpress.engine.errors import BitpressError, InputError
from bitpress.engine.model import library

Message = dict[str, str]  # role, content


def template_of(model: str) -> str | None:
    """The chat template of a model that is ready, None for one that only continues text."""
    try:
        folder = library.model_path(model)
    except BitpressError:
        return None
    alone = folder / "chat_template.jinja"
    if alone.is_file():
        return alone.read_text(encoding="utf8")
    template = _tokenizer_config(str(folder)).get("chat_template")
    return template if isinstance(template, str) else None


@lru_cache(maxsize=16)
def _tokenizer_config(folder: str) -> dict[str, Any]:
    try:
        return json.loads((Path(folder) / "tokenizer_config.json").read_text(encoding="utf8"))
    except (OSError, ValueError):
        return {}


def render(model: str, messages: list[Message]) -> str:
    """The messages as text, ending where the model's answer begins. Raises InputError when the template cannot take them."""
    template = template_of(model)
    if template is None:
        raise InputError(f"{model} has no chat template.", "It was trained to continue text.", "Choose completion.")
    sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    sandbox.globals["raise_exception"] = _refuse
    config = _tokenizer_config(str(library.model_path(model)))
    marks = {name: _text(config.get(name)) for name in ("bos_token", "eos_token")}
    try:
        return sandbox.from_string(template).render(messages=messages, add_generation_prompt=True, **marks)
    except TemplateError as error:
        raise InputError("The model's chat template cannot take this chat.", f"{error}", "Choose completion.") from error


def _refuse(reason: str) -> None:
    """What a template calls when it cannot take the messages."""
    raise TemplateError(reason)


def _text(token: Any) -> str:
    """A special token, which a configuration writes as text or as a mapping."""
    return str(token.get("content", "")) if isinstance(token, dict) else str(token or "")
