"""MkDocs hook: pages that lie outside docs/, and links that work in the repository as well as on the site."""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent

ELSEWHERE = {
    "benchmarks/index.md": "benchmarks/README.md",
    "benchmarks/faithfulness.md": "benchmarks/faithfulness.md",
    "benchmarks/profile.md": "benchmarks/profile.md",
    "benchmarks/kernels.md": "benchmarks/kernels.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}
"""{page of the site: file of the repository}."""

HERE = {"README.md": "index.md", **{source: page for page, source in ELSEWHERE.items()}}
"""{file of the repository: its page}, for those that are not at the same place in docs/."""

LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
FENCE = re.compile(r"(^ *```.*?^ *```$)", re.M | re.S)


def on_files(files, config):
    for page, source in ELSEWHERE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown, page, config, files):
    """The page's links, written for the repository, as the site has them; a file without a page loses its link."""
    here = page.file.src_uri
    source = ELSEWHERE.get(here, f"docs/{here}")
    parts = FENCE.split(markdown)
    parts[::2] = [LINK.sub(lambda match: _link(match, source, here), part) for part in parts[::2]]
    return "".join(parts)


def _link(match, source, here):
    image, text, target = match.groups()
    if re.match(r"[a-z]+:|#", target):
        return match[0]
    path, _, anchor = target.partition("#")
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    page = HERE.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else None)
    if page is None:
        # What exists only in the repository stays a name; what exists nowhere is left for MkDocs to refuse.
        return text if (ROOT / path).exists() else match[0]
    link = posixpath.relpath(page, posixpath.dirname(here) or ".")
    return f"{image}[{text}]({link}{'#' * bool(anchor)}{anchor})"
