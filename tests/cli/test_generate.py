"""``trivium generate``: streams on a terminal, JSON lines otherwise; rows C8, C9, C10, C13, C14 of the fault matrix."""

from __future__ import annotations

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

QUICK = ["--backend", "torch", "--max-tokens", "6"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(folder(tmp_path_factory.mktemp("a model ünd") / "run").parent)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(folder(tmp_path_factory.mktemp("bare") / "run", text=False))


def lines(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines()]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "trivium", "generate", *arguments]


def test_one_prompt_into_a_pipe_is_a_json_line(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert frame.run(["generate", model, "-p", "hello", *QUICK]) == 0
    captured = capsys.readouterr()
    (line,) = lines(captured.out)
    assert (line["index"], line["prompt"], line["finish_reason"], line["prompt_tokens"]) == (0, "hello", "length", 5)
    assert len(line["token_ids"]) == 6  # type: ignore[arg-type]
    assert captured.err == "run: torch cpu\n"
    assert frame.run(["generate", model, "-p", "hello", "--text", *QUICK]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{line['text']}\n"
    assert "6 tokens, first after" in captured.err and "ended by length" in captured.err


def test_a_file_of_prompts_in_order_with_settings_of_their_own(model, tmp_path, capsys) -> None:
    asked = [
        "plain text",
        [1, 2, 3],
        {"prompt": "own", "max_tokens": 2, "id": "x", "n": 2},
        {"messages": [{"role": "user", "content": "hi"}]},
        {"prompt": [999]},
        {"prompt": "y" * 400},
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(json.dumps(one) for one in asked) + "\n\n")
    assert frame.run(["generate", model, "--file", str(file), *QUICK]) == 1
    captured = capsys.readouterr()
    found = lines(captured.out)
    assert [line["index"] for line in found] == list(range(6))
    assert found[2]["id"] == "x" and [len(one["token_ids"]) for one in found[2]["choices"]] == [2, 2]  # type: ignore
    assert found[3]["messages"] == asked[3]["messages"]  # type: ignore[call-overload,index]
    assert [line.get("finish_reason") for line in found] == ["length", "length", None, "length", "error", "error"]
    assert "token 999" in str(found[4]["error"]) and "the context holds 160" in str(found[5]["error"])
    assert "6 of 6 prompts" in captured.err and "2 failed" in captured.err
    assert "error: 2 of 6 prompts failed; their lines say why" in captured.err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"prompt": ', "not JSON"),
        ("7", "expected a text"),
        ('{"prompt": "a", "temprature": 1}', "got an unexpected keyword argument 'temprature'"),
        ('{"prompt": "a", "top_p": 7}', "top_p=7: expected a number from 0 to 1"),
        ('{"id": 1}', "expected one of prompt and messages"),
        ('{"messages": 7}', "messages is a int"),
    ],
)
def test_bad_lines_fail_alone(model, tmp_path, capsys, text: str, words: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(f'"before"\n{text}\n\n"after"\n{text}')
    assert frame.run(["generate", model, "--file", str(file), *QUICK]) == 1
    captured = capsys.readouterr()
    found = lines(captured.out)
    assert [line["index"] for line in found] == [0, 1, 2, 3]
    assert [line["finish_reason"] for line in found] == ["length", "error", "length", "error"]
    for line, number in ((found[1], 2), (found[3], 5)):
        assert f"prompts.jsonl:{number}: {words}" in str(line["error"])
        assert (line["text"], line["token_ids"]) == ("", [])
    assert "error: 2 of 4 prompts failed; their lines say why" in captured.err


def test_a_file_of_bad_lines_alone(model, tmp_path, capsys) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(b"\xff\n{\n" + b"[" * 100_000)
    assert frame.run(["generate", model, "--file", str(file), *QUICK]) == 1
    captured = capsys.readouterr()
    assert [line["finish_reason"] for line in lines(captured.out)] == ["error"] * 3
    assert "error: 3 of 3 prompts failed" in captured.err and "Traceback" not in captured.err


def test_log_probabilities_come_as_json(model, capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert frame.run(["generate", model, "-p", "hello", "--logprobs", "2", *QUICK]) == 0
    (line,) = lines(capsys.readouterr().out)
    assert [len(one["top"]) for one in line["logprobs"]] == [2] * 6  # type: ignore[attr-defined]
    assert frame.run(["generate", model, "-p", "hello", "--logprobs", "2", "--text", *QUICK]) == 2
    assert "without --logprobs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words", "code"),
    [
        (["nowhere", "-p", "x"], "nowhere: no such folder or checkpoint", 2),
        (["MODEL", "-p", "x", "--file", "y"], "--file and --prompt: give one of them", 2),
        (["MODEL", "-p", "x", "--top-p", "2"], "top_p=2: expected a number from 0 to 1", 2),
        (["MODEL", "--file", "nothing.jsonl"], "nothing.jsonl: No such file or directory", 1),
        (["MODEL", "-p", "x", "-p", "y", "--text"], "--text: expected one prompt", 2),
        (["MODEL", "-p", "x", "--memory", "1kB"], "the weights take", 4),
        (["MODEL", "-p", "x", "--dtype", "float8"], "dtype='float8'", 2),
        (["MODEL", "-p", "x", "--device", "tpu"], "device='tpu': expected auto, cpu or cuda", 2),
        (["BARE", "-p", "x"], "no tokenizer", 1),
        (["BARE", "-p", "x", "--chat"], "no tokenizer", 2),
        (["BARE", "--file", "FILE", "--chat"], "no tokenizer", 2),
        (["MODEL", "--file", "FILE", "--top-p", "2"], "top_p=2: expected a number from 0 to 1", 2),
    ],
)
def test_wrong_usage(model, bare, tmp_path, capsys, arguments: list[str], words: str, code: int) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('"x"\n')
    given = [{"MODEL": model, "BARE": bare, "FILE": str(file)}.get(word, word) for word in arguments]
    assert frame.run(["generate", *given, "--backend", "torch"]) == code
    captured = capsys.readouterr()
    assert words in captured.err + captured.out
    assert "Traceback" not in captured.err


def test_c9_stdin_and_a_reader_that_goes_away(model: str) -> None:
    environment = child_environment({"NO_COLOR": "1"})
    done = subprocess.run(
        command(model, "--text", *QUICK), input=b"from a pipe\n", capture_output=True, env=environment, timeout=240
    )
    assert done.returncode == 0 and b"\x1b" not in done.stdout + done.stderr
    bad = subprocess.run(command(model, *QUICK), input=b"\xff", capture_output=True, env=environment, timeout=240)
    assert bad.returncode == 1 and b"stdin is not UTF-8: byte 0 is 0xff" in bad.stderr
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        gone = subprocess.run(
            command(model, "-p", "x", *QUICK), stdout=write_end, stderr=subprocess.PIPE, env=environment, timeout=240
        )
    finally:
        os.close(write_end)
    assert gone.returncode in (0, 141) and b"Traceback" not in gone.stderr


def test_a_terminal_gets_the_text_as_it_comes_and_no_control_characters(model: str) -> None:
    master, slave = pty.openpty()
    process = subprocess.Popen(
        command(model, "-p", "hello", "--backend", "torch", "--max-tokens", "40"),
        stdin=slave, stdout=slave, stderr=subprocess.PIPE, env=child_environment(),
    )  # fmt: skip
    os.close(slave)
    shown = b""
    while process.poll() is None or select.select([master], [], [], 0)[0]:
        if select.select([master], [], [], 0.1)[0]:
            try:
                shown += os.read(master, 4096)
            except OSError:
                break
    os.close(master)
    assert process.stderr is not None
    with process.stderr as stderr:
        words = stderr.read().decode()
    assert process.wait(60) == 0, words
    assert "ended by length" in words
    assert not shown.startswith(b"{") and not any(byte < 32 and byte not in b"\r\n\t" for byte in shown)


def test_c13_ctrl_c_while_answering(model: str, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('"again"\n' * 5000)
    process = subprocess.Popen(
        command(model, "--file", str(file), "--backend", "torch", "--max-tokens", "100"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=child_environment(),
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, words = process.communicate(timeout=240)
    assert process.returncode == 130, words.decode()
    assert b"Traceback" not in words
