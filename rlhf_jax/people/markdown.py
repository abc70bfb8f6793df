"""Markdown as guidelines need it, to HTML in which nothing but our own tags is markup.

Headings, paragraphs, lists, quotes, rules, fenced code; **bold**, *italic*, `code` and [links](https://...).
"""

import html as escaping
import re


def html(text: str) -> str:
    """The HTML of a text."""
    parts = re.split(r"(?ms)^```[^\n]*\n(.*?)^```\s*$", text.replace("\r\n", "\n"))  # every other one is code
    blocks = (f"<pre>{escaping.escape(part)}</pre>" if n % 2 else _prose(part) for n, part in enumerate(parts))
    return "\n".join(filter(None, blocks))


def _prose(text: str) -> str:
    return "\n".join(_block(block) for block in re.split(r"\n\s*\n", text) if block.strip())


def _block(block: str) -> str:
    """The HTML of the lines between two empty ones; a list or a heading may follow on a paragraph without one."""
    out: list[str] = []
    for kind, lines in _runs(block.strip("\n").split("\n")):
        match kind:
            case "ul" | "ol":
                items = "".join(f"<li>{_inline(re.sub(_ITEM[kind], '', line))}</li>" for line in lines)
                out.append(f"<{kind}>{items}</{kind}>")
            case "quote":
                out.append(f"<blockquote>{_inline(' '.join(line.lstrip('> ') for line in lines))}</blockquote>")
            case "rule":
                out.append("<hr>")
            case "heading":
                for line in lines:
                    marks, _, title = line.strip().partition(" ")
                    level = min(len(marks) + 1, 6)  # the page has the first
                    out.append(f"<h{level}>{_inline(title)}</h{level}>")
            case _:
                out.append(f"<p>{_inline(' '.join(line.strip() for line in lines))}</p>")
    return "\n".join(out)


_ITEM = {"ul": r"^\s*[-*+]\s+", "ol": r"^\s*\d+[.)]\s+"}


def _runs(lines: list[str]) -> list[tuple[str, list[str]]]:
    """Neighbouring lines of one kind; an indented line goes on with the item before it."""
    runs: list[tuple[str, list[str]]] = []
    for line in lines:
        if re.match(r"#{1,6} ", line.strip()):
            kind = "heading"
        elif re.fullmatch(r"\s*([-*_])(\s*\1){2,}\s*", line):
            kind = "rule"
        elif line.lstrip().startswith(">"):
            kind = "quote"
        else:
            kind = next((name for name, pattern in _ITEM.items() if re.match(pattern, line)), "text")
        if runs and kind == "text" and line.startswith("  ") and runs[-1][0] in _ITEM:
            runs[-1][1][-1] += " " + line.strip()
        elif runs and runs[-1][0] == kind:
            runs[-1][1].append(line)
        else:
            runs.append((kind, [line]))
    return runs


def _inline(text: str) -> str:
    parts = re.split(r"(`[^`]+`)", text)
    return "".join(
        f"<code>{escaping.escape(part[1:-1])}</code>" if n % 2 else _spans(part) for n, part in enumerate(parts)
    )


def _spans(text: str) -> str:
    text = escaping.escape(text)
    text = re.sub(r"\[([^\[\]]+)\]\((https?://[^\s()\"'<>]+)\)", r'<a href="\2" rel="noreferrer">\1</a>', text)
    text = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", text)
    return re.sub(r"(?<![\w*])\*(?!\s)([^*]+?)\*(?!\w)", r"<em>\1</em>", text)
