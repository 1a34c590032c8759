"""The documentation says what the code does."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import re
from pathlib import Path

import pytest

import featherweight.cli

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = [m.name for m in pkgutil.iter_modules(featherweight.cli.__path__) if not m.name.startswith("_")]

GROUPS = [m.name for m in pkgutil.iter_modules(featherweight.cli.__path__) if m.ispkg]


def submodules(group: str) -> list[str]:
    """The commands of a group."""
    folders = importlib.import_module(f"featherweight.cli.{group}").__path__
    return [m.name for m in pkgutil.iter_modules(folders) if not m.name.startswith("_")]


def anchor(heading: str) -> str:
    """The anchor of a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        file, _, place = target.partition("#")
        if file.startswith("http"):
            continue
        other = page.parent / file if file else page
        assert other.exists(), f"{page.name} links to {file}"
        if place:
            headings = re.findall(r"^#+ (.+)$", other.read_text(encoding="utf-8"), re.MULTILINE)
            assert place in map(anchor, headings), f"{page.name} links to #{place}"


def test_every_command_is_documented() -> None:
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert [name for name in COMMANDS if f"\n## {name}\n" not in text] == []


def test_every_option_in_the_documentation_exists() -> None:
    from click.testing import CliRunner

    known = {"--help", "--version"}
    inner = [[name, sub] for name in GROUPS for sub in submodules(name)]
    for names in [*([name] for name in COMMANDS), *inner]:
        shown = CliRunner().invoke(featherweight.cli.group, [*names, "--help"]).output
        known |= set(re.findall(r"--[a-z0-9-]+", shown))
    for page in PAGES:
        for block in re.findall(r"featherweight [a-z]+ [^`\n]*", page.read_text(encoding="utf-8")):
            assert set(re.findall(r"--[a-z0-9-]+", block)) <= known, f"{page.name}: {block}"


def test_techniques_page_is_current() -> None:
    spec = importlib.util.spec_from_file_location("make_techniques", ROOT / "docs" / "make_techniques.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    current = (ROOT / "docs" / "techniques.md").read_text(encoding="utf-8")
    assert current == module.render(), "run python docs/make_techniques.py"
