"""Walk a dataset's files, match them to table rows, and detect changes."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

QUARANTINE: Final = ".quarantine"
"""Where the importer keeps what the PACS sends until it is checked; nobody reads images there."""
IMAGE_FOLDERS: Final = ("images", "imagesTr")
MASK_FOLDERS: Final = ("masks", "labels", "labelsTr")
_DOUBLE = (".nii.gz",)


def walk(root: Path, *, without: Sequence[str] = ()) -> list[Path]:
    """All regular files under `root` in a stable order.

    Hidden files and folders are skipped, and so are the top folders named in `without`. Linked
    folders are not entered: a link to a parent would never end.
    """
    # To open a pipe would wait for ever.
    return [path for path in find(root, without=without) if path.is_file()]


def find(root: Path, *, without: Sequence[str] = (), skipped: bool = False) -> Iterator[Path]:
    """The same and whatever else lies there, one after another, in the memory of one folder.

    A folder that cannot be listed comes in place of what is in it. With `skipped`, hidden entries
    and linked folders come too; they are not entered either.
    """
    waiting = [root]  # no recursion: a tree may be deeper than Python's stack
    while waiting:
        folder = waiting.pop()
        try:
            with os.scandir(folder) as entries:
                found = sorted((e.name, _kind(e)) for e in entries if e.name != QUARANTINE)
        except OSError:
            yield folder
            continue
        skip = set(without) if folder is root else set()
        told = ("file", "link", "hidden") if skipped else ("file",)
        yield from (folder / name for name, kind in found if kind in told)
        below = [folder / name for name, kind in found if kind == "folder" and name not in skip]
        waiting += reversed(below)


def _kind(entry: os.DirEntry[str]) -> str:
    if is_hidden(entry.name):
        return "hidden"
    try:
        folder = entry.is_dir()
    except OSError:
        return "file"
    return ("link" if entry.is_symlink() else "folder") if folder else "file"


def folder_of(root: Path, names: Sequence[str]) -> Path | None:
    """The first of these sub-folders that is there."""
    return next((root / name for name in names if (root / name).is_dir()), None)


def folders(root: Path) -> list[Path]:
    """The visible sub-folders of `root`, sorted by name."""
    return sorted(p for p in root.iterdir() if p.is_dir() and not is_hidden(p.name))


def is_hidden(name: str) -> bool:
    """Whether nobody would look for images in a file or folder of that name."""
    return name.startswith((".", "__MACOSX")) or name == "Thumbs.db"


def stem(path: Path) -> str:
    """The file name without its suffix; ``.nii.gz`` counts as one suffix."""
    for suffix in _DOUBLE:
        if path.name.lower().endswith(suffix):
            return path.name[: -len(suffix)]
    return path.stem


def table_keys(files: Sequence[Path], roots: Sequence[Path]) -> dict[Path, tuple[str, ...]]:
    """The names by which a table may mean each file, the most exact first.

    A path relative to one of `roots` always counts; a bare file name or stem only where no other
    file shares it, because a row must never label another patient's image.
    """
    names, stems = Counter(f.name for f in files), Counter(stem(f) for f in files)
    keys: dict[Path, tuple[str, ...]] = {}
    for file in files:
        exact = [file.relative_to(r).as_posix() for r in roots if file.is_relative_to(r)]
        loose = [file.name] * (names[file.name] == 1) + [stem(file)] * (stems[stem(file)] == 1)
        keys[file] = tuple(dict.fromkeys(exact + loose))
    return keys


def file_identity(path: Path, *parts: object) -> str:
    """A digest that changes when the file's place, size or time of change does."""
    info = path.stat()
    text = "\0".join(str(p) for p in (path.absolute(), info.st_size, info.st_mtime_ns, *parts))
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
