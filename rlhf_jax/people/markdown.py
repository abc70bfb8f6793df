"""Markdown of guidelines, as HTML in which raw HTML, images and dangerous links stay text."""

from markdown_it import MarkdownIt

_PARSER = MarkdownIt("commonmark", {"html": False}).disable("image")


def html(text: str) -> str:
    """The HTML of a text, whose headings begin at the second level: the page has the first."""
    tokens = _PARSER.parse(text)
    for token in tokens:
        if token.type in ("heading_open", "heading_close"):
            token.tag = f"h{min(int(token.tag[1:]) + 1, 6)}"
    return _PARSER.renderer.render(tokens, _PARSER.options, {})
