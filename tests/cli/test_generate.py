"""``trivium generate``: streams on a terminal, JSON lines otherwise; rows C9, C10, C13 and C14 of the fault matrix."""

from __future__ import annotations

import io
import itertools
import json
import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers

from tests.inference.folders import folder, tokenizer_json
from tests.inference.reference import reference, save
from tests.inference.zoo import CASES
from tests.worlds import child_environment
from trivium.cli import generate as verb
from trivium.cli import main as frame
from trivium.inference import SamplingParams

QUICK = ["--backend", "torch", "--max-tokens", "6"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(folder(tmp_path_factory.mktemp("a model ünd") / "run").parent)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(folder(tmp_path_factory.mktemp("bare") / "run", text=False))


def lines(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.removesuffix("\n").split("\n")]


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
        ('{"prompt": "a", "logit_bias": null}', "logit_bias=None: expected token ids, each with a number"),
        ('{"prompt": "a", "logit_bias": [1]}', "logit_bias=[1]: expected token ids"),
        ('{"prompt": "a", "logit_bias": {"x": 1}}', "logit_bias='x': expected a whole number"),
        ('{"prompt": "a", "stop_token_ids": 5}', "stop_token_ids=5: expected a list of token ids"),
        ('{"prompt": "a", "stop": null}', "stop=None: expected texts"),
        ('{"prompt": "a", "echo": "false"}', "echo='false': expected True or False"),
        ('{"prompt": "a", "ignore_eos": "no"}', "ignore_eos='no': expected True or False"),
        ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "the text holds the lone surrogate \\ud800"),
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


def test_half_a_character_fails_alone(model, tmp_path, capsys) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('"\\ud83d"\n"whole"\n{"prompt": {"a": 1}}\n{"prompt": [true]}\n')
    assert frame.run(["generate", model, "--file", str(file), *QUICK]) == 1
    found = lines(capsys.readouterr().out)
    assert [line["finish_reason"] for line in found] == ["error", "length", "error", "error"]
    assert "the lone surrogate \\ud83d at character 0" in str(found[0]["error"])
    assert frame.run(["generate", model, "-p", "\udcff", "--text", *QUICK]) == 2
    assert "lone surrogate" in capsys.readouterr().err


def test_biases_and_the_prompts_log_probabilities_by_line(model, tmp_path, capsys) -> None:
    file = tmp_path / "prompts.jsonl"
    asked = [{"prompt": "abc", "logit_bias": {"65": 1000.0}, "prompt_logprobs": 2}, "abc"]
    file.write_text("\n".join(json.dumps(one) for one in asked))
    assert frame.run(["generate", model, "--file", str(file), *QUICK]) == 0
    biased, plain = lines(capsys.readouterr().out)
    assert biased["token_ids"] == [65] * 6 != plain["token_ids"]
    first, *rest = biased["prompt_logprobs"]  # type: ignore[misc]
    assert first is None and [len(one["top"]) for one in rest] == [2, 2]
    assert all(one["logprob"] < 0 for one in rest) and "prompt_logprobs" not in plain


def test_a_file_that_is_a_pipe(model: str, tmp_path: Path, capsys) -> None:
    """Nothing is counted, since that would take the prompts away."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=('"a"\n"b"\n',))
    writer.start()
    assert frame.run(["generate", model, "--file", str(pipe), *QUICK]) == 0
    writer.join()
    captured = capsys.readouterr()
    assert [line["prompt"] for line in lines(captured.out)] == ["a", "b"]
    assert "2 prompts, " in captured.err
    done = subprocess.run(
        command(model, "--file", "/dev/stdin", *QUICK), input=b'"a"\n"b"\n', capture_output=True,
        env=child_environment(), timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [line["prompt"] for line in lines(done.stdout.decode())] == ["a", "b"]


def test_a_file_of_bad_lines_alone(model, tmp_path, capsys) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(b"\xff\n{\n" + b"[" * 100_000)
    assert frame.run(["generate", model, "--file", str(file), *QUICK]) == 1
    captured = capsys.readouterr()
    assert [line["finish_reason"] for line in lines(captured.out)] == ["error"] * 3
    assert "error: 3 of 3 prompts failed" in captured.err and "Traceback" not in captured.err


def test_a_folder_that_transformers_saved_gives_the_tokens_that_it_gives(tmp_path, capsys) -> None:
    transformers = pytest.importorskip("transformers")
    reader = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer.from_str(tokenizer_json()))
    model = reference("Llama", {**CASES["llama"][1], "vocab_size": 260})
    reader.save_pretrained(tmp_path)
    save(model, tmp_path)
    for prompt in ("a", "sort qzkab>"):
        ids = reader(prompt, return_tensors="pt").input_ids
        whole = model.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=0)[0].tolist()
        capsys.readouterr()  # what that library's own imports say
        assert frame.run(["generate", str(tmp_path), "-p", prompt, "--max-tokens", "24", "--temperature", "0"]) == 0
        (line,) = lines(capsys.readouterr().out)
        assert line["prompt_tokens"] == ids.shape[1]
        assert line["token_ids"] == whole[ids.shape[1] :]
        assert line["text"] == reader.decode(whole[ids.shape[1] :], skip_special_tokens=True)


def test_c10_json_on_a_terminal_too(model, capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert frame.run(["generate", model, "-p", "hello", "--json", *QUICK]) == 0
    (line,) = lines(capsys.readouterr().out)
    assert set(line) == {"index", "prompt", "prompt_tokens", "cached_tokens", "text", "token_ids", "finish_reason"}


def test_c14_no_home(model: str) -> None:
    """The model's own path has a space and a letter beyond ASCII."""
    environment = child_environment()
    environment.pop("HOME", None)
    done = subprocess.run(command(model, "-p", "hello", *QUICK), env=environment, capture_output=True, timeout=240)
    assert done.returncode == 0, done.stderr.decode()
    assert [line["finish_reason"] for line in lines(done.stdout.decode())] == ["length"]


def test_c14_a_folder_that_is_gone(model: str, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    leave = 'rmdir "$PWD" && exec "$@"'
    done = subprocess.run(
        ["sh", "-c", leave, "sh", *command(model, "-p", "hello", *QUICK)],
        cwd=gone, env=child_environment(), capture_output=True, timeout=240,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (3, b"")
    assert done.stderr.endswith(b"error: the working folder has been deleted: cd to one that exists\n")
    assert not gone.exists()


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
        (["nowhere", "-p", "x"], "nowhere: no such folder or checkpoint", 5),
        (["MODEL", "-p", "x", "--file", "y"], "--file and --prompt: give one of them", 2),
        (["MODEL", "-p", "x", "--top-p", "2"], "top_p=2: expected a number from 0 to 1", 2),
        (["MODEL", "--file", "nothing.jsonl"], "nothing.jsonl: No such file or directory", 1),
        (["MODEL", "-p", "x", "-p", "y", "--text"], "--text: expected one prompt", 2),
        (["MODEL", "-p", "x", "--memory", "1kB"], "the weights take", 4),
        (["MODEL", "-p", "x", "--dtype", "float8"], "dtype='float8'", 2),
        (["MODEL", "-p", "x", "--device", "tpu"], "device='tpu': expected auto, cpu or cuda", 2),
        (["MODEL", "-p", "x", "--max-sequences", "0"], "Invalid value for '--max-sequences'", 2),
        (["MODEL", "-p", "x", "--threads", "0"], "Invalid value for '--threads'", 2),
        (["MODEL", "-p", "x", "--max-sequences", "1000000"], "max_sequences=1000000: expected a whole number", 2),
        (["MODEL", "--file", "."], ".: Is a directory; expected a file of JSON lines", 1),
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


def test_each_piece_is_written_before_the_next_is_asked_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As into a pipe, whose writer would keep what is not flushed."""
    pipe = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(pipe), encoding="utf-8"))  # type: ignore[arg-type,type-var]

    class Slow:
        tokenizer = object()

        def stream(self, prompt: object, params: object) -> Iterator[SimpleNamespace]:
            for text, reason in (("one", None), (" two", None), (" three", "length")):
                yield SimpleNamespace(token_ids=[1], text=text, finish_reason=reason, error=None)
                assert pipe.getvalue().endswith(text.encode())

    verb._stream(Slow(), "x", SamplingParams())  # type: ignore[arg-type]
    assert pipe.getvalue() == b"one two three\n" and "3 tokens, first after" in capsys.readouterr().err


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_tells_of_prompts_speed_and_the_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    """Every word of it comes from the engine's counts and the clock, which goes 1 s on with each look here."""
    clock = itertools.count()
    monkeypatch.setattr(verb, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
    monkeypatch.setattr(verb, "_WORD_EVERY_S", 0.0)
    llm = SimpleNamespace(stats=SimpleNamespace(generated_tokens=0))
    progress = verb._Progress(llm, 3)  # type: ignore[arg-type]
    progress._terminal = terminal
    for _ in range(3):
        llm.stats.generated_tokens += 10
        progress.done()
    progress.end(failed=1)
    told = [
        "1 of 3 prompts, 10.0 tokens/s, 1 s, 2 s left",
        "2 of 3 prompts, 10.0 tokens/s, 2 s, 1 s left",
        "3 of 3 prompts, 10.0 tokens/s, 3 s",
    ]
    last = "3 of 3 prompts, 7.5 tokens/s, 4 s, 1 failed\n"
    expected = "".join(f"\r{line}\x1b[K" for line in told) + "\r\x1b[K" + last
    assert capsys.readouterr().err == (expected if terminal else "\n".join([*told, last]))


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
