"""Layout: one list of blocks, written as Markdown and as one HTML page that needs no network."""

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 72rem;
       margin: 2rem auto; padding: 0 1rem; overflow-wrap: break-word; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: 14px; margin: 0.5rem 0
1rem; } th, td { padding: 0.3rem 0.7rem; border-bottom: 1px solid #e3e3e3; text-align: right; } th {
vertical-align: bottom; min-width: 4rem; max-width: 12rem; } td { white-space: nowrap; }
th:first-child, td:first-child, .text { text-align: left; } td.text { white-space: normal;
min-width: 16rem; } figure { margin: 1rem 0; } figcaption { font-size: 14px; color: #444; } img {
max-width: 100%; } @media (max-width: 600px) { img { max-width: none; height: 22rem; } img.answer {
height: auto; max-width: 100%; } } pre { background: #f6f6f6; padding: 0.8rem; overflow-x: auto; }
fieldset { border: 1px solid #ddd; margin: 1rem 0; } fieldset label { margin-right: 1rem;
white-space: nowrap; }
"""


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Items:
    texts: Sequence[str]


@dataclass(frozen=True)
class Rows:
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Code:
    text: str


@dataclass(frozen=True)
class Picture:
    file: str  # name in the folder of the report
    caption: str


Element = Heading | Paragraph | Items | Rows | Code | Picture


def to_markdown(blocks: Sequence[Element]) -> str:
    return "\n\n".join(_markdown(block) for block in blocks) + "\n"


def _markdown(block: Element) -> str:
    match block:
        case Heading():
            return f"{'#' * block.level} {block.text}"
        case Paragraph():
            return block.text
        case Items():
            return "\n".join(f"- {text}" for text in block.texts)
        case Code():
            return f"```\n{block.text}\n```"
        case Picture():
            return f"![{block.caption}]({block.file})\n\n{block.caption}"
    rows = [block.header, ["---", *["---:"] * (len(block.header) - 1)], *block.rows]
    return "\n".join("| " + " | ".join(map(_markdown_cell, row)) + " |" for row in rows)


def _markdown_cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())  # one line: a study's texts may have several


@dataclass(frozen=True)
class Live:
    """Parts of an HTML page that answer to the pointer."""

    head: str = ""
    """Scripts."""
    controls: str = ""
    """What stands before the first picture."""
    elements: Mapping[str, str] = field(default_factory=dict)
    """PNG file -> the element in its place."""


def to_html(blocks: Sequence[Element], live: Live, *, title: str, folder: Path) -> str:
    """The page; what is not live is a picture, read from `folder` and put into it."""
    parts = [_html(block, folder, live.elements) for block in blocks]
    pictures = (n for n, block in enumerate(blocks) if isinstance(block, Picture))
    parts.insert(next(pictures, len(blocks)), live.controls)
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title>"
        f'<link rel="icon" href="data:,"><style>{STYLE}</style>{live.head}</head>\n'
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _html(block: Element, folder: Path, elements: Mapping[str, str]) -> str:
    match block:
        case Heading():
            return f"<h{block.level}>{html.escape(block.text)}</h{block.level}>"
        case Paragraph():
            return f"<p>{html.escape(block.text)}</p>"
        case Items():
            items = "".join(f"<li>{html.escape(text)}</li>" for text in block.texts)
            return f"<ul>{items}</ul>"
        case Code():
            return f"<pre>{html.escape(block.text)}</pre>"
        case Picture():
            caption = html.escape(block.caption)
            if block.file in elements:
                return f"<figure>{elements[block.file]}<figcaption>{caption}</figcaption></figure>"
            kind, png = block.file.removesuffix(".png"), (folder / block.file).read_bytes()
            source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
            image = f'<div class="scroll"><img class="{kind}" src="{source}" alt="{caption}"></div>'
            return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"
    # a column with a long cell is text, whose lines begin at the left
    columns = zip([""] * len(block.header), *block.rows, strict=True)
    kinds = [" class=text" if max(map(len, column)) > 30 else "" for column in columns]

    def line(tag: str, cells: Sequence[str]) -> str:
        pairs = zip(kinds, cells, strict=True)
        return "".join(f"<{tag}{kind}>{html.escape(cell)}</{tag}>" for kind, cell in pairs)

    head = line("th", block.header)
    rows = "".join(f"<tr>{line('td', row)}</tr>" for row in block.rows)
    table = f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody>"
    return f'<div class="scroll"><table>{table}</table></div>'
