"""``trivium chat``: talk to a model in the terminal."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trivium.base import log
from trivium.base.errors import ConfigError, TriviumError
from trivium.cli import loading
from trivium.cli.loading import Options, given, open_llm, shown
from trivium.cli.output import word_console

if TYPE_CHECKING:
    from trivium.inference import LLM, SamplingParams

_HELP = """Type a message and press Enter; a line that ends in \\ goes on in the next one.
/system TEXT   tell the model how to behave (without TEXT: forget it)
/reset         begin anew, keeping /system
/retry         another answer to your last message
/save FILE     write the conversation as JSON
/help          this text
/quit          leave (Ctrl-D too). Ctrl-C stops an answer."""


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command("chat")(chat)


def chat(
    model: loading.Model,
    system: Annotated[str | None, typer.Option(help="How the model is to behave.")] = None,
    max_tokens: loading.MaxTokens = 1024,
    temperature: loading.Temperature = None,
    top_k: loading.TopK = None,
    top_p: loading.TopP = None,
    min_p: loading.MinP = None,
    repetition_penalty: loading.RepetitionPenalty = None,
    seed: loading.Seed = None,
    dtype: loading.DType = "auto",
    quantize: loading.Quantize = None,
    device: loading.Device = "auto",
    memory: loading.Memory = None,
    backend: loading.Backend = "auto",
    threads: loading.Threads = None,
    max_positions: loading.MaxPositions = None,
    cache_dtype: loading.CacheDType = "auto",
) -> None:
    """A conversation with memory: /help tells the commands, Ctrl-C stops an answer, Ctrl-D leaves."""
    log.setup()
    options = Options(
        dtype=dtype, quantize=quantize, device=device, memory=memory, backend=backend, threads=threads,
        max_positions=max_positions, cache_dtype=cache_dtype,
    )  # fmt: skip
    llm = open_llm(model, options, max_sequences=1)
    if llm.tokenizer is None or llm.tokenizer.template is None:
        missing = "tokenizer" if llm.tokenizer is None else "chat template"
        raise ConfigError(f"{llm.name} has no {missing}, so it cannot chat; try: trivium generate {model} --prompt …")
    params = llm.sampling(
        max_tokens=max_tokens,
        **given(
            temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty,
            seed=seed,
        ),
    )  # fmt: skip
    thread = llm.serve()
    try:
        Conversation(llm, params, system).run()
    finally:
        thread.close()


class Conversation:
    """The messages so far and the loop that adds to them."""

    def __init__(self, llm: LLM, params: SamplingParams, system: str | None) -> None:
        self.llm, self.params = llm, params
        self.system = system
        self.messages: list[dict[str, str]] = []
        self._terminal = sys.stdin.isatty() and sys.stdout.isatty()
        self._words = word_console()
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: self._words.print(_HELP),
            "/system": self._set_system,
            "/reset": self._reset,
            "/retry": self._retry,
            "/save": self._save,
        }

    def run(self) -> None:
        """Read and answer until /quit or the end of input; Ctrl-C twice in a row at an empty prompt leaves too."""
        if self._terminal:
            import readline  # noqa: F401  line editing and history for input()

            self._words.print(f"{self.llm.name}: {self.llm.max_positions} tokens of context. /help tells the commands.")
        interrupted = False
        while True:
            try:
                text = self._read()
                interrupted = False
            except EOFError:
                break
            except KeyboardInterrupt:
                if interrupted or not self._terminal:
                    raise
                interrupted = True
                self._words.print("\n(Ctrl-C again or Ctrl-D to leave)")
                continue
            if text.strip() == "/quit":
                break
            try:
                self._take(text)
            except KeyboardInterrupt:
                if not self._terminal:
                    raise
                self._words.print("\n(stopped)")

    def _take(self, text: str) -> None:
        """A command, or a message to answer."""
        word, _, rest = text.strip().partition(" ")
        if word.startswith("/") and word.isascii() and word[1:].isalpha():
            command = self._commands.get(word)
            if command is None:
                self._words.print(f"{word}: no such command; /help tells them")
            else:
                command(rest.strip())
        elif text.strip():
            self.messages.append({"role": "user", "content": text})
            self._answer()

    def _answer(self) -> None:
        """Stream an answer to the last message; what a Ctrl-C left of it stays in the conversation."""
        from trivium.inference import ContextLengthError

        head = [{"role": "system", "content": self.system}] if self.system else []
        said: list[str] = []
        started, count, last = time.perf_counter(), 0, None
        try:
            deltas = self.llm.stream(self.llm.encode_chat([*head, *self.messages]), self.params)
        except ContextLengthError as error:
            self.messages.pop()
            self._words.print(f"{error.given} tokens, {error.limit} fit: /reset begins anew, or say it in fewer words")
            return
        except TriviumError as error:
            self.messages.pop()
            self._words.print(str(error))
            return
        except KeyboardInterrupt:
            self.messages.pop()
            raise
        try:
            for last in deltas:
                count += len(last.token_ids)
                said.append(last.text)
                print(shown(last.text) if self._terminal else last.text, end="", flush=True)
        except KeyboardInterrupt:
            deltas.close()  # type: ignore[attr-defined]
            self._words.print("\n(stopped)", end="")
        print(flush=True)
        if last is not None and last.finish_reason == "error":
            self._words.print(f"the answer ended with an error: {last.error}")
        self.messages.append({"role": "assistant", "content": "".join(said)})
        if self._terminal and count > 1:
            rate = count / max(time.perf_counter() - started, 1e-9)
            self._words.print(f"{count} tokens, {rate:.1f} tokens/s", style="dim")

    def _read(self) -> str:
        """A message, of several lines where they end in a backslash. Raises EOFError at the end of input."""
        lines = [self._line("> ")]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            try:
                lines.append(self._line("… "))
            except EOFError:
                break
        return "\n".join(lines)

    def _line(self, sign: str) -> str:
        if self._terminal:
            return input(sign)
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.removesuffix("\n")

    def _set_system(self, text: str) -> None:
        self.system = text or None
        self._words.print("system message set" if text else "no system message")

    def _reset(self, _: str) -> None:
        self.messages.clear()
        self._words.print("a new conversation")

    def _retry(self, _: str) -> None:
        while self.messages and self.messages[-1]["role"] != "user":
            self.messages.pop()
        if self.messages:
            self._answer()
        else:
            self._words.print("nothing was said yet")

    def _save(self, name: str) -> None:
        if not name:
            self._words.print("/save FILE: give it a name")
            return
        head = [{"role": "system", "content": self.system}] if self.system else []
        text = json.dumps({"model": self.llm.name, "messages": [*head, *self.messages]}, ensure_ascii=False, indent=2)
        try:
            with Path(name).expanduser().open("x", encoding="utf-8") as file:
                file.write(text + "\n")
        except OSError as error:
            self._words.print(f"{name}: {error.strerror or error}; nothing was written")
            return
        self._words.print(f"{len(self.messages)} messages written to {name}")
