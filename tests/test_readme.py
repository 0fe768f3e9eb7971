"""README.md and the pages under docs/ against the program: form, flags, files, links."""

from __future__ import annotations

import argparse
import re
from fnmatch import fnmatch
from pathlib import Path

import pytest

from webapp.settings import _build_parser

PROJECT = Path(__file__).parent.parent
README = PROJECT / "README.md"
PAGES = [README, PROJECT / "CONTRIBUTING.md", *sorted((PROJECT / "docs").glob("*.md"))]


def section(title: str) -> str:
    """The text of one of the README's sections."""
    return README.read_text("utf-8").split(f"\n## {title}\n")[1].split("\n## ")[0]


def outside_fences(text: str) -> list[str]:
    """A page's lines, those of code emptied."""
    return re.sub(r"(?ms)^```.*?^```$", "", text).split("\n")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_headings_stand_between_blank_lines_and_commands_in_fences(page):
    text = page.read_text("utf-8")
    assert len(re.findall(r"(?m)^```", text)) % 2 == 0
    lines = ["", *outside_fences(text.removeprefix("---\n").split("\n---\n")[-1]), ""]
    for before, line, after in zip(lines, lines[1:], lines[2:], strict=False):
        if re.match(r"#{1,4} ", line):
            assert (before, after) == ("", ""), line
        assert not re.match(r"(python|make|pip|echo|curl) ", line), line


def test_flags_of_the_app_and_of_the_readme_are_the_same():
    actions = [a for a in _build_parser()._actions if not isinstance(a, argparse._HelpAction)]
    known = {name for action in actions for name in action.option_strings}
    first_cells = re.findall(r"(?m)^\| (`-.*?) \|", section("Flags"))
    named = {flag for cell in first_cells for flag in re.findall(r"--?[a-z][a-z-]*", cell)}
    assert named == known


def test_every_module_is_in_the_readmes_list_of_files():
    listed = section("Files")
    for folder in ("qwen", "webapp"):
        part = re.search(rf"(?ms)^{folder}/.*?(?=^\S)", listed)
        patterns = re.findall(r"[\w*]+\.(?:py|css|js|\*)", part[0])
        for module in (PROJECT / folder).glob("*.py"):
            is_listed = any(fnmatch(module.name, pattern) for pattern in patterns)
            assert is_listed or module.name == "__init__.py", f"{folder}/{module.name}"
        for pattern in patterns:
            found = list((PROJECT / folder).rglob(pattern))
            assert found or pattern == "cpu_kernels.*", f"{folder}/{pattern}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings_that_exist(page):
    for target in re.findall(
        r"\]\(([^)\s]+)\)", "\n".join(outside_fences(page.read_text("utf-8")))
    ):
        if re.match(r"\w+://", target):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        headings = re.findall(r"(?m)^#+ (.*)", file.read_text("utf-8") if anchor else "")
        slugs = [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings]
        assert not anchor or anchor in slugs, target
