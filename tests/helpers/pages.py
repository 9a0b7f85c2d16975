"""The pages of the documentation, and the blocks of code in them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@dataclass(frozen=True)
class Block:
    """One fenced block: its language, its code, the file's line above it (from 0), and what a comment before it says.

    `gpu` is the reason that `<!-- gpu: reason -->` gives, None without such a comment.
    """

    page: Path
    line: int
    language: str
    code: str
    gpu: str | None


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page, in order."""
    found, before = [], ""
    for token in MarkdownIt().parse(page.read_text(encoding="utf-8")):
        if token.type == "fence" and token.map:
            mark = re.fullmatch(r"<!-- gpu: (.+) -->\s*", before, flags=re.DOTALL)
            line = token.map[0] + 1
            found.append(Block(page, line, token.info.strip(), token.content, mark[1] if mark else None))
        before = token.content if token.type == "html_block" else ""
    return found


def name(page: Path) -> str:
    """The page's path in the repository."""
    return str(page.relative_to(ROOT))
