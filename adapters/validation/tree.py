"""A tree of files as a check sees it: names with sizes, and a way to read each. Refuses to know where they lie."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO, Protocol

from loractl.adapters.errors import NotFound


class FileTree(Protocol):
    """Names are relative, with `/`; `open` gives a seekable stream that the caller closes."""

    @property
    def sizes(self) -> Mapping[str, int]: ...

    def open(self, name: str) -> BinaryIO: ...

    def sha256(self, name: str) -> str | None:
        """The file's hash where it is already known, else None."""
        ...


class MemoryTree:
    """Files that are held in memory, for tests and small uploads."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self._files = files
        self.sizes: Mapping[str, int] = {name: len(data) for name, data in files.items()}

    def open(self, name: str) -> BinaryIO:
        return io.BytesIO(self._files[name])

    def sha256(self, name: str) -> str | None:
        del name
        return None


class FolderTree:
    """A folder on disk; links and special files are listed by name in `not_regular` and never opened."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise NotFound(f"{folder}: no such folder", hint="an adapter folder is what `loractl train` or PEFT saves")
        self._folder = folder
        self.not_regular: list[str] = []
        sizes: dict[str, int] = {}
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder).as_posix()
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                self.not_regular.append(name)
            elif path.is_file():
                sizes[name] = path.stat().st_size
        self.sizes: Mapping[str, int] = sizes

    def open(self, name: str) -> BinaryIO:
        return (self._folder / name).open("rb")

    def sha256(self, name: str) -> str | None:
        del name
        return None
