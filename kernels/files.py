"""Files that appear whole or not at all, and where those go that can be made again."""

import functools
import hashlib
import os
import secrets
from pathlib import Path


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under a temporary name and rename it, so that nobody ever finds half of it; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def make_room(folder: Path, room: int) -> None:
    """Delete the files of a folder that were not used for longest, until the others take at most so many bytes."""
    files = sorted((path for path in folder.glob("*") if path.is_file()), key=lambda path: path.stat().st_mtime)
    taken = sum(path.stat().st_size for path in files)
    for path in files:
        if taken <= room:
            break
        taken -= path.stat().st_size
        path.unlink(missing_ok=True)


@functools.cache
def source_key(*folders: str) -> str:
    """A hash of the sources in some of the project's folders, such as `cache` or `eval/quality`: what a result depends on besides its arguments."""
    root = Path(__file__).parent.parent
    sources = [path.read_bytes() for folder in folders for path in sorted((root / folder).glob("*.*"))]
    return hashlib.sha256(b"".join(sources)).hexdigest()[:16]


def cache_dir() -> Path:
    """Return the folder for tokens, tokenisers, compiled kernels and programs: $KVCASCADE_CACHE, or `kvcascade` under the user's cache folder."""
    if own := os.environ.get("KVCASCADE_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "kvcascade"
