"""Tables in Markdown pages, between ``<!-- table: NAME -->`` and ``<!-- end -->``; all else is written by hand."""

import re

NOT_MEASURED = "not measured"


def markdown(header, body):
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value, digits=3):
    """Three significant digits, without an exponent."""
    if value is None:
        return "-"
    return f"{value:.{digits}g}" if abs(value) < 10**digits else f"{value:.0f}"


def names(text):
    """The names of the tables of a page, in order."""
    return re.findall(r"<!-- table: (.*?) -->", text)


def fill(text, name, content, page):
    """``text`` with ``content`` between the markers of table ``name``.

    Raises:
        ValueError: the markers are not there, or more than once; the message names the page.
    """
    # A marker that is not closed must not swallow the next table.
    inside = r"(?:(?!<!-- table: ).)*?"
    pattern = re.compile(rf"(<!-- table: {re.escape(name)} -->\n){inside}(<!-- end -->)", re.S)
    text, count = pattern.subn(lambda match: f"{match[1]}{content}\n{match[2]}", text)
    if count != 1:
        raise ValueError(f"{page} must have <!-- table: {name} --> ... <!-- end --> once, got {count} times")
    return text
