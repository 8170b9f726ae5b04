"""Rendering of templates as HTML or Markdown in which whatever a model or a data set says is text, never markup.

Values are escaped unless a template marks them `safe`; control characters are shown as escapes.
"""

import html
import re
from functools import partial
from pathlib import Path

from edu.config.terminal import printable

TEMPLATES = Path(__file__).with_name("templates")
# Characters that begin markup; an underscore within a word, or a bracket that begins no link, is text anyway.
_MARKUP = re.compile(r"[\\|*`~]|(?<!\w)_|_(?!\w)|\](?=[(\[:])|!(?=\[)|^(?=[#+-])")


def render(name: str, **values: object) -> str:
    """Return a template of this wing, by its file's name, filled with values; `.html` or `.md` says how they are escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    page = ".html" in name
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        autoescape=page,
        finalize=partial(_finalize, page),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["code_block"] = code_block
    return environment.get_template(name).render(**values)


def _finalize(page: bool, value: object) -> object:
    """Escape a value on its way into a template; jinja itself escapes what goes into a page."""
    if hasattr(value, "__html__"):  # marked safe
        return value
    return printable(value) if page else markdown(value)


def markdown(value: object) -> str:
    """Return text on one line of Markdown, with nothing in it taken for markup.

    >>> print(markdown("a|b <|bos|> max_steps [x](y)"))
    a\\|b &lt;\\|bos\\|&gt; max_steps [x\\](y)
    """
    return _MARKUP.sub(r"\\\g<0>", html.escape(printable(value), quote=False)).replace("\n", "<br>").replace("\t", " ")


def code_block(value: object) -> str:
    """Return text as an indented code block of Markdown, which a template may mark `safe`."""
    return "    " + printable(value).replace("\n", "\n    ")
