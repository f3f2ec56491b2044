"""What pages show: Markdown as HTML that is safe whoever wrote it, and places in texts as browsers count them."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import nh3
from markdown_it import MarkdownIt
from markdown_it.token import Token
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.util import ClassNotFound

TAGS = set(
    [
        "a",
        "p",
        "br",
        "hr",
        "em",
        "strong",
        "s",
        "del",
        "code",
        "pre",
        "blockquote",
        "ul",
        "ol",
        "li",
        "h1",
        "h2",
        "h3",
        "h4",
        "h5",
        "h6",
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
    ]
)
TAGS |= {"div", "span"}  # of highlighted code
_CODE = HtmlFormatter(nowrap=True, classprefix="hl-")
_ALIGNED = {"text-align:left": "left", "text-align:center": "center", "text-align:right": "right"}


def _highlighted(code: str, language: str, _: str) -> str:
    """Returns the code as HTML, or an empty string where nobody knows the language: it is then shown as it is."""
    try:
        return highlight(code, get_lexer_by_name(language), _CODE) if language else ""
    except ClassNotFound:
        return ""


_MARKDOWN = MarkdownIt("js-default", {"html": False, "linkify": False, "highlight": _highlighted})
_MARKDOWN.disable("image")  # a picture would be fetched from a stranger


def _attribute(tag: str, name: str, value: str) -> str | None:
    """Returns the attribute as it may stay, or None."""
    if name == "class":
        return " ".join(each for each in value.split() if each.startswith(("hl-", "language-"))) or None
    return value


@lru_cache(maxsize=2048)
def render(markdown: str) -> str:
    """Returns the text as HTML: no script, style, picture, frame or form, and links that lead to http, https or mailto.

    What comes out of the Markdown is cleaned last, so that nothing before has to be trusted.
    """
    tokens: Sequence[Token] = _MARKDOWN.parse(markdown)
    for token in tokens:  # a page without inline styles aligns cells by attribute
        style = token.attrs.pop("style", None)
        if style in _ALIGNED:
            token.attrs["align"] = _ALIGNED[str(style)]
    options: Any = _MARKDOWN.options
    return nh3.clean(
        _MARKDOWN.renderer.render(tokens, options, {}),
        tags=TAGS,
        attributes={
            "a": {"href", "title"},
            "code": {"class"},
            "span": {"class"},
            "ol": {"start"},
            "th": {"align"},
            "td": {"align"},
        },
        attribute_filter=_attribute,
        url_schemes={"http", "https", "mailto"},
        link_rel="noopener noreferrer nofollow",
    )


def span_json(text: str, start: int | None, end: int | None) -> dict[str, int] | None:
    """Returns a place in a text, in code points (Python) and in UTF-16 units (JavaScript)."""
    if start is None or end is None:
        return None
    start16 = len(text[:start].encode("utf-16-le")) // 2
    end16 = start16 + len(text[start:end].encode("utf-16-le")) // 2
    return {"start": start, "end": end, "start16": start16, "end16": end16}
