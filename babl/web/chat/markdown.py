"""Renders untrusted Markdown as safe HTML; as a program, a worker that the kernel kills if a text takes too long.

The worker reads a JSON string a line and answers with a line: the HTML, or null if the text cannot be rendered. A
regular expression holds Python's lock until it is done, so no timer in Python could end it.
"""

import json
import signal
import sys
from collections.abc import Sequence
from typing import Any

import nh3
from markdown_it import MarkdownIt
from markdown_it.token import Token
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name

CPU_SECONDS = 0.25  # for one text
MAX_HTML = 200_000  # characters

TAGS = {
    "a", "p", "br", "hr", "em", "strong", "s", "del", "code", "pre", "blockquote", "ul", "ol", "li",
    "h1", "h2", "h3", "h4", "h5", "h6", "table", "thead", "tbody", "tr", "th", "td",
    "div", "span",  # of highlighted code
}  # fmt: skip
LANGUAGES = {
    "python", "py", "json", "bash", "sh", "javascript", "js", "typescript", "html", "css", "sql",
    "c", "cpp", "java", "rust", "go", "yaml", "toml", "diff",
}  # fmt: skip
_CODE = HtmlFormatter(nowrap=True, classprefix="hl-")
_ALIGNED = {"text-align:left": "left", "text-align:center": "center", "text-align:right": "right"}


def _highlighted(code: str, language: str, _: str) -> str:
    """Returns highlighted code as HTML, or an empty string for an unknown language."""
    return highlight(code, get_lexer_by_name(language), _CODE) if language in LANGUAGES else ""


_MARKDOWN = MarkdownIt("js-default", {"html": False, "linkify": False, "highlight": _highlighted})
_MARKDOWN.disable("image")  # an image would be fetched from a foreign server


def _attribute(tag: str, name: str, value: str) -> str | None:
    """Returns the attribute's allowed value, or None."""
    if name == "class":
        return " ".join(each for each in value.split() if each.startswith(("hl-", "language-"))) or None
    return value


def to_html(markdown: str) -> str:
    """Returns HTML without scripts, styles, images, frames or forms, and with links to http, https and mailto alone.

    Some short texts take for ever. The HTML is sanitized last, so that nothing before has to be trusted.
    """
    tokens: Sequence[Token] = _MARKDOWN.parse(markdown)
    for token in tokens:  # inline styles are forbidden, so cells are aligned by attribute
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


def main() -> None:
    """Renders texts until the input ends, or one has taken `CPU_SECONDS`: SIGPROF then kills the process."""
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        try:
            html: str | None = to_html(json.loads(line))
        except (RecursionError, ValueError):  # too deep, or half a surrogate pair
            html = None
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(html if html is None or len(html) <= MAX_HTML else None), flush=True)


if __name__ == "__main__":
    main()
