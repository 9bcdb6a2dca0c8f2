"""Text to token ids and back for a served model: plain text never becomes a control token, chats by their template.

No paper. Reads tokenizer.json and what stands beside it; no code of the folder is run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import tokenizers

from trivium.base.errors import ConfigError, DataError
from trivium.inference.chat_template import ChatTemplate
from trivium.inference.generation import chat_template_of, read_json
from trivium.inference.request import RequestError

_NAMED = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
_CONFIG_BYTES = 64 << 20


class Tokenizer:
    """A folder's tokenizer. Safe to use from several threads.

    ``control`` are the texts of its control tokens and their ids, ``names`` the ones that have a name (``bos_token``).
    """

    def __init__(self, text: str, *, config: Mapping[str, Any] | None = None, template: str | None = None) -> None:
        """From the text of a tokenizer.json, the values of tokenizer_config.json and a chat template's text.

        Raises DataError when they are malformed.
        """
        self._text = text
        self._plain = _backend(text)
        self._plain.encode_special_tokens = True
        config = config or {}
        self.names = {name: found for name in _NAMED if (found := _token(config.get(name))) is not None}
        added = self._plain.get_added_tokens_decoder()
        self.control: dict[str, int] = {token.content: number for number, token in added.items() if token.special}
        for name in self.names.values():
            number = self._plain.token_to_id(name)
            if number is not None:
                self.control[name] = number
        self._control_ids = frozenset(self.control.values())
        ordered = sorted(self.control, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, ordered))) if ordered else None
        self._begin = self._always_begins(config)
        self.template = None if template is None else ChatTemplate(template)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """From a tokenizer.json, or a folder that holds one; tokenizer_config.json and the template are beside it."""
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{file} cannot be read: {error}") from error
        config = read_json(file.parent / "tokenizer_config.json", _CONFIG_BYTES)
        try:
            return cls(text, config=config, template=chat_template_of(file.parent))
        except DataError as error:
            raise DataError(f"{file}: {error}") from error

    @property
    def vocabulary(self) -> int:
        """Every id is below it."""
        return max(self._plain.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str, *, special: bool = True, control: bool = False) -> list[int]:
        """Token ids of ``text``; ``special``: with what the model expects around it (a token that begins texts).

        What looks like a control token in ``text`` is encoded as ordinary text, unless ``control`` says to trust it.

        Raises:
            RequestError: half a character (a lone surrogate) is no text.
        """
        if not text.isascii():
            _check_characters(text)
        backend = self._trusting if control else self._plain
        ids = list(backend.encode(text, add_special_tokens=special).ids)
        if not control and self._said(text, ids, special):
            ids = self._in_pieces(text, special)
        if special and self._begin is not None and ids[:1] != [self._begin]:
            ids.insert(0, self._begin)
        return ids

    def decode(self, token_ids: Sequence[int], *, control: bool = False) -> str:
        """The text of ids; control tokens are left out unless ``control``. Raises DataError for an id that is none."""
        try:
            return str(self._plain.decode(list(token_ids), skip_special_tokens=not control))
        except (OverflowError, TypeError) as error:
            raise DataError(f"token ids {list(token_ids)[:8]}: expected whole numbers from 0 on") from error

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        prompt: bool = True,
        continue_final_message: bool = False,
        **options: Any,
    ) -> list[int]:
        """Token ids of a chat by the model's template; ``prompt``: up to where the assistant begins.

        ``continue_final_message``: up to the end of the last message's content instead, for an answer that goes on.
        Control tokens come from the template alone: in contents, names and tools their texts stay texts.

        Raises:
            ConfigError: the model has no chat template, or its template refuses the messages.
            DataError: the template failed.
        """
        if self.template is None:
            raise ConfigError("the model has no chat template: give a plain prompt, or add chat_template.jinja to it")
        rendered = self.template.render(
            messages,
            tools=tools,
            add_generation_prompt=prompt,
            continue_final_message=continue_final_message,
            tokens=self.names,
            control=self.control,
            **options,
        )
        if not rendered.mark:
            return self.encode(rendered.text, special=False, control=True)
        ids: list[int] = []
        for piece, number in self._split(rendered.text):
            text = piece.replace(rendered.mark, "")
            ids += [number] if number is not None else self.encode(text, special=False)
        return ids

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **options: Any,
    ) -> list[int]:
        """`chat` under the name other libraries use."""
        return self.chat(
            messages,
            tools=tools,
            prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            **options,
        )

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for; none for control tokens and ids that are not there."""
        piece = self._plain.id_to_token(token_id)
        if piece is None or token_id in self._control_ids:
            return b""
        byte = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", piece)
        if byte is not None and self._falls_back:
            return bytes([int(byte[1], 16)])
        if self._by_bytes:
            if token_id in self._added_ids:
                return piece.encode()
            return bytes(_BYTE_OF[char] for char in piece if char in _BYTE_OF)
        return piece.replace("▁", " ").encode()

    @cached_property
    def _trusting(self) -> tokenizers.Tokenizer:
        return _backend(self._text)

    @cached_property
    def _by_bytes(self) -> bool:
        return '"ByteLevel"' in self._text

    @cached_property
    def _falls_back(self) -> bool:
        return re.search(r'"byte_fallback"\s*:\s*true', self._text) is not None

    @cached_property
    def _added_ids(self) -> frozenset[int]:
        return frozenset(self._plain.get_added_tokens_decoder())

    def _always_begins(self, config: Mapping[str, Any]) -> int | None:
        """The id that begins every text by the config alone, where tokenizer.json does not say so itself."""
        begin = self.names.get("bos_token")
        if config.get("add_bos_token") is not True or begin is None:
            return None
        return self._plain.token_to_id(begin)

    def _said(self, text: str, ids: list[int], special: bool) -> bool:
        """Whether text alone made a control id (some models' vocabularies hold the texts themselves)."""
        if self._pattern is None or self._pattern.search(text) is None:
            return False
        around = 0
        if special:
            around = sum(number in self._control_ids for number in self._plain.encode("", add_special_tokens=True).ids)
        return sum(number in self._control_ids for number in ids) > around

    def _in_pieces(self, text: str, special: bool) -> list[int]:
        """``text`` with every control token's text cut behind its first character, so that no piece holds one."""
        ids = list(self._plain.encode("", add_special_tokens=True).ids) if special else []
        start = 0
        cuts = [match.start() + 1 for match in self._pattern.finditer(text)] if self._pattern is not None else []
        for end in [*cuts, len(text)]:
            ids += self._plain.encode(text[start:end], add_special_tokens=False).ids
            start = end
        return ids

    def _split(self, text: str) -> list[tuple[str, int | None]]:
        """Pieces of a rendered chat: ordinary text, or a control token with its id."""
        if self._pattern is None:
            return [(text, None)]
        pieces: list[tuple[str, int | None]] = []
        start = 0
        for match in self._pattern.finditer(text):
            if match.start() > start:
                pieces.append((text[start : match.start()], None))
            pieces.append((match[0], self.control[match[0]]))
            start = match.end()
        if start < len(text):
            pieces.append((text[start:], None))
        return pieces


def _check_characters(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(
            f"the text holds the lone surrogate \\u{ord(text[error.start]):04x} at character {error.start}, which is "
            "half a character: expected whole ones",
            param="prompt",
        ) from None


def _backend(text: str) -> tokenizers.Tokenizer:
    try:
        backend = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception for a malformed file
        raise DataError(f"not a tokenizer.json: {error}") from error
    backend.no_padding()
    backend.no_truncation()
    return backend


def _token(value: object) -> str | None:
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def _byte_alphabet() -> Mapping[str, int]:
    """Byte-level tokenizers' printable stand-ins for the 256 bytes."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in set(shown)]
    found = {**{chr(byte): byte for byte in shown}, **{chr(256 + i): byte for i, byte in enumerate(hidden)}}
    return MappingProxyType(found)


_BYTE_OF = _byte_alphabet()
