"""``trivium generate``: answer a prompt as it comes, or a file of prompts at full speed."""

from __future__ import annotations

import contextlib
import json
import re
import stat
import sys
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer

from trivium.base import log
from trivium.base.errors import ConfigError, DataError, TriviumError
from trivium.cli import loading
from trivium.cli.loading import Options, given, open_llm, shown

if TYPE_CHECKING:
    from trivium.inference import LLM, Output, SamplingParams
    from trivium.inference.request import TokenLogprobs

_WORD_EVERY_S = 10.0
_LINE_BYTES = 64 << 20
_WHOLE = re.compile(r"0|[1-9][0-9]{0,18}")


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command("generate")(generate)


def generate(
    model: loading.Model,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="The text to go on from; repeatable.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(help='JSON lines: "text", [token ids], or {"prompt": …} or {"messages": …} with settings.'),
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    max_tokens: loading.MaxTokens = 256,
    temperature: loading.Temperature = None,
    top_k: loading.TopK = None,
    top_p: loading.TopP = None,
    min_p: loading.MinP = None,
    repetition_penalty: loading.RepetitionPenalty = None,
    seed: loading.Seed = None,
    n: Annotated[int, typer.Option("--n", help="Answers per prompt.")] = 1,
    stop: Annotated[list[str] | None, typer.Option(help="A text that ends the answer; repeatable.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after the model's end token.")] = False,
    logprobs: Annotated[int | None, typer.Option(help="Tell log-probabilities, with so many likeliest tokens.")] = None,
    echo: Annotated[bool, typer.Option("--echo", help="Repeat the prompt before the answer.")] = False,
    speculate: Annotated[
        bool,
        typer.Option("--speculate", help="Guess tokens that stood before; same tokens, rests where it does not pay."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines, also on a terminal.")] = False,
    as_text: Annotated[bool, typer.Option("--text", help="Plain text as it comes, also into a pipe or file.")] = False,
    max_sequences: Annotated[int, typer.Option(min=1, help="Answers computed at once.")] = 64,
    dtype: loading.DType = "auto",
    quantize: loading.Quantize = None,
    device: loading.Device = "auto",
    memory: loading.Memory = None,
    backend: loading.Backend = "auto",
    threads: loading.Threads = None,
    max_positions: loading.MaxPositions = None,
    cache_dtype: loading.CacheDType = "auto",
) -> None:
    """Without --prompt and --file the prompt is read from stdin. One answer streams on a terminal; else JSON lines."""
    log.setup()
    if file is not None and prompt:
        raise ConfigError("--file and --prompt: give one of them")
    if as_json and as_text:
        raise ConfigError("--json and --text: give one of them")
    changes = given(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty,
        seed=seed, stop=stop, logprobs=logprobs,
    )  # fmt: skip
    changes |= {"max_tokens": max_tokens, "n": n, "ignore_eos": ignore_eos, "echo": echo}
    prompts: list[Any] = list(prompt or ([] if file is not None else [_read_stdin()]))
    single = file is None and len(prompts) == 1 and n == 1 and logprobs is None
    streams = single and not as_json and (as_text or sys.stdout.isatty())
    if as_text and not streams:
        raise ConfigError(
            "--text: expected one prompt with one answer, without --logprobs; all else comes as JSON lines"
        )
    options = Options(
        dtype=dtype, quantize=quantize, device=device, memory=memory, backend=backend, threads=threads,
        max_positions=max_positions, cache_dtype=cache_dtype,
    )  # fmt: skip
    total = None if file is None else _count(file)
    llm = open_llm(
        model, options, max_sequences=max_sequences, step_tokens=max(256, 4 * max_sequences), speculate=speculate
    )
    params = llm.sampling(**changes)
    if chat and (llm.tokenizer is None or llm.tokenizer.template is None):
        missing = "tokenizer" if llm.tokenizer is None else "chat template"
        raise ConfigError(f"--chat: {llm.name} has no {missing}; leave --chat out, or add one to the folder")
    if streams:
        _stream(llm, _tokens(llm, prompts[0], chat), params)
    else:
        items = _items(file) if file is not None else ((f"prompt {i}", p) for i, p in enumerate(prompts))
        _batch(llm, items, changes, chat, total)


def _stream(llm: LLM, prompt: Any, params: SamplingParams) -> None:
    """The answer on stdout as it comes, then a word on its speed on stderr."""
    raw = not sys.stdout.isatty()
    started, first, count, reason, error = time.perf_counter(), 0.0, 0, None, None
    bare = llm.tokenizer is None
    for delta in llm.stream(prompt, params):
        first = first or time.perf_counter()
        count += len(delta.token_ids)
        text = "".join(f"{token} " for token in delta.token_ids) if bare else delta.text
        if text:
            print(text if raw else shown(text), end="", flush=True)
        reason, error = delta.finish_reason, delta.error
    print(flush=True)
    if reason == "error":
        raise TriviumError(f"the answer ended with an error: {error}")
    rate = (count - 1) / max(time.perf_counter() - first, 1e-9)
    speed = f", {rate:.1f} tokens/s" if count > 1 else ""
    print(f"{count} tokens, first after {first - started:.2f} s{speed}, ended by {reason}", file=sys.stderr)


def _batch(llm: LLM, items: Iterator[tuple[str, Any]], changes: dict[str, Any], chat: bool, total: int | None) -> None:
    """One JSON line per prompt on stdout, in the order of the prompts; progress on stderr. Bad prompts fail alone."""
    from trivium.inference import Answer, Output

    lines = _Lines(_Progress(llm, total))
    kept: list[tuple[int, Any]] = []  # what the engine was asked: the prompt's own number, and what its line said

    def asked() -> Generator[tuple[Any, SamplingParams | None], None, None]:
        for index, (where, item) in enumerate(items):
            try:
                request = _request(llm, where, item, changes, chat)
            except (TriviumError, UnicodeError) as error:
                answer = Answer(finish_reason="error", error=str(error))
                lines.add(
                    index, None if isinstance(item, DataError) else item, Output(prompt_token_ids=[], choices=[answer])
                )
                continue
            kept.append((index, item))
            yield request

    with contextlib.closing(asked()) as source:
        for place, output in llm.generate_each(source):
            index, item = kept[place]
            kept[place] = (index, None)
            lines.add(index, item, output)
    lines.end()


class _Lines:
    """What was answered, written in the order of the prompts."""

    def __init__(self, progress: _Progress) -> None:
        self._progress = progress
        self._waiting: dict[int, dict[str, Any]] = {}
        self._next = self._failed = 0

    def add(self, index: int, item: Any, output: Output) -> None:
        """The ``index``-th prompt's line, once those before it are written."""
        self._waiting[index] = _line(index, item, output)
        self._failed += any(choice.finish_reason == "error" for choice in output.choices)
        while self._next in self._waiting:
            print(json.dumps(self._waiting.pop(self._next), ensure_ascii=False), flush=True)
            self._next += 1
        self._progress.done()

    def end(self) -> None:
        """Raises TriviumError where a prompt failed."""
        self._progress.end(self._failed)
        if self._failed:
            raise TriviumError(f"{self._failed} of {self._next} prompts failed; their lines say why")


def _request(llm: LLM, where: str, item: Any, changes: dict[str, Any], chat: bool) -> tuple[Any, SamplingParams | None]:
    """A prompt and its settings; what is wrong with a line names it."""
    if isinstance(item, DataError):
        raise item
    if not isinstance(item, dict):
        return _tokens(llm, item, chat), llm.sampling(**changes)
    own = {name: value for name, value in item.items() if name not in ("prompt", "messages", "id")}
    if ("prompt" in item) == ("messages" in item):
        raise DataError(f"{where}: expected one of prompt and messages")
    if isinstance(own.get("logit_bias"), dict):  # JSON knows no other keys than texts
        own["logit_bias"] = {
            int(key) if _WHOLE.fullmatch(key) else key: bias for key, bias in own["logit_bias"].items()
        }
    try:
        params = llm.sampling(**{**changes, **own})
        if "messages" in item:
            return llm.encode_chat(item["messages"]), params
        return _tokens(llm, item["prompt"], chat), params
    except TypeError as error:
        raise DataError(f"{where}: {str(error).rpartition('() ')[2]}") from None
    except TriviumError as error:
        raise DataError(f"{where}: {error}") from None


def _tokens(llm: LLM, prompt: Any, chat: bool) -> Any:
    if not chat:
        return prompt
    if not isinstance(prompt, str):
        raise DataError(f"--chat with a prompt that is a {type(prompt).__name__}: expected text")
    return llm.encode_chat([{"role": "user", "content": prompt}])


def _line(index: int, item: Any, output: Output) -> dict[str, Any]:
    """What is told of one prompt."""
    choices = []
    for choice in output.choices:
        told: dict[str, Any] = {
            "text": choice.text,
            "token_ids": choice.token_ids,
            "finish_reason": choice.finish_reason,
        }
        if choice.error is not None:
            told["error"] = choice.error
        if choice.logprobs is not None:
            told["logprobs"] = [_logprobs(one) for one in choice.logprobs]
        choices.append(told)
    line: dict[str, Any] = {"index": index}
    if isinstance(item, dict) and "id" in item:
        line["id"] = item["id"]
    if isinstance(item, dict) and "messages" in item:
        line["messages"] = item["messages"]
    else:
        line["prompt"] = item.get("prompt") if isinstance(item, dict) else item
    line |= {"prompt_tokens": len(output.prompt_token_ids), "cached_tokens": output.cached_tokens}
    if output.prompt_logprobs is not None:
        line["prompt_logprobs"] = [None if one is None else _logprobs(one) for one in output.prompt_logprobs]
    return {**line, **(choices[0] if len(choices) == 1 else {"choices": choices})}


def _logprobs(one: TokenLogprobs) -> dict[str, Any]:
    return {"token_id": one.token_id, "logprob": one.logprob, "top": [list(pair) for pair in one.top]}


class _Progress:
    """Prompts done, tokens per second, time left, on stderr: one line on a terminal, else a line now and then."""

    def __init__(self, llm: LLM, total: int | None) -> None:
        self._llm, self._total = llm, total
        self._done = 0
        self._started_s = self._told_s = time.perf_counter()
        self._terminal = sys.stderr.isatty()

    def done(self) -> None:
        """One more prompt."""
        self._done += 1
        now = time.perf_counter()
        if now - self._told_s >= (0.2 if self._terminal else _WORD_EVERY_S):
            self._told_s = now
            line = self._line(now)
            print(
                f"\r{line}\x1b[K" if self._terminal else line,
                end="" if self._terminal else "\n",
                file=sys.stderr,
                flush=True,
            )

    def end(self, failed: int) -> None:
        """The last word."""
        if self._total is None and self._done <= 1:
            return
        start = "\r\x1b[K" if self._terminal else ""
        words = f", {failed} failed" if failed else ""
        print(f"{start}{self._line(time.perf_counter())}{words}", file=sys.stderr, flush=True)

    def _line(self, now: float) -> str:
        seconds = max(now - self._started_s, 1e-9)
        rate = self._llm.stats.generated_tokens / seconds
        of = "" if self._total is None else f" of {self._total}"
        left = ""
        if self._total is not None and 0 < self._done < self._total:
            left = f", {seconds / self._done * (self._total - self._done):.0f} s left"
        return f"{self._done}{of} prompts, {rate:.1f} tokens/s, {seconds:.0f} s{left}"


def _read_stdin() -> str:
    if sys.stdin is None or sys.stdin.isatty():
        raise ConfigError("no prompt: give --prompt TEXT, --file prompts.jsonl, or text on stdin")
    text = sys.stdin.buffer.read()
    try:
        return text.decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"stdin is not UTF-8: byte {error.start} is 0x{text[error.start]:02x}") from None


def _items(file: Path) -> Iterator[tuple[str, Any]]:
    """Where each prompt stands and what its line says, or the DataError that it is."""
    with _opened(file) as opened:
        for number, line in enumerate(iter(lambda: opened.readline(_LINE_BYTES), b""), start=1):
            if not line.strip():
                continue
            where = f"{file}:{number}"
            try:
                item = json.loads(line)
            except (ValueError, RecursionError) as error:
                item = DataError(f"{where}: not JSON: {error}")
            else:
                if not isinstance(item, (str, list, dict)):
                    item = DataError(f"{where}: expected a text, a list of token ids, or an object")
            yield where, item


def _count(file: Path) -> int | None:
    """Prompts in ``file``; None where reading takes them away (a pipe). Raises DataError where it cannot be read."""
    try:
        kind = file.stat().st_mode
    except OSError as error:
        raise _unreadable(file, error) from None
    if not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):
        return None
    with _opened(file) as opened:
        return sum(1 for line in opened if line.strip())


def _opened(file: Path) -> IO[bytes]:
    try:
        return file.open("rb")
    except OSError as error:
        raise _unreadable(file, error) from None


def _unreadable(file: Path, error: OSError) -> DataError:
    return DataError(f"{file}: {error.strerror}; expected a file of JSON lines")
