"""What becomes of each kind of DICOM file; ``python -m tools.docs.dicom > docs/dicom.md``.

Runs over every file that pydicom, pydicom-data and highdicom bring along, offline.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import AllTransferSyntaxes

from fedward_client.index.extract import Extractor, FileFacts

# Packages, and where in each the files are.
_PACKAGES: Final = {
    "pydicom": ("pydicom", "data"),
    "pydicom-data": ("data_store", ""),
    "highdicom": ("highdicom", ""),
}
_CODE: Final = (".py", ".pyc", ".json", ".toml", ".typed", ".md", ".txt")
_MASKS: Final = ("Segmentation Storage", "RT Structure Set Storage")
_HEAD: Final = """# DICOM: what is read

Every DICOM file that comes with {versions},
as `fedward-client data index` ends with it: decoded to the last frame, or left out for a
[reason](data.md#why-an-image-is-left-out). Some of these files are broken on purpose, so a row may
hold both. Written by `python -m tools.docs.dicom`; a test holds the page.

*image*: all frames were decoded. *mask*: a segmentation or a structure set, which serves the images
that it refers to. *dose*: no picture of a patient; decoded here, taken by no study.
"""

_CODECS: Final = """Transfer syntaxes for which pydicom and pylibjpeg, as they are installed, have a
decoder. Where the packages bring no file, none was tried."""


def roots() -> dict[str, Path]:
    """Where the packages that are installed have their files."""
    found = {}
    for package, (module, below) in _PACKAGES.items():
        spec = importlib.util.find_spec(module)
        if spec is not None and spec.submodule_search_locations:
            found[package] = Path(next(iter(spec.submodule_search_locations))) / below
    return found


def files(root: Path) -> list[Path]:
    """All that could be data, in a stable order."""
    every = (path for path in sorted(root.rglob("*")) if path.is_file())
    return [path for path in every if path.suffix not in _CODE and "__pycache__" not in path.parts]


def versions() -> str:
    """The packages with their versions, as the page tells them."""
    names = [f"{name} {importlib.metadata.version(name)}" for name in roots()]
    return f"{', '.join(names[:-1])} and {names[-1]}"


def outcomes() -> Iterator[tuple[str, str, str]]:
    """Of each file its object, its transfer syntax, and what becomes of it."""
    for root in roots().values():
        extract = Extractor(root, "dicom", b"none" * 8)
        for path in files(root):
            facts = extract(path)
            if facts.format == "dicom":
                yield facts.object_type, facts.syntax, _end(facts)


def _end(facts: FileFacts) -> str:
    if facts.reason:
        return f"`{facts.reason}`"
    if facts.object_type in _MASKS:
        return "mask"
    return "dose" if facts.object_type == "RT Dose Storage" else "image"


def page() -> str:
    """The page in Markdown."""
    table: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for kind, syntax, end in outcomes():
        table[kind, syntax][end] += 1
    of_syntax: dict[str, Counter[str]] = defaultdict(Counter)
    for (_, syntax), ends in table.items():
        of_syntax[syntax] += ends
    lines = [_HEAD.format(versions=versions()), "## By transfer syntax", ""]
    lines += _rows(
        "transfer syntax",
        ((_word(s),) for s in sorted(of_syntax)),
        (of_syntax[s] for s in sorted(of_syntax)),
    )
    lines += ["", "## By object and transfer syntax", ""]
    lines += _rows(
        "object | transfer syntax",
        ((_word(k), _word(s)) for k, s in sorted(table)),
        (table[key] for key in sorted(table)),
    )
    lines += ["", *_codecs(of_syntax)]
    return "\n".join(lines) + "\n"


def _codecs(tried: Mapping[str, Counter[str]]) -> Iterator[str]:
    """Which transfer syntaxes can be decoded at all, and which have a file above."""
    able: list[str] = []
    unable: list[str] = []
    for uid in AllTransferSyntaxes:
        try:
            decoder = get_decoder(uid)
        except NotImplementedError:
            unable.append(uid.name)
            continue
        (able if decoder.is_available else unable).append(uid.name)
    yield from ("## What can be decoded", "", _CODECS, "", "| transfer syntax | files above |")
    yield "|---|---|"
    for name in sorted(able):
        yield f"| {name} | {tried[name].total() if name in tried else 'none'} |"
    yield from ("", f"Not decoded, and so `not readable`: {'; '.join(sorted(unable))}.")


def _rows(
    title: str, names: Iterator[tuple[str, ...]], ends: Iterator[Counter[str]]
) -> Iterator[str]:
    yield f"| {title} | files | what becomes of them |"
    yield "|---" * (title.count("|") + 3) + "|"
    for name, counts in zip(names, ends, strict=True):
        told = ", ".join(f"{end} {count}" for end, count in sorted(counts.items()))
        yield f"| {' | '.join(name)} | {counts.total()} | {told} |"


def _word(text: str) -> str:
    return text or "(not stated)"


if __name__ == "__main__":
    print(page(), end="")
