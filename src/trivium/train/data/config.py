"""The [data] table of a training config: which text, which tokenizer, how it is split and cut."""

from __future__ import annotations

from dataclasses import dataclass

from trivium.base.errors import ConfigError

FORMATS = ("auto", "text", "jsonl")
_CEILING = 1 << 32


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What to read and how to turn it into batches.

    ``paths``: folders, globs or files; empty means the Python standard library's own source.
    ``format``: ``auto`` takes .jsonl and .ndjson as rows, all else as text.
    ``tokenizer``: a tokenizer.json or a folder that holds one; None: the one that ``[model] from`` brings, else a
    byte-level BPE is trained, of ``vocabulary`` entries, on the training documents. ``validation`` is the share of
    files (rows, for JSONL) kept out of training.
    ``limit_bytes`` reads only that much (files chosen by hash, so the choice is stable). ``cache`` is a folder; None
    means the run's own.
    """

    paths: tuple[str, ...] = ()
    format: str = "auto"
    include_tests: bool = False
    limit_bytes: int | None = None
    tokenizer: str | None = None
    vocabulary: int = 8192
    sequence: int = 512
    validation: float = 0.05
    cache: str | None = None

    def __post_init__(self) -> None:
        """Check every value on its own; combinations are checked where the numbers meet."""
        if self.format not in FORMATS:
            raise ConfigError(f"data.format={self.format!r}: expected one of {', '.join(FORMATS)}")
        if not 2 <= self.sequence < _CEILING:
            raise ConfigError(f"data.sequence={self.sequence}: expected 2 tokens or more, below 2^32")
        if self.tokenizer is None and not 262 <= self.vocabulary < _CEILING:
            raise ConfigError(
                f"data.vocabulary={self.vocabulary}: expected 262 or more (256 bytes and 6 control tokens), below 2^32"
            )
        if not 0.0 <= self.validation < 1.0:
            raise ConfigError(f"data.validation={self.validation}: expected a share from 0 up to, not including, 1")
        if self.limit_bytes is not None and self.limit_bytes < 1:
            raise ConfigError(f"data.limit_bytes={self.limit_bytes}: expected 1 or more, or leave it out for no limit")
