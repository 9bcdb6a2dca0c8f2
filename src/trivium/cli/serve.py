"""``trivium serve``: a model behind the API that people's tools already speak, and a page to talk to it."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trivium.base import log
from trivium.base.errors import CheckpointError, ConfigError, SetupError
from trivium.cli.interrupts import load_torch
from trivium.cli.output import word_console

if TYPE_CHECKING:
    from trivium.serve.served import Served

KEY_VARIABLE = "TRIVIUM_API_KEY"
_NEEDED = ("starlette", "uvicorn", "httptools", "prometheus_client", "llguidance")


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command("serve")(serve)


def serve(
    model: Annotated[str, typer.Argument(help="A Hugging Face folder, a Trivium checkpoint, or a run's folder.")],
    host: Annotated[str, typer.Option(help="Where to listen; other than this machine only with a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: one that is free.")] = 8000,
    name: Annotated[str | None, typer.Option(help="The model's name in the API; default: the folder's.")] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(help=f"A key clients must send; repeatable. Others see it in ps: {KEY_VARIABLE}."),
    ] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="A file with one key per line.")] = None,
    allowed_host: Annotated[list[str] | None, typer.Option(help="A further name clients may use; repeatable.")] = None,
    access_log: Annotated[str, typer.Option(help="- for stdout, a file, or off.")] = "-",
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    quantize: Annotated[str | None, typer.Option(help="For example int8 or int4.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    memory: Annotated[str | None, typer.Option(help="For weights and cache together, for example 8GiB.")] = None,
    backend: Annotated[str, typer.Option(help="auto, native or torch.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="For computing; default: all cores.")] = None,
    max_positions: Annotated[int | None, typer.Option(min=1, help="Tokens of a prompt and its answer.")] = None,
    max_sequences: Annotated[int, typer.Option(min=1, help="Answers computed at once.")] = 64,
    step_tokens: Annotated[
        int, typer.Option(min=2, help="Tokens per step: how long one prompt may hold up others.")
    ] = 256,
    body_bytes: Annotated[int, typer.Option(help="Largest body.")] = 2 << 20,
    header_bytes: Annotated[int, typer.Option(help="Largest head of a request.")] = 16 << 10,
    header_count: Annotated[int, typer.Option(help="Most headers.")] = 64,
    json_depth: Annotated[int, typer.Option(help="Deepest JSON.")] = 32,
    json_items: Annotated[int, typer.Option(help="Most strings, lists and objects in a body.")] = 20_000,
    messages: Annotated[int, typer.Option(help="Most messages of a chat.")] = 256,
    prompts: Annotated[int, typer.Option(help="Most prompts of a request.")] = 64,
    choices: Annotated[int, typer.Option(help="Largest n.")] = 8,
    stops: Annotated[int, typer.Option(help="Most stop strings.")] = 8,
    stop_chars: Annotated[int, typer.Option(help="Longest stop string.")] = 64,
    logit_bias: Annotated[int, typer.Option(help="Most entries of logit_bias.")] = 1024,
    top_logprobs: Annotated[int, typer.Option(help="Most log-probabilities per token.")] = 20,
    tools: Annotated[int, typer.Option(help="Most tools.")] = 128,
    grammar_bytes: Annotated[int, typer.Option(help="Longest regex or grammar.")] = 64 << 10,
    grammar_s: Annotated[float, typer.Option(help="Seconds of a processor to compile a grammar.")] = 0.2,
    header_s: Annotated[float, typer.Option(help="Seconds for the head of a request.")] = 10.0,
    body_s: Annotated[float, typer.Option(help="Seconds for the body of a request.")] = 30.0,
    idle_s: Annotated[float, typer.Option(help="Seconds a connection may be idle.")] = 15.0,
    stall_s: Annotated[float, typer.Option(help="Seconds a client may not read what is written.")] = 30.0,
    drain_s: Annotated[float, typer.Option(help="Seconds for answers to finish after a signal.")] = 30.0,
    step_s: Annotated[
        float, typer.Option(help="Seconds without progress after which the engine counts as dead.")
    ] = 60.0,
    connections: Annotated[int, typer.Option(help="Most connections.")] = 512,
    queue: Annotated[int, typer.Option(help="Most answers that wait; the next one is a 429.")] = 64,
    per_key: Annotated[int, typer.Option(help="Most requests of one key at once.")] = 16,
) -> None:
    """Serve a model to OpenAI clients and to a browser. Stops with manners on SIGTERM and Ctrl-C; twice: at once."""
    log.setup()
    missing = [package for package in _NEEDED if importlib.util.find_spec(package) is None]
    if missing:
        raise SetupError(
            f"trivium serve needs {', '.join(missing)}: in the project's folder, pip install -e '.[serve]'"
        )
    load_torch()
    from trivium.serve.limits import Limits
    from trivium.serve.server import Server, ServerConfig, local_url

    limits = Limits(
        body_bytes=body_bytes, header_bytes=header_bytes, header_count=header_count, json_depth=json_depth,
        json_items=json_items, messages=messages, prompts=prompts, choices=choices, stops=stops, stop_chars=stop_chars,
        logit_bias=logit_bias, top_logprobs=top_logprobs, tools=tools, grammar_bytes=grammar_bytes,
        grammar_s=grammar_s, header_s=header_s, body_s=body_s, idle_s=idle_s, stall_s=stall_s, drain_s=drain_s,
        step_s=step_s, connections=connections, queue=queue, per_key=per_key,
    )  # fmt: skip
    if not Path(model).exists():
        raise CheckpointError(f"{model}: no such folder or checkpoint")
    called = name or Path(model).resolve().name
    options: dict[str, Any] = {
        "dtype": dtype, "quantize": quantize, "device": device, "memory": memory, "backend": backend,
        "threads": threads, "max_positions": max_positions, "max_sequences": max_sequences, "step_tokens": step_tokens,
    }  # fmt: skip

    def load() -> Served:
        from trivium.inference.llm import LLM
        from trivium.serve.load import serve_model

        return serve_model(LLM(model, **options), called, limits)

    config = ServerConfig(
        name=called,
        host=host,
        port=port,
        keys=_keys(api_key, api_key_file),
        allowed_hosts=tuple(allowed_host or ()),
        limits=limits,
    )
    words = word_console()
    with _log_to(access_log) as write:
        server = Server(config, load, access=write)
        url = local_url(host, server.port)
        words.print(f"{called}: listening at {url}, loading the model")
        code = server.run(started=lambda: words.print(f"{called}: ready. Page: {url}  API: {url}v1"))
    raise typer.Exit(code)


def _keys(given: list[str] | None, file: Path | None) -> tuple[str, ...]:
    keys = list(given or ())
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--api-key-file {file} cannot be read: {error}") from None
        found = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not found:
            raise ConfigError(f"--api-key-file {file} holds no key: write one per line")
        keys += found
    variable = os.environ.get(KEY_VARIABLE)
    if variable is not None:
        if not variable.strip():
            raise ConfigError(f"{KEY_VARIABLE} is set and empty: give it a key, or unset it")
        keys.append(variable.strip())
    return tuple(keys)


@contextlib.contextmanager
def _log_to(place: str) -> Iterator[Callable[[str], object] | None]:
    if place == "off":
        yield None
    elif place == "-":
        yield _written_and_flushed(sys.stdout)
    else:
        try:
            file = open(place, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 - closed below
        except OSError as error:
            raise ConfigError(f"--access-log {place}: {error.strerror or error}") from None
        with file:
            yield file.write


def _written_and_flushed(stream: Any) -> Callable[[str], object]:
    def write(line: str) -> None:
        stream.write(line)
        stream.flush()

    return write
