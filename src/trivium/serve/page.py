"""The page's files, read once at the start: what is not among them cannot be asked for."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

POLICY = "default-src 'self'; base-uri 'none'; frame-ancestors 'none'; form-action 'none'"
_KINDS = {
    ".html": b"text/html; charset=utf-8",
    ".js": b"text/javascript; charset=utf-8",
    ".css": b"text/css; charset=utf-8",
    ".svg": b"image/svg+xml",
    ".png": b"image/png",
    ".ico": b"image/x-icon",
    ".webmanifest": b"application/manifest+json",
}


@dataclass(frozen=True, kw_only=True)
class Asset:
    """One file; ``tag`` is made of its content."""

    body: bytes
    kind: bytes
    tag: str

    def headers(self) -> dict[str, str]:
        """What the browser is told of it."""
        return {"Content-Security-Policy": POLICY, "Cache-Control": "no-cache", "ETag": self.tag}


def assets(folder: Path | None = None) -> dict[str, Asset]:
    """Path in a URL → file, for the files of known kinds in ``folder``; links and hidden files are left out."""
    folder = Path(__file__).parent / "page" if folder is None else folder
    found: dict[str, Asset] = {}
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in inside.parts)
        if hidden or path.is_symlink() or not path.is_file() or path.suffix not in _KINDS:
            continue
        body = path.read_bytes()
        tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
        found[f"/{inside.as_posix()}"] = Asset(body=body, kind=_KINDS[path.suffix], tag=tag)
    if "/index.html" in found:
        found["/"] = found["/index.html"]
    return found
