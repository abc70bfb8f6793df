"""Docstrings of this project as reStructuredText: `code` stays code, and indented formulas are typeset.

A docstring is plain text with names in single backticks. An indented block is a formula if it can be read as one, or
else it is shown as it is, letter by letter.
"""

import re
from collections.abc import Iterator, Sequence

GREEK = {"alpha", "beta", "gamma", "delta", "epsilon", "lambda", "rho", "sigma", "theta", "pi", "mu", "tau"}
FUNCTIONS = {"max", "min", "exp", "ln", "log", "clip", "sigmoid", "mean", "std", "sqrt", "softmax", "KL"}
BARE = {"max", "min", "exp", "ln", "log", "sigmoid"}  # functions also where no bracket follows
NAMES = {"lam": r"\lambda ", "eps": r"\epsilon ", "sum": r"\sum ", "in": r"\in "}
TOKEN = re.compile(r"\s*(?:(\d+(?:\.\d+)?(?:e-?\d+)?)|([A-Za-z][A-Za-z0-9]*)|(>=|<=|\|\||->|[-+*/^_=<>()\[\]{},|!]))")
SYMBOLS = {
    "*": r"\cdot ",
    ">=": r"\ge ",
    "<=": r"\le ",
    "||": r"\,\|\,",
    "|": r"\mid ",
    "->": r"\to ",
    "{": r"\{",
    "}": r"\}",
}
SENTENCE = re.compile(r"\b(if|and|of|the|where|plus|not|with|is|for|in|to)\b")


def latex(line: str) -> str | None:
    """A line such as `A_t = delta_t + gamma lam A_{t+1}` in LaTeX; None if it is no formula."""
    if SENTENCE.search(re.sub(r"\{.*?\}", "", line)) or ("=" not in line and "(" not in line):
        return None
    return read(line)


def read(line: str) -> str | None:
    """The LaTeX of a formula or of a part of one; None if a character is not understood."""
    out, at = [], 0
    while at < len(line.rstrip()):
        match = TOKEN.match(line, at)
        if match is None:
            return None
        number, word, symbol = match.groups()
        at = match.end()
        if number is not None:
            out.append(re.sub(r"(?:1|(\d.*))e(-?\d+)", power, number))
        elif word is not None:
            out.append(spelled(word, line[at : at + 1] == "("))
        elif symbol in "_^":
            group, at = subscript(line, at)
            if group is None:
                return None
            out.append(f"{symbol}{{{group}}}")
        else:
            out.append(SYMBOLS.get(symbol, symbol))
    return " ".join(out)


def power(match: re.Match) -> str:
    """A number such as 1e-8 with its power of ten."""
    return (match[1] + r" \cdot " if match[1] else "") + f"10^{{{match[2]}}}"


def spelled(word: str, called: bool) -> str:
    """A name: a Greek letter, a function, a letter, or a word set upright."""
    if word in NAMES:
        return NAMES[word]
    if word in BARE or (called and word in FUNCTIONS):
        return rf"\operatorname{{{word}}}"
    if word in GREEK:
        return rf"\{word}"
    return word if len(word) == 1 else rf"\mathrm{{{word}}}"


def subscript(line: str, at: int) -> tuple[str | None, int]:
    """What a subscript or superscript at this place holds, and where it ends."""
    if line[at : at + 1] == "{":
        end = line.find("}", at)
        inner = read(line[at + 1 : end]) if end > 0 else None
        return inner, end + 1
    match = re.match(r"-?\w+?(?=_|\W|$)", line[at:])
    return (read(match[0]), at + match.end()) if match else (None, at)


def escaped(line: str) -> str:
    """A line of prose: names in single backticks become code, and other marks of reStructuredText mean nothing."""
    parts = re.split(r"(`[^`]+`)", line)
    for n, part in enumerate(parts):
        if n % 2:
            parts[n] = f"`{part}`" + ("\\ " if parts[n + 1][:1].isalnum() else "")
        else:
            parts[n] = re.sub(r"([*|_\\])", r"\\\1", part)
    return "".join(parts)


def blocks(lines: Sequence[str]) -> Iterator[tuple[bool, list[str]]]:
    """The paragraphs of a docstring, and whether each is indented."""
    block: list[str] = []
    for line in [*lines, ""]:
        if line.strip():
            block.append(line)
        elif block:
            yield all(one.startswith("    ") for one in block), block
            block = []


def typeset(lines: Sequence[str]) -> list[str]:
    """The lines of a docstring as reStructuredText."""
    out: list[str] = []
    for indented, block in blocks(lines):
        if not indented:
            out += [*map(escaped, joined_code(block)), ""]
            continue
        found = [latex(part) for line in block for part in re.split(r",  +", line.strip())]
        if None in found:
            out += ["::", "", *block, ""]
        else:
            for one in found:
                out += [".. math::", "", f"   {one}", ""]
    return out


def joined_code(block: list[str]) -> list[str]:
    """The lines of a paragraph, in which no `code` runs over the end of a line."""
    text = "\n".join(block)
    return re.sub(r"`[^`]+`", lambda match: match[0].replace("\n", " "), text).split("\n")
