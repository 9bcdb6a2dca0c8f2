"""What a folder says beside its weights: tokenizer, chat template, end-of-text ids, defaults for sampling.

No paper. All of it optional; a file that is there but malformed is an error that names it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trivium.base.errors import CheckpointError

_SAMPLING = "generation_config.json"
_MOST_BYTES = 1 << 20
_MOST_TOKENIZER_BYTES = 256 << 20


@dataclass(frozen=True, kw_only=True)
class GenerationDefaults:
    """Ids that end a text, the id that begins one, and sampling values the folder recommends (None: not said)."""

    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    def recommended(self) -> dict[str, Any]:
        """Fields of `SamplingParams`; the likeliest token where the folder says nothing."""
        names = ("top_k", "top_p", "min_p", "repetition_penalty")
        found = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return {"temperature": 0.0 if self.temperature is None else self.temperature, **found}


def read_json(path: Path, most_bytes: int = _MOST_BYTES) -> dict[str, Any] | None:
    """The JSON object in ``path``, None without the file. Raises CheckpointError for anything else."""
    if not path.is_file():
        return None
    if path.stat().st_size > most_bytes:
        raise CheckpointError(f"{path} has {path.stat().st_size} bytes: at most {most_bytes} are read")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found a {type(found).__name__}")
    return found


def tokenizer_of(folder: Path) -> Path | None:
    """The tokenizer.json of a model folder; of a run's checkpoint the one beside it."""
    for place in (folder, folder.parent if (folder / "manifest.json").exists() else folder):
        path = place / "tokenizer.json"
        if path.is_file():
            if path.stat().st_size > _MOST_TOKENIZER_BYTES:
                raise CheckpointError(
                    f"{path} has {path.stat().st_size} bytes: at most {_MOST_TOKENIZER_BYTES} are read"
                )
            return path
    return None


def chat_template_of(folder: Path) -> str | None:
    """The chat template's text, from its own file or tokenizer_config.json; of several the one called default."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        if path.stat().st_size > _MOST_BYTES:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes: at most {_MOST_BYTES} are read")
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from None
    for name in ("tokenizer_config.json", "chat_template.json"):
        found = (read_json(folder / name, 16 * _MOST_BYTES) or {}).get("chat_template")
        if isinstance(found, list):
            named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
            found = named.get("default")
        if isinstance(found, str):
            return found
    return None


def generation_defaults(folder: Path, config: Mapping[str, Any], tokenizer: Path | None) -> GenerationDefaults:
    """From generation_config.json, then config.json, then the tokenizer's own end-of-text token."""
    told = read_json(folder / _SAMPLING) or {}
    ends = _ids(folder, told.get("eos_token_id")) or _ids(folder, config.get("eos_token_id"))
    if not ends and tokenizer is not None:
        ends = _tokenizer_eos(tokenizer)
    begin = _ids(folder, told.get("bos_token_id")) or _ids(folder, config.get("bos_token_id"))
    pad = _ids(folder, told.get("pad_token_id")) or _ids(folder, config.get("pad_token_id"))
    # Where the file says to draw, transformers takes temperature 1 and the 50 likeliest tokens where it says no other.
    samples = told.get("do_sample") is True
    return GenerationDefaults(
        eos_token_ids=ends,
        bos_token_id=begin[0] if begin else None,
        pad_token_id=pad[0] if pad else None,
        temperature=_number(folder, told, "temperature", 1.0) if samples else None,
        top_k=_whole(folder, told, "top_k", 50) if samples else None,
        top_p=_number(folder, told, "top_p") if samples else None,
        min_p=_number(folder, told, "min_p") if samples else None,
        repetition_penalty=_number(folder, told, "repetition_penalty"),
    )


def _ids(folder: Path, found: Any) -> tuple[int, ...]:
    if found is None:
        return ()
    items = found if isinstance(found, list) else [found]
    if any(type(item) is not int for item in items):
        raise CheckpointError(f"{folder}: token ids {str(found)[:100]}: expected whole numbers")
    return tuple(item for item in items if item >= 0)


def _number(folder: Path, told: Mapping[str, Any], key: str, default: float | None = None) -> float | None:
    found = told.get(key)
    if found is None:
        return default
    if isinstance(found, bool) or not isinstance(found, (int, float)):
        raise CheckpointError(f"{folder / _SAMPLING}: {key}={str(found)[:100]!r}: expected a number")
    return float(found)


def _whole(folder: Path, told: Mapping[str, Any], key: str, default: int) -> int:
    found = told.get(key)
    if found is None:
        return default
    if type(found) is not int:
        raise CheckpointError(f"{folder / _SAMPLING}: {key}={str(found)[:100]!r}: expected a whole number")
    return found


def _tokenizer_eos(tokenizer: Path) -> tuple[int, ...]:
    """The id of the eos_token that tokenizer_config.json names, among the added tokens of tokenizer.json."""
    named = (read_json(tokenizer.parent / "tokenizer_config.json", 16 * _MOST_BYTES) or {}).get("eos_token")
    text = named.get("content") if isinstance(named, dict) else named
    if not isinstance(text, str):
        return ()
    added = (read_json(tokenizer, _MOST_TOKENIZER_BYTES) or {}).get("added_tokens")
    for one in added if isinstance(added, list) else []:
        if isinstance(one, dict) and one.get("content") == text and type(one.get("id")) is int:
            return (one["id"],)
    return ()
