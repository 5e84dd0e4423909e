"""Hooks of MkDocs.

README.md becomes the first page, links out of docs/ become plain text, and the build fails at a
public name without a docstring.
"""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import Abort
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("learned_opt", "geodesic", "learned_opt.benchmarking")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    bare = []
    for package in map(importlib.import_module, PACKAGES):
        for name in package.__all__:
            value = getattr(package, name)
            if callable(value) and not inspect.getdoc(value):
                bare.append(f"{package.__name__}.{name}")
    if bare:
        raise Abort(f"These public names have no docstring; write one for each: {', '.join(bare)}")
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"\]\(docs/", "](", readme)
    files.append(File.generated(config, "index.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replaces links to files that are not pages by their names, and adapts the text to MkDocs."""
    outside = r"\[([^\]]+)\]\((\.\./(?!README)[^)\s]+|examples|experiments/[^)\s]+|[A-Z]+\.md)\)"
    markdown = re.sub(outside, _named, markdown).replace("](../README.md", "](index.md")
    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if part.startswith("```") else _as_on_github(part) for part in parts)


def _as_on_github(markdown: str) -> str:
    """Adds a blank line before a list that follows a paragraph, and puts intervals in tables on a
    line of their own."""
    markdown = re.sub(r"^(?![-|#> ]|\* )(.+)\n(?=- )", r"\1\n\n", markdown, flags=re.MULTILINE)
    interval = r"(?<=\S) \[([^\s\],]+), ([^\s\],]+)\](?=\**\s*\|)"
    return re.sub(interval, r"<br>[\1,&nbsp;\2]", markdown)


def _named(match: re.Match[str]) -> str:
    path = match[2].removeprefix("../").partition("#")[0]
    return match[1] if path in match[1] else f"{match[1]} (`{path}`)"
