import html.parser
import json
import resource
import signal
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from babl.web.chat.markdown import TAGS, to_html
from babl.web.chat.render import render

ATTACKS = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "![](http://evil.example/pixel.png)",
    "[x](javascript:alert(1))",
    "[x](JaVaScRiPt&#58;alert(1))",
    "[x](java\tscript:alert(1))",
    "[x](data:text/html;base64,PHNjcmlwdD4=)",
    "<javascript:alert(1)>",
    "[x](vbscript:msgbox(1))",
    "<svg/onload=alert(1)>",
    "<iframe src='javascript:alert(1)'></iframe>",
    "<a href='javascript:alert(1)'>x</a>",
    "<math><mtext><table><mglyph><style><img src=x onerror=alert(1)>",
    "<noscript><p title='</noscript><img src=x onerror=alert(1)>'>",
    "```html\n</code></pre><script>alert(1)</script>\n```",
    '```js" onmouseover="alert(1)\nx\n```',
    "`<img src=x onerror=alert(1)>`",
    '[x](http://a "\\"onclick=alert(1) \\"")',
    "<style>body{background:url(http://evil.example)}</style>",
    "<form action=http://evil.example><input name=q></form>",
    "<details open ontoggle=alert(1)>",
    "[a]: javascript:alert(1)\n\n[a]",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    "<base href='http://evil.example/'>",
    "<meta http-equiv=refresh content='0;url=http://evil.example'>",
    "| a |\n|:-:|\n| <img src=x onerror=alert(1)> |",
]


class Reader(html.parser.HTMLParser):
    """Refuses whatever could run or fetch."""

    def handle_starttag(self, tag, attrs):
        assert tag in TAGS
        for name, value in attrs:
            assert name in ("href", "title", "rel", "class", "start", "align"), name
            assert name != "href" or value.lower().startswith(("http://", "https://", "mailto:")), value


def check(markdown):
    reader = Reader()
    reader.feed(to_html(markdown))
    reader.close()


@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_that_runs_or_fetches_comes_through(attack):
    check(attack)
    check(f"> - {attack}\n\n# {attack}")


@given(st.text(alphabet=st.sampled_from("<>\"'`[]()!&;:#*_|\\-= \njavscriptonerimghrefxl/"), max_size=80))
def test_no_text_becomes_more_than_text(markdown):
    check(markdown)


def test_markdown_looks_like_markdown():
    assert to_html("**a** `b`") == "<p><strong>a</strong> <code>b</code></p>\n"
    assert 'class="hl-' in to_html("```python\ndef f(): pass\n```")
    assert "<td" in to_html("| a |\n|---|\n| b |") and 'align="center"' in to_html("| a |\n|:-:|\n| b |")
    assert 'rel="noopener noreferrer nofollow"' in to_html("[a](https://example.org)")
    assert to_html("5 < 6 & 7") == "<p>5 &lt; 6 &amp; 7</p>\n"
    assert to_html("```unknown\n<b>\n```") == '<pre><code class="language-unknown">&lt;b&gt;\n</code></pre>\n'


def test_what_takes_too_long_is_text_and_the_others_are_rendered():
    texts = ["*a*", "[" * 20_000, "*b*", "*c* " * 6000, "x" + ">" * 5000, ""]
    found = render(texts)
    assert found[:2] == ["<p><em>a</em></p>\n", None] and found[2:4] == ["<p><em>b</em></p>\n", None]
    assert found[5] == ""
    assert render(["*a*", "*d*"]) == ["<p><em>a</em></p>\n", "<p><em>d</em></p>\n"]


def test_a_page_of_hostile_texts_ends_few_workers():
    texts = [f"{i}" + "[" * 19_900 for i in range(8)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    assert render([*texts, "*late*"]) == [None] * 9
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 8, "the CPU seconds of three workers"
    assert render(["*late*"]) == ["<p><em>late</em></p>\n"], "was not held against it"


def test_a_regular_expression_that_never_ends_is_ended():
    """Pygments' Scala lexer matches this exponentially, and holds Python's lock meanwhile."""
    worker = "from babl.web.chat import markdown; markdown.LANGUAGES.add('scala'); markdown.main()"
    text = json.dumps('```scala\n"' + "\\" * 40 + "\n```")
    ended = subprocess.run([sys.executable, "-c", worker], input=text, capture_output=True, text=True, timeout=60)
    assert ended.returncode == -signal.SIGPROF and ended.stdout == ended.stderr == ""
