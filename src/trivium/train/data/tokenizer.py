"""Text to token ids and back: train a byte-level BPE or load a tokenizer.json; no control token is read from text."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from trivium.base.errors import DataError
from trivium.train.data.chat import TEMPLATE, Template
from trivium.train.data.sources import Message

END = "<|end|>"
PAD = "<|pad|>"
CHAT = ("<|system|>", "<|user|>", "<|assistant|>")
UNKNOWN = "<|unknown|>"
CONTROL = (END, PAD, *CHAT)


class Tokenizer:
    """A `tokenizers.Tokenizer` with its end and pad tokens and its chat template.

    ``encode`` takes plain text: what looks like a control token in it becomes ordinary text, never the token.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        end: str = END,
        pad: str | None = PAD,
        begin: str | None = None,
        template: str | None = TEMPLATE,
        source: str = "tokenizer",
    ) -> None:
        """Wrap ``backend``; ``end`` must be one of its tokens. ``begin``, when given, is put before each text."""
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = True
        self._backend = backend
        self._source = source
        self._names = {"eos_token": end, "pad_token": pad or end, "bos_token": begin or ""}
        self.end_id = self._id(end)
        self.pad_id = self._id(pad) if pad else self.end_id
        self.begin_id = self._id(begin) if begin else None
        self._control = {
            token.content: index for index, token in backend.get_added_tokens_decoder().items() if token.special
        }
        self._control_ids = frozenset(self._control.values())
        self._template = None if template is None else Template(template, source=source)

    @classmethod
    def train(cls, texts: Iterable[str], *, vocabulary: int) -> Tokenizer:
        """A byte-level BPE of at most ``vocabulary`` entries; equal texts give equal bytes on disk."""
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=list(CONTROL),
            show_progress=False,
            min_frequency=2,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        )
        backend.train_from_iterator(iter(texts), trainer=trainer)
        return cls(backend)

    @classmethod
    def of_characters(cls, characters: str, words: Sequence[str] = (), *, template: str = TEMPLATE) -> Tokenizer:
        """One token per character, and one for each of ``words`` wherever it stands; other characters are refused."""
        vocabulary = {token: index for index, token in enumerate((*CONTROL, UNKNOWN, *dict.fromkeys(characters)))}
        backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
        backend.add_special_tokens([*CONTROL, UNKNOWN])
        backend.add_tokens([tokenizers.AddedToken(word, normalized=False) for word in words])
        backend.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), behavior="isolated")
        backend.decoder = decoders.Fuse()
        return cls(backend, template=template)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """From a tokenizer.json or a folder with one (and tokenizer_config.json, chat_template.jinja beside it)."""
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        try:
            backend = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise DataError(
                f"{file}: {error.strerror}; expected a tokenizer.json or a folder that holds one"
            ) from error
        except Exception as error:  # the library raises bare Exception for a malformed file
            raise DataError(f"{file}: not a tokenizer.json ({error})") from error
        config = (
            _read_config(file.parent / "tokenizer_config.json")
            if path.is_dir() or path.name == "tokenizer.json"
            else {}
        )
        end = _token(config.get("eos_token")) or _guess_end(backend, file)
        begin = _token(config.get("bos_token"))
        adds = config.get("add_bos_token", False) or _adds_begin(backend, begin)
        jinja = file.parent / "chat_template.jinja"
        template = (
            jinja.read_text(encoding="utf-8") if jinja.is_file() else _default_template(config.get("chat_template"))
        )
        if template is None and all(backend.token_to_id(token) is not None for token in CHAT):
            template = TEMPLATE
        pad = _token(config.get("pad_token")) or (PAD if backend.token_to_id(PAD) is not None else None)
        return cls(backend, end=end, pad=pad, begin=begin if adds else None, template=template, source=str(file))

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json; each appears whole or not at all."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._backend.encode_special_tokens = False  # how others expect the file; restored below
        try:
            text = self._backend.to_str(pretty=False)
        finally:
            self._backend.encode_special_tokens = True
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self._names["eos_token"],
            "pad_token": self._names["pad_token"],
            "clean_up_tokenization_spaces": False,
        }
        if self.begin_id is not None:
            config |= {"bos_token": self._names["bos_token"], "add_bos_token": True}
        if self._template is not None:
            config["chat_template"] = self._template.text
        write_whole(folder / "tokenizer_config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
        write_whole(folder / "tokenizer.json", text)

    @property
    def vocabulary(self) -> int:
        """Number of ids; every id is below it."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def template(self) -> str | None:
        """The chat template's text, or None."""
        return None if self._template is None else self._template.text

    def to_json(self) -> str:
        """The tokenizer.json text; its hash identifies the tokenizer."""
        return str(self._backend.to_str(pretty=False))

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text, without begin or end. Raises DataError for a character it does not know."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of several texts, on all cores the library was given."""
        ids = [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]
        unknown = self._control.get(UNKNOWN)
        if unknown is not None:
            for text, row in zip(texts, ids, strict=True):
                if unknown in row:
                    start, end = self._backend.encode(text, add_special_tokens=False).offsets[row.index(unknown)]
                    bad = text[start:end]
                    raise DataError(f"{text!r}: character {bad!r} is not in the vocabulary of {self._source}")
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``, control tokens left out."""
        return str(self._backend.decode(list(ids), skip_special_tokens=True))

    def encode_chat(
        self, messages: Sequence[Message], *, prompt: bool = False, where: str = "chat"
    ) -> tuple[list[int], list[bool]]:
        """Token ids of a rendered chat and, for each, whether it is learned: assistant content and what ends it.

        ``prompt`` ends with the template's opening of an assistant turn, ready for an answer.
        """
        if self._template is None:
            raise DataError(f"{where}: {self._source} has no chat_template; add one to its tokenizer_config.json")
        ids: list[int] = []
        learned: list[bool] = []
        answered = False
        for text, role in self._template.render(messages, self._names, prompt=prompt, where=where):
            if role is not None:
                piece = self.encode(text)
                ids += piece
                learned += [role == "assistant"] * len(piece)
                answered = role == "assistant"
                continue
            piece = self._encode_control(text)
            ends = [index + 1 for index, token in enumerate(piece) if token in self._control_ids]
            stop = ends[0] if answered and ends else 0
            ids += piece
            learned += [True] * stop + [False] * (len(piece) - stop)
            answered = False
        return ids, learned

    def _encode_control(self, text: str) -> list[int]:
        self._backend.encode_special_tokens = False
        try:
            return list(self._backend.encode(text, add_special_tokens=False).ids)
        finally:
            self._backend.encode_special_tokens = True

    def _id(self, token: str) -> int:
        index = self._backend.token_to_id(token)
        if index is None:
            raise DataError(f"{self._source}: token {token!r} is not in its vocabulary; check tokenizer_config.json")
        return int(index)


def write_whole(path: Path, text: str) -> None:
    """Write ``path`` so that a reader sees the old content or the new, never a part."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected an object, got {type(value).__name__}")
    return value


def _token(value: object) -> str | None:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def _default_template(value: object) -> str | None:
    if isinstance(value, list):
        named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else None


def _guess_end(backend: tokenizers.Tokenizer, file: Path) -> str:
    known = (END, "<|endoftext|>", "</s>", "<|end_of_text|>", "<|im_end|>", "<eos>", "[SEP]")
    for token in known:
        if backend.token_to_id(token) is not None:
            return token
    beside = file.parent / "tokenizer_config.json"
    raise DataError(f"{file}: no end token; put eos_token into {beside} (tried {', '.join(known)})")


def _adds_begin(backend: tokenizers.Tokenizer, begin: str | None) -> bool:
    return begin is not None and backend.encode("", add_special_tokens=True).ids[:1] == [backend.token_to_id(begin)]
