"""From a [data] table to two corpora and a tokenizer, cached by the hash of contents and settings.

Safe when several ranks do it at once (each writes apart, the first to finish wins), cheap when one rank went first.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import xxhash

from trivium.train.data.config import DataConfig
from trivium.train.data.corpus import Corpus, tokenise
from trivium.train.data.sources import Sources, find
from trivium.train.data.split import is_validation
from trivium.train.data.tokenizer import Tokenizer

_log = logging.getLogger(__name__)
_TRAINING_CHARS = 64 << 20


@dataclass(frozen=True, kw_only=True)
class Data:
    """What a run reads: ``validation`` has no documents when the share is 0. ``sources`` tells what was found."""

    tokenizer: Tokenizer
    train: Corpus
    validation: Corpus
    sources: Sources


def prepare(config: DataConfig, folder: str | Path) -> Data:
    """Find, tokenise and split; everything derived is kept under ``config.cache``, or under ``folder`` when unset."""
    cache = Path(config.cache).expanduser() if config.cache else Path(folder)
    sources = find(
        config.paths, format=config.format, include_tests=config.include_tests, limit_bytes=config.limit_bytes
    ).with_tail_apart(config.validation)
    content = sources.fingerprint()
    tokenizer = _tokenizer(config, sources, content, cache)
    key = _hash("corpus", content, tokenizer.to_json(), tokenizer.template, tokenizer.end_id, tokenizer.begin_id)
    place = cache / f"corpus-{key}"
    if (place / "corpus.json").is_file():
        corpus = Corpus.open(place)
        _log.info("corpus of %d tokens from %s", len(corpus.tokens), place)
    else:
        corpus = tokenise(sources, tokenizer, place, fingerprint=key)
        _log.info(
            "corpus of %d tokens from %d bytes in %d files", len(corpus.tokens), sources.num_bytes, len(sources.files)
        )
    train, validation = corpus.split(config.validation)
    return Data(tokenizer=tokenizer, train=train, validation=validation, sources=sources)


def _tokenizer(config: DataConfig, sources: Sources, content: str, cache: Path) -> Tokenizer:
    if config.tokenizer is not None:
        return Tokenizer.load(Path(config.tokenizer).expanduser())
    place = cache / f"tokenizer-{_hash('tokenizer', content, config.vocabulary, config.validation)}"
    if (place / "tokenizer.json").is_file():
        return Tokenizer.load(place)
    Tokenizer.train(_training_texts(sources, config.validation), vocabulary=config.vocabulary).save(place)
    return Tokenizer.load(place)


def _training_texts(sources: Sources, share: float) -> Iterator[str]:
    """Texts that are not held out, up to 64 Mi characters: more changes a vocabulary of this size little."""
    chars = 0
    for document in sources.documents():
        if chars >= _TRAINING_CHARS:
            return
        if share and is_validation(document.key, share):
            continue
        for text in (document.text, *(message.content for message in document.messages)):
            chars += len(text)
            yield text


def _hash(*parts: object) -> str:
    return str(xxhash.xxh3_128_hexdigest(json.dumps(parts).encode()))
