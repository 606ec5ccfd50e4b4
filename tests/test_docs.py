"""What the pages for people name exists: links, files, commands, their options and targets."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import typer

from ambidex import COMMANDS, Commands
from server.cli import settings_command

ROOT = Path(__file__).parent.parent
TOP = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "deploy/kubernetes/README.md")
PAGES = sorted({*TOP, *(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))})
# The log and the changelog tell of what is gone, and so name commands and files that are.
PAST = {"CHANGELOG.md", "docs/log.md"}
PRESENT = [page for page in PAGES if page not in PAST]
ROOMS = "benchmarks|deploy|docs|engine|server|tests|training"
# A path that stands alone between backticks.
PATH = re.compile(rf"`((?:{ROOMS})/[\w./*-]*|[A-Z]+\.md)`")
MOST_WORDS_OF_README = 900


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def anchors(text: str) -> set[str]:
    """GitHub's names of the headings."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = text_of(page)
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert links
    for link in links:
        if not link.startswith("https://"):
            file, _, anchor = link.partition("#")
            target = ((ROOT / page).parent / file).resolve() if file else ROOT / page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


@pytest.mark.parametrize("page", PRESENT)
def test_files_that_are_named_exist(page: str) -> None:
    for name in PATH.findall(text_of(page)):
        found = ROOT.glob(name) if "*" in name else (ROOT / name, (ROOT / page).parent / name)
        assert any(path.exists() for path in found), name


def commands_in(page: str, start: str) -> list[list[str]]:
    """The arguments of every command that begins so, in blocks of code and between backticks."""
    text = text_of(page)
    # The lines of blocks first, which may hold backticks; then the spans of what is left.
    blocks = re.findall(r"^ *```.*?\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
    rest = re.sub(r"^ *```.*?\n.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)
    codes = [line for block in blocks for line in re.sub(r"\\\n\s*", "", block).splitlines()]
    codes += [re.sub(r"\s+", " ", span) for span in re.findall(r"`([^`]+)`", rest)]
    found = []
    for code in codes:
        for part in re.split(r"&&|;|\|", code):
            match = re.match(rf"\s*(?:[A-Z_]+=\S+ )*(?:\S+/bin/)?{start} (.*)", part)
            if match:
                found.append(arguments(match[1]))
    return found


def arguments(line: str) -> list[str]:
    try:
        return shlex.split(line, comments=True)
    except ValueError:  # a quote that the text around leaves open
        return line.split()


@pytest.mark.parametrize("page", PRESENT)
def test_commands_know_their_options(page: str) -> None:
    group = Commands(name="ambidex")
    context = typer.Context(group)
    for words in commands_in(page, "ambidex"):
        name, *rest = words
        if name not in COMMANDS:  # a shell prompt, a folder, an option of ambidex itself
            assert re.match(r"[-:./]|\W", name) or name.startswith("ambidex"), words
            continue
        command = group.get_command(context, name)
        if name == "serve":
            command = settings_command(lambda given: None)
        if name == "bench" and rest and rest[0] in command.commands:
            command = command.commands[rest[0]]
        known = {
            option for p in command.get_params(context) for option in (*p.opts, *p.secondary_opts)
        }
        for word in rest:
            option = word.split("=")[0]
            if re.fullmatch(r"--[a-z-]+", option):
                assert option in known | {"--help"}, words


@pytest.mark.parametrize("page", PRESENT)
def test_targets_and_modules_exist(page: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", text_of("Makefile"), re.MULTILINE))
    for words in commands_in(page, "make"):
        for word in words:
            assert "=" in word or word in targets, words
    for words in commands_in(page, r"python3? -m"):
        module = words[0]
        if module.split(".")[0] in ROOMS.split("|"):
            assert importlib.util.find_spec(module) is not None, words


def test_the_commands_of_the_docs_are_found() -> None:
    """Otherwise the tests above would test nothing."""
    assert ["serve"] in commands_in("README.md", "make")
    assert any(words[:1] == ["train"] for words in commands_in("README.md", "ambidex"))
    assert any(words == ["benchmarks.gpu"] for words in commands_in("docs/engine.md", "python -m"))
    assert "engine/model/ffn.py" in PATH.findall(text_of("docs/tour.md"))


def test_the_readme_is_short() -> None:
    assert len(text_of("README.md").split()) <= MOST_WORDS_OF_README
