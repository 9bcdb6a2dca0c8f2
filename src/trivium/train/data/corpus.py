"""Tokenised documents on disk: one flat file of ids read through memory maps, with offsets, keys and origins beside it.

Layout of the folder: corpus.json (counts, sizes, sources), tokens.bin (uint16 or uint32), offsets.bin, keys.bin,
origins.bin, and learned.bin (one byte per token) when some tokens carry no loss. Plain numbers only; every size is
checked when the folder is opened.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from trivium.base.errors import DataError
from trivium.train.data.sources import Document, Sources
from trivium.train.data.split import split
from trivium.train.data.tokenizer import Tokenizer, write_whole

Array = npt.NDArray[Any]
_VERSION = 1
_BATCH_CHARS = 4 << 20


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Tokens of some documents: document d is ``tokens[offsets[d]:offsets[d + 1]]`` for each d in ``documents``.

    ``learned`` is None when every token is to be predicted (the first of a document never is). ``origins`` holds
    (source, line) per document. ``vocabulary``: every id must be below it, which is checked where batches are made.
    """

    tokens: Array
    offsets: Array
    keys: Array
    origins: Array
    learned: Array | None
    sources: tuple[str, ...]
    documents: Array
    vocabulary: int
    pad_id: int
    fingerprint: str

    @property
    def num_tokens(self) -> int:
        """Tokens in the chosen documents."""
        return int((self.offsets[self.documents + 1] - self.offsets[self.documents]).sum())

    def name(self, document: int) -> str:
        """``file:line`` where a document begins."""
        source, line = self.origins[document]
        return f"{self.sources[int(source)]}:{int(line)}"

    def split(self, share: float) -> tuple[Corpus, Corpus]:
        """Training and validation part, both views of the same files."""
        train, held = split(self.keys[self.documents], share)
        return self._part(train, f"train-{share}"), self._part(held, f"validation-{share}")

    def _part(self, chosen: Array, label: str) -> Corpus:
        return Corpus(
            tokens=self.tokens, offsets=self.offsets, keys=self.keys, origins=self.origins, learned=self.learned,
            sources=self.sources, documents=self.documents[chosen], vocabulary=self.vocabulary, pad_id=self.pad_id,
            fingerprint=f"{self.fingerprint}/{label}",
        )  # fmt: skip

    @classmethod
    def of(
        cls,
        documents: Iterable[tuple[Sequence[int], Sequence[bool] | None]],
        *,
        vocabulary: int,
        pad_id: int,
        source: str = "memory",
        keys: Sequence[int] | None = None,
    ) -> Corpus:
        """A corpus in memory from (ids, learned or None) pairs; ``source`` names it in errors, the row is its line."""
        rows = list(documents)
        offsets = np.concatenate([[0], np.cumsum([len(ids) for ids, _ in rows], dtype=np.int64)]).astype(np.int64)
        tokens = np.fromiter(chain.from_iterable(ids for ids, _ in rows), np.int64, int(offsets[-1]))
        learned = None
        if any(mask is not None for _, mask in rows):
            flags = (mask if mask is not None else repeat(True, len(ids)) for ids, mask in rows)
            learned = np.fromiter(chain.from_iterable(flags), np.uint8, int(offsets[-1]))
        total = xxhash.xxh3_128(tokens.tobytes())
        total.update(offsets.tobytes())
        total.update(b"" if learned is None else learned.tobytes())
        return cls(
            tokens=tokens, offsets=offsets, learned=learned, sources=(source,), vocabulary=vocabulary, pad_id=pad_id,
            keys=np.asarray(keys if keys is not None else range(len(rows)), dtype=np.uint64),
            origins=np.stack([np.zeros(len(rows), np.int64), np.arange(1, len(rows) + 1)], axis=1),
            documents=np.arange(len(rows), dtype=np.int64), fingerprint=total.hexdigest(),
        )  # fmt: skip

    @classmethod
    def open(cls, folder: str | Path) -> Corpus:
        """Map a tokenised folder. Raises DataError when a file is missing or not of the stated size."""
        folder = Path(folder)
        try:
            about = json.loads((folder / "corpus.json").read_text(encoding="utf-8"))
            num_tokens, num_documents = int(about["tokens"]), int(about["documents"])
            token_type = {"uint16": np.uint16, "uint32": np.uint32}[about["dtype"]]
            vocabulary, pad_id, version = int(about["vocabulary"]), int(about["pad_id"]), int(about["version"])
            sources, masked, fingerprint = (
                tuple(map(str, about["sources"])),
                bool(about["masked"]),
                str(about["fingerprint"]),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{folder}: not a tokenised corpus ({error!r}); delete the folder to tokenise again"
            ) from error
        if version != _VERSION or min(num_tokens, num_documents) < 0:
            raise DataError(
                f"{folder}: corpus version {version}, {num_tokens} tokens; delete the folder to tokenise again"
            )
        offsets = _map(folder / "offsets.bin", np.int64, (num_documents + 1,))
        if offsets[0] != 0 or offsets[-1] != num_tokens or (np.diff(offsets) < 0).any():
            raise DataError(
                f"{folder / 'offsets.bin'}: not ascending from 0 to {num_tokens}; delete {folder} to tokenise again"
            )
        return cls(
            tokens=_map(folder / "tokens.bin", token_type, (num_tokens,)),
            offsets=offsets,
            keys=_map(folder / "keys.bin", np.uint64, (num_documents,)),
            origins=_map(folder / "origins.bin", np.int64, (num_documents, 2)),
            learned=_map(folder / "learned.bin", np.uint8, (num_tokens,)) if masked else None,
            sources=sources, documents=np.arange(num_documents, dtype=np.int64), vocabulary=vocabulary, pad_id=pad_id,
            fingerprint=fingerprint,
        )  # fmt: skip


class Writer:
    """Writes a corpus folder as documents come, holding a few MiB; ``close`` makes it appear whole under its name."""

    def __init__(self, folder: str | Path, *, vocabulary: int, pad_id: int, fingerprint: str) -> None:
        """Start in a folder beside ``folder`` that only this process uses."""
        self._folder = Path(folder)
        self._part = self._folder.with_name(f".{self._folder.name}.{os.getpid()}")
        shutil.rmtree(self._part, ignore_errors=True)
        self._part.mkdir(parents=True)
        self._type = np.uint16 if vocabulary <= 1 << 16 else np.uint32
        self._about = {"version": _VERSION, "vocabulary": vocabulary, "pad_id": pad_id, "fingerprint": fingerprint}
        self._files = {
            name: (self._part / f"{name}.bin").open("wb")
            for name in ("tokens", "offsets", "keys", "origins", "learned")
        }
        self._files["offsets"].write(np.int64(0).tobytes())
        self._tokens = self._documents = 0
        self._masked = False

    def add(
        self, ids: Sequence[int], learned: Sequence[bool] | None, *, key: int, source: int, line: int, ends: bool
    ) -> None:
        """Append a document, or a piece of one when not ``ends``; key, source and line count where it ends."""
        self._files["tokens"].write(np.asarray(ids, dtype=self._type).tobytes())
        flags = np.ones(len(ids), np.uint8) if learned is None else np.asarray(learned, np.uint8)
        self._files["learned"].write(flags.tobytes())
        self._masked = self._masked or learned is not None
        self._tokens += len(ids)
        if ends:
            self._documents += 1
            self._files["offsets"].write(np.int64(self._tokens).tobytes())
            self._files["keys"].write(np.uint64(key).tobytes())
            self._files["origins"].write(np.asarray([source, line], dtype=np.int64).tobytes())

    def close(self, sources: Sequence[str]) -> Corpus:
        """Finish, move into place (another process that was first wins) and open."""
        for file in self._files.values():
            file.close()
        if not self._masked:
            (self._part / "learned.bin").unlink()
        about = self._about | {
            "tokens": self._tokens, "documents": self._documents, "dtype": np.dtype(self._type).name,
            "masked": self._masked, "sources": list(sources),
        }  # fmt: skip
        write_whole(self._part / "corpus.json", json.dumps(about))
        try:
            self._part.rename(self._folder)
        except OSError:
            if not (self._folder / "corpus.json").is_file():
                raise
            shutil.rmtree(self._part, ignore_errors=True)
        return Corpus.open(self._folder)

    def abandon(self) -> None:
        """Remove what was written."""
        for file in self._files.values():
            file.close()
        shutil.rmtree(self._part, ignore_errors=True)


def tokenise(sources: Sources, tokenizer: Tokenizer, folder: str | Path, *, fingerprint: str) -> Corpus:
    """Write every document of ``sources`` as tokens, each ended by the end token, and open the result."""
    writer = Writer(folder, vocabulary=tokenizer.vocabulary, pad_id=tokenizer.pad_id, fingerprint=fingerprint)
    try:
        batch: list[Document] = []
        chars = 0
        starts = True
        for document in sources.documents():
            batch.append(document)
            chars += len(document.text)
            if chars >= _BATCH_CHARS or len(batch) >= 1 << 14:
                starts = _write(batch, sources, tokenizer, writer, starts)
                batch, chars = [], 0
        _write(batch, sources, tokenizer, writer, starts)
        return writer.close([source.name for source in sources.files])
    except BaseException:
        writer.abandon()
        raise


def _write(batch: Sequence[Document], sources: Sources, tokenizer: Tokenizer, writer: Writer, starts: bool) -> bool:
    """Encode and append. ``starts``: the first piece begins a document; returns the same for the next batch."""
    texts = iter(tokenizer.encode_batch([document.text for document in batch if not document.messages]))
    masked = any(document.messages for document in batch)
    for document in batch:
        learned: list[bool] | None = None
        if document.messages:
            where = f"{sources.files[document.source].path}:{document.line}"
            ids, learned = tokenizer.encode_chat(document.messages, where=where)
            if not any(learned[1:]):
                raise DataError(f"{where}: no token of the chat carries loss; its assistant messages are empty")
        else:
            begin = [tokenizer.begin_id] if starts and tokenizer.begin_id is not None else []
            ids = [*begin, *next(texts), *([] if document.more else [tokenizer.end_id])]
            learned = [True] * len(ids) if masked else None
        starts = not document.more
        writer.add(ids, learned, key=document.key, source=document.source, line=document.line, ends=starts)
    return starts


def _map(path: Path, dtype: Any, shape: tuple[int, ...]) -> Array:
    expected = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    found = path.stat().st_size if path.is_file() else -1
    if found != expected:
        state = "missing" if found < 0 else f"{found} bytes"
        raise DataError(f"{path}: {state}, expected {expected} bytes; delete {path.parent} to tokenise again")
    return np.zeros(shape, dtype) if expected == 0 else np.memmap(path, dtype=dtype, mode="r", shape=shape)
