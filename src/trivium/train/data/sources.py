"""Where training text comes from: files, folders, globs, JSONL rows, or the standard library's own source.

Order and names do not depend on the machine: names are relative to what was given. What is skipped is counted and
logged.
"""

from __future__ import annotations

import glob
import json
import logging
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

import xxhash

from trivium.base.errors import DataError

_log = logging.getLogger(__name__)
_JSONL_SUFFIXES = (".jsonl", ".ndjson")
_PACKAGES = ("site-packages", "dist-packages", "__pycache__")
_TESTS = ("test", "tests", "idle_test")
_ROLES = ("system", "user", "assistant")
_PIECE_BYTES = 16 << 20
_ROW_BYTES = 64 << 20
_SNIFF_BYTES = 8192


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn of a chat."""

    role: str
    content: str


@dataclass(frozen=True, kw_only=True)
class Source:
    """One file to read, or a part: where it is, its machine-independent name, its format, and which of its bytes count.

    ``key`` overrides the hash of the name that decides the split.
    """

    path: Path
    name: str
    format: str
    take_bytes: int
    start_byte: int = 0
    key: int | None = None


@dataclass(frozen=True, kw_only=True)
class Document:
    """A text or a chat, or one piece of a long text; ``line`` is 1-based, ``key`` decides the split.

    A text of more than 16 MiB comes in pieces: all but the last have ``more`` set.
    """

    text: str = ""
    messages: tuple[Message, ...] = ()
    source: int = 0
    line: int = 1
    key: int = 0
    more: bool = False


@dataclass(frozen=True, kw_only=True)
class Sources:
    """The files chosen, in a fixed order, and how many were passed over and why."""

    files: tuple[Source, ...]
    skipped: dict[str, int] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Bytes that will be read."""
        return sum(source.take_bytes for source in self.files)

    def fingerprint(self) -> str:
        """A hash of names, formats and contents: equal input, equal hash, on any machine."""
        total = xxhash.xxh3_128()
        for source in self.files:
            content = xxhash.xxh3_128()
            with _open(source) as file:
                file.seek(source.start_byte)
                left = source.take_bytes
                while left and (block := file.read(min(left, 1 << 20))):
                    content.update(block)
                    left -= len(block)
            total.update(json.dumps([source.name, source.format, source.take_bytes, content.hexdigest()]).encode())
        return str(total.hexdigest())

    def with_tail_apart(self, share: float) -> Sources:
        """A single text file in two parts, its last ``share`` (whole lines) held out; anything else unchanged."""
        if len(self.files) != 1 or self.files[0].format != "text" or share <= 0.0:
            return self
        whole = self.files[0]
        head = int(whole.take_bytes * (1.0 - share))
        with _open(whole) as file:
            file.seek(head)
            head += len(file.readline(_PIECE_BYTES))
        if head >= whole.take_bytes:
            return self
        _log.info(
            "%s: the only file, so its last %d bytes are the validation text", whole.name, whole.take_bytes - head
        )
        first = replace(whole, take_bytes=head, key=2**64 - 1)
        return replace(self, files=(first, replace(whole, start_byte=head, take_bytes=whole.take_bytes - head, key=0)))

    def documents(self) -> Iterator[Document]:
        """Every document in order, one (piece) in memory at a time. Raises DataError naming file and line."""
        for index, source in enumerate(self.files):
            yield from _rows(source, index) if source.format == "jsonl" else _pieces(source, index)


def find(
    paths: Sequence[str | Path] = (),
    *,
    format: str = "auto",
    include_tests: bool = False,
    limit_bytes: int | None = None,
) -> Sources:
    """Choose the files of ``paths`` (folders, globs, files), or of the standard library when there are none.

    ``limit_bytes`` keeps a subset chosen by the hash of the name; a single file over the limit is cut at a line's end.
    Raises DataError when a path holds nothing readable.
    """
    skipped: dict[str, int] = {}
    found = _standard_library(include_tests) if not paths else [pair for path in paths for pair in _expand(path)]
    files: dict[Path, Source] = {}
    for path, name in found:
        if path.resolve() in files:
            continue
        kind = format if format != "auto" else ("jsonl" if path.suffix.lower() in _JSONL_SUFFIXES else "text")
        size, reason = _sniff(path, kind)
        if reason:
            skipped[reason] = skipped.get(reason, 0) + 1
            _log.debug("skipped %s: %s", path, reason)
        else:
            files[path.resolve()] = Source(path=path, name=name, format=kind, take_bytes=size)
    if skipped:
        level = logging.INFO if set(skipped) == {"empty"} else logging.WARNING
        _log.log(level, "skipped %s of %d files", ", ".join(f"{n} {why}" for why, n in skipped.items()), len(found))
    if not files:
        given = ", ".join(str(path) for path in paths) or "the standard library"
        raise DataError(
            f"{given}: no readable text among {len(found)} files ({skipped or 'none found'}); check data.paths"
        )
    chosen = list(files.values())
    return Sources(files=tuple(chosen if limit_bytes is None else _limit(chosen, limit_bytes)), skipped=skipped)


def stable_hash(text: str) -> int:
    """64 bits that depend on the text alone (not on PYTHONHASHSEED, machine or version)."""
    return int(xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass")))


def parse_messages(value: object, where: str) -> tuple[Message, ...]:
    """Check a chat's ``messages``; ``where`` (file:line) starts every DataError."""
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: messages is {_short(value)}, expected a list of at least one {{role, content}}")
    messages = []
    for index, entry in enumerate(value):
        role = entry.get("role") if isinstance(entry, dict) else None
        content = entry.get("content") if isinstance(entry, dict) else None
        if role not in _ROLES or not isinstance(content, str):
            raise DataError(
                f"{where}: messages[{index}] is {_short(entry)}, expected role {' | '.join(_ROLES)} and a text content"
            )
        messages.append(Message(role=role, content=_encodable(content, f"{where}: messages[{index}]")))
    if all(message.role != "assistant" for message in messages):
        raise DataError(f"{where}: no assistant message among {len(messages)}; the loss is on assistant tokens only")
    return tuple(messages)


def _standard_library(include_tests: bool) -> list[tuple[Path, str]]:
    root = Path(sysconfig.get_path("stdlib"))
    away = _PACKAGES if include_tests else _PACKAGES + _TESTS
    pairs = _walk(root, "*.py")
    return [(path, name) for path, name in pairs if not set(name.split("/")[:-1]).intersection(away)]


def _walk(root: Path, pattern: str) -> list[tuple[Path, str]]:
    pairs = []
    for path in root.rglob(pattern):
        name = path.relative_to(root).as_posix()
        if path.is_file() and not any(part.startswith(".") for part in name.split("/")):
            pairs.append((path, name))
    return sorted(pairs, key=lambda pair: pair[1])


def _expand(given: str | Path) -> list[tuple[Path, str]]:
    path = Path(given).expanduser()
    if path.is_dir():
        pairs = _walk(path, "*")
    elif path.exists():
        pairs = [(path, path.name)]
    elif glob.has_magic(str(path)):
        fixed = []
        for part in path.parts:
            if glob.has_magic(part):
                break
            fixed.append(part)
        root = Path(*fixed)
        matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
        pairs = [(match, match.relative_to(root).as_posix()) for match in matches if match.is_file()]
    else:
        raise DataError(f"{given}: no such file or folder; give a folder, a glob such as 'src/**/*.py', or files")
    if not pairs:
        raise DataError(f"{given}: holds no files; give a folder, a glob such as 'src/**/*.py', or files")
    return pairs


def _sniff(path: Path, kind: str) -> tuple[int, str]:
    """Size of the file, and why it cannot be used ('' when it can). Rows are checked when they are read."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(_PIECE_BYTES if kind == "text" else _SNIFF_BYTES)
    except OSError:
        return 0, "unreadable"
    if not size:
        return 0, "empty"
    if kind == "jsonl":
        return size, ""
    if b"\0" in head[:_SNIFF_BYTES]:
        return size, "binary"
    try:
        head[: _cut(head) if size > len(head) else len(head)].decode("utf-8")
    except UnicodeDecodeError:
        return size, "not UTF-8"
    return size, ""


def _limit(files: list[Source], limit_bytes: int) -> list[Source]:
    order = sorted(range(len(files)), key=lambda index: stable_hash(f"limit {files[index].name}"))
    left, kept = limit_bytes, set()
    for index in order:
        if files[index].take_bytes <= left:
            kept.add(index)
            left -= files[index].take_bytes
    if kept:
        return [files[index] for index in sorted(kept)]
    first = files[order[0]]
    return [Source(path=first.path, name=first.name, format=first.format, take_bytes=limit_bytes)]


def _open(source: Source) -> BinaryIO:
    try:
        return source.path.open("rb")
    except OSError as error:
        raise DataError(f"{source.path}: {error.strerror}; it was readable when the files were listed") from error


def _cut(block: bytes) -> int:
    """Where to end a block that has more after it: after a line if there is one, else between characters."""
    end = block.rfind(b"\n") + 1
    if end:
        return end
    end = len(block) - 1
    while end > 0 and (block[end] & 0xC0) == 0x80:
        end -= 1
    return end or len(block)


def _pieces(source: Source, index: int) -> Iterator[Document]:
    key = stable_hash(source.name) if source.key is None else source.key
    line, offset, rest = 1, source.start_byte, b""
    with _open(source) as file:
        cut_short = source.start_byte + source.take_bytes < os.fstat(file.fileno()).st_size
        file.seek(source.start_byte)
        left = source.take_bytes
        while left:
            got = file.read(min(left, _PIECE_BYTES))
            left = left - len(got) if got else 0
            block = rest + got
            end = _cut(block) if left or cut_short else len(block)
            rest = block[end:]
            try:
                text = block[:end].decode("utf-8-sig" if offset == 0 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(f"{source.path}: byte {offset + error.start} is not UTF-8; convert the file") from error
            if text or not left:
                yield Document(text=text, source=index, line=line, key=key, more=left > 0)
            line += text.count("\n")
            offset += end


def _rows(source: Source, index: int) -> Iterator[Document]:
    with _open(source) as file:
        left, line = source.take_bytes, 0
        while left > 0 and (row := file.readline(_ROW_BYTES + 1)):
            line += 1
            if len(row) > _ROW_BYTES:
                raise DataError(f"{source.path}:{line}: row of more than {_ROW_BYTES >> 20} MiB; split it")
            left -= len(row)
            if left < 0 and line > 1:
                return
            if row.strip():
                yield _row(row, f"{source.path}:{line}", index, line)


def _row(row: bytes, where: str, source: int, line: int) -> Document:
    try:
        value = json.loads(row.decode("utf-8-sig" if line == 1 else "utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where}: not a JSON row ({error}); each line is one object with 'text' or 'messages'"
        ) from error
    if not isinstance(value, dict) or ("text" in value) == ("messages" in value):
        keys = ", ".join(map(repr, value)) if isinstance(value, dict) else _short(value)
        raise DataError(f"{where}: row has {keys or 'no keys'}, expected an object with either 'text' or 'messages'")
    key = int(xxhash.xxh3_64_intdigest(row.strip()))
    if "messages" in value:
        return Document(messages=parse_messages(value["messages"], where), source=source, line=line, key=key)
    text = value["text"]
    if not isinstance(text, str) or not text:
        raise DataError(f"{where}: text is {_short(text)}, expected a string of at least one character")
    return Document(text=_encodable(text, where), source=source, line=line, key=key)


def _encodable(text: str, where: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: character {error.start} is a lone surrogate, not text; remove it") from error
    return text


def _short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."
