"""Griffe extension: docstrings written for the terminal, as Markdown.

Examples after ``>>>`` become code blocks, arguments that are described together get an entry each, and names in
backticks become links to what they name, where that is documented.
"""

import re

import griffe

EXAMPLE = re.compile(r"^( *)>>> .*(?:\n(?! *$).*)*", re.M)
ARGUMENTS = re.compile(r"^Args:\n(?: {4}.*\n?|\n(?= {4}))+", re.M)
TOGETHER = re.compile(r"^ {4}(\w+(?:, \w+)+):((?:.*)(?:\n(?: {8}.*|(?=\n {8})))*)", re.M)
NAME = re.compile(r"(?<!`)`([A-Za-z_][\w.]*)`(?!`)")


class Docstrings(griffe.Extension):
    """Rewrites every docstring before it is parsed."""

    def on_instance(self, *, obj, **kwargs):
        docstring = None if obj.is_alias else obj.docstring
        if docstring is None:
            return
        value = ARGUMENTS.sub(lambda match: TOGETHER.sub(_apart, match[0]), docstring.value)
        text, end = [], 0
        for match in EXAMPLE.finditer(value):
            text += [_linked(value[end : match.start()], obj), _fenced(match)]
            end = match.end()
        docstring.value = "".join([*text, _linked(value[end:], obj)])


def _apart(match):
    return "\n".join(f"    {name}:{match[2]}" for name in match[1].split(", "))


def _fenced(match):
    return f"{match[1]}```pycon\n{match[0]}\n{match[1]}```"


def _linked(text, obj):
    def link(match):
        try:
            path = obj.resolve(match[1])
        except griffe.NameResolutionError:
            path = match[1] if match[1].startswith("cfcam_gpu.") else None
        if path is None:
            return f"``{match[1]}``"
        return f'<autoref identifier="{path}" optional><code>{match[1]}</code></autoref>'

    return NAME.sub(link, text)
