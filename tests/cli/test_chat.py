"""``trivium chat``: history, commands, Ctrl-C that stops an answer and not the chat."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.inference.folders import folder
from tests.worlds import child_environment
from trivium.cli import main as frame
from trivium.cli.chat import Conversation
from trivium.inference import LLM, SamplingParams


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(folder(tmp_path_factory.mktemp("chat") / "run", max_positions=640).parent)


def talk(monkeypatch: pytest.MonkeyPatch, model: str, *said: str, options: tuple[str, ...] = ()) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in said)))
    return frame.run(["chat", model, "--backend", "torch", "--max-tokens", "8", *options])


def test_a_conversation_with_memory(model, tmp_path, monkeypatch, capsys) -> None:
    saved = tmp_path / "my chat.json"
    said = [
        "hello",
        "one\\",
        "two",
        "/system be brief",
        "",
        f"/save {saved}",
        f"/save {saved}",
        "/reset",
        "/retry",
        "/bye",
    ]
    assert talk(monkeypatch, model, *said, "/quit", "never said") == 0
    captured = capsys.readouterr()
    found = json.loads(saved.read_text())
    assert [one["role"] for one in found["messages"]] == ["system", "user", "assistant", "user", "assistant"]
    assert [found["messages"][i]["content"] for i in (0, 1, 3)] == ["be brief", "hello", "one\ntwo"]
    answers = [one["content"] for one in found["messages"] if one["role"] == "assistant"]
    assert captured.out == "".join(f"{answer}\n" for answer in answers)
    for words in ("system message set", "4 messages written", "File exists; nothing was written", "a new conversation",
                  "nothing was said yet", "/bye: no such command"):  # fmt: skip
        assert words in captured.err, words
    assert talk(monkeypatch, model, "hello", "/retry") == 0
    assert capsys.readouterr().out == f"{answers[0]}\n" * 2


def test_what_the_model_is_asked(model, monkeypatch, capsys) -> None:
    """The conversation so far, the system message first; a new one keeps the system message alone."""
    asked: list[list[dict[str, str]]] = []
    encode = LLM.encode_chat
    monkeypatch.setattr(LLM, "encode_chat", lambda llm, messages: asked.append(list(messages)) or encode(llm, messages))
    assert talk(monkeypatch, model, "hello", "more", "/system be brief", "again", "/reset", "anew") == 0
    said = [[(one["role"], one["content"]) for one in messages] for messages in asked]
    (_, one), (_, two) = said[1][1], said[2][4]
    assert said[0] == [("user", "hello")]
    assert said[1] == [("user", "hello"), ("assistant", one), ("user", "more")]
    assert said[2] == [("system", "be brief"), *said[1], ("assistant", two), ("user", "again")]
    assert said[3] == [("system", "be brief"), ("user", "anew")]
    assert capsys.readouterr().out.startswith(f"{one}\n{two}\n")


def test_a_message_that_does_not_fit_is_told_and_forgotten(model, monkeypatch, capsys) -> None:
    assert talk(monkeypatch, model, "x" * 700, "hello") == 0
    captured = capsys.readouterr()
    assert "/reset begins anew" in captured.err
    assert len(captured.out.splitlines()) >= 1


def test_a_model_that_cannot_chat(tmp_path: Path, capsys, monkeypatch) -> None:
    for options, words in (({"chat": False}, "no chat template"), ({"text": False}, "no tokenizer")):
        model = str(folder(tmp_path / words, **options).parent)
        assert talk(monkeypatch, model) == 2
        assert f"{words}, so it cannot chat; try: trivium generate" in capsys.readouterr().err


def wait_for(master: int, words: bytes, *, last: bool = False) -> bytes:
    """What is shown until ``words`` are in it, or with ``last`` end it."""
    shown, deadline = b"", time.monotonic() + 240
    while not (shown.endswith(words) if last else words in shown):
        assert time.monotonic() < deadline, shown
        if select.select([master], [], [], 0.1)[0]:
            shown += os.read(master, 4096)
    return shown


def test_ctrl_c_stops_the_answer_and_twice_leaves(model: str) -> None:
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "trivium", "chat", model, "--backend", "torch", "--max-tokens", "600"],
        stdin=slave, stdout=slave, stderr=slave, env=child_environment({"TERM": "dumb"}), start_new_session=True,
    )  # fmt: skip
    os.close(slave)
    try:
        wait_for(master, b"> ", last=True)
        os.write(master, b"hello\n")
        wait_for(master, b"hello\r\n")
        assert select.select([master], [], [], 240)[0]  # the answer has begun
        process.send_signal(signal.SIGINT)
        shown = wait_for(master, b"> ", last=True)
        assert b"(stopped)" in shown or b"tokens/s" in shown
        os.write(master, b"/help\n")
        shown = wait_for(master, b"\n> ", last=True)
        assert b"/save FILE" in shown and b"Ctrl-C stops an answer." in shown
        shown = b""
        while b"to leave)" not in shown:  # a signal between a prompt and the wait for a key is seen with the next one
            process.send_signal(signal.SIGINT)
            if select.select([master], [], [], 2)[0]:
                shown += os.read(master, 4096)
        for _ in range(12):
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
                break
        assert process.returncode == 130
    finally:
        process.kill()
        os.close(master)


def test_ctrl_c_before_the_answer_begins_forgets_the_message(model: str, capsys, monkeypatch) -> None:
    llm = LLM(model, backend="torch")
    conversation = Conversation(llm, SamplingParams(max_tokens=2), None)
    conversation._terminal = True
    said = iter(["hello", "hello", "/quit"])
    monkeypatch.setattr(conversation, "_line", lambda sign: next(said))
    encode, interrupts = llm.encode_chat, iter([True, False])

    def interrupted(*args, **options):
        if next(interrupts):
            raise KeyboardInterrupt
        return encode(*args, **options)

    monkeypatch.setattr(llm, "encode_chat", interrupted)
    conversation.run()
    assert [one["role"] for one in conversation.messages] == ["user", "assistant"]
    assert "(stopped)" in capsys.readouterr().err
