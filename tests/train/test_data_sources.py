"""Sources: what is found, in which order, what is skipped, and what is refused by name."""

from __future__ import annotations

import json
import logging
from itertools import pairwise
from pathlib import Path

import pytest

from trivium.base.errors import DataError
from trivium.train.data import sources as sources_module
from trivium.train.data.sources import Sources, find


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def names(found: Sources) -> list[str]:
    return [source.name for source in found.files]


def test_folder_in_order_and_what_is_skipped_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(
        tmp_path,
        {
            "b.txt": "b",
            "a/z.py": "z",
            "a/c.txt": "c",
            "image.bin": b"\0\1\2",
            "latin": b"caf\xe9",
            "none": "",
            ".git/x": "x",
        },
    )
    with caplog.at_level(logging.WARNING):
        found = find([tmp_path])
    assert names(found) == ["a/c.txt", "a/z.py", "b.txt"]
    assert found.skipped == {"binary": 1, "not UTF-8": 1, "empty": 1}
    assert "1 binary" in caplog.text and "1 not UTF-8" in caplog.text


def test_glob_list_and_no_file_twice(tmp_path: Path) -> None:
    write(tmp_path, {"x/one.py": "1", "x/two.txt": "2", "three.py": "3"})
    assert names(find([str(tmp_path / "**" / "*.py")])) == ["three.py", "x/one.py"]
    assert names(find([tmp_path / "three.py", tmp_path])) == ["three.py", "x/one.py", "x/two.txt"]


def test_standard_library_without_tests_or_packages() -> None:
    found = find(limit_bytes=1 << 20)
    everything = names(find())
    assert "json/decoder.py" in everything and "ast.py" in everything
    assert not [name for name in everything if "site-packages" in name or name.startswith("test/")]
    assert 0.9 * 2**20 < found.num_bytes <= 2**20
    assert set(names(found)) < set(everything)
    assert names(find(limit_bytes=1 << 20)) == names(found)


@pytest.mark.parametrize("given", ["nothing", "none/*.txt", "empty"])
def test_nothing_found_names_the_path(tmp_path: Path, given: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=given.replace("*", r"\*")):
        find([tmp_path / given])


def test_only_binary_files(tmp_path: Path) -> None:
    write(tmp_path, {"a": b"\0"})
    with pytest.raises(DataError, match=r"no readable text among 1 files .*'binary': 1"):
        find([tmp_path])


def test_fingerprint_follows_content_not_place(tmp_path: Path) -> None:
    one = find([write(tmp_path / "one", {"a.txt": "hello"})]).fingerprint()
    assert one == find([write(tmp_path / "two", {"a.txt": "hello"})]).fingerprint()
    assert one != find([write(tmp_path / "three", {"a.txt": "hellO"})]).fingerprint()
    assert one != find([write(tmp_path / "four", {"b.txt": "hello"})]).fingerprint()


def test_rows_of_text_and_messages(tmp_path: Path) -> None:
    rows = [
        {"text": "plain", "id": 3},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]},
    ]
    write(tmp_path, {"d.jsonl": "\ufeff" + json.dumps(rows[0]) + "\n\n" + json.dumps(rows[1])})
    first, second = find([tmp_path]).documents()
    assert (first.text, first.line, first.messages) == ("plain", 1, ())
    assert (second.line, [m.role for m in second.messages]) == (3, ["user", "assistant"])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "not a JSON row"),
        ("[" * 100_000, "not a JSON row"),
        ("3", "3, expected an object"),
        ("{}", "no keys"),
        ('{"texts": "x"}', "'texts', expected an object with either 'text' or 'messages'"),
        ('{"text": "x", "messages": []}', "either 'text' or 'messages'"),
        ('{"text": 5}', "text is 5"),
        ('{"text": ""}', "text is ''"),
        ('{"text": "\\ud800"}', "lone surrogate"),
        ('{"messages": []}', r"messages is \[\]"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "no assistant message"),
        ('{"messages": [{"role": "root", "content": "x"}]}', r"messages\[0\] .*system \| user \| assistant"),
        ('{"messages": [{"role": "assistant", "content": null}]}', r"messages\[0\]"),
        ('{"messages": ["x"]}', r"messages\[0\]"),
        ("\xff", "not a JSON row"),
    ],
)
def test_bad_row_names_file_and_line(tmp_path: Path, row: str, message: str) -> None:
    write(tmp_path, {"d.jsonl": b'{"text": "fine"}\n' + row.encode("latin-1") + b"\n"})
    with pytest.raises(DataError, match=rf"d\.jsonl:2: .*{message}"):
        list(find([tmp_path]).documents())


def test_long_text_comes_in_whole_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources_module, "_PIECE_BYTES", 10)
    for text in ("ab\ncdefgh\nijk\n\nlmnopqrstuv", "é" * 21 + "€" * 7, "x" * 30, "a" * 10, "\n" * 25):
        write(tmp_path, {"t.txt": text})
        pieces = list(find([tmp_path]).documents())
        assert "".join(piece.text for piece in pieces) == text
        assert [piece.more for piece in pieces] == [True] * (len(pieces) - 1) + [False]
        for before, after in pairwise(pieces):
            assert after.line == before.line + before.text.count("\n")


def test_file_over_the_limit_ends_at_a_line(tmp_path: Path) -> None:
    write(tmp_path, {"t.txt": "one\ntwo\nthree\n", "d.jsonl": '{"text": "a"}\n{"text": "b"}\n'})
    assert [d.text for d in find([tmp_path / "t.txt"], limit_bytes=10).documents()] == ["one\ntwo\n"]
    assert [d.text for d in find([tmp_path / "d.jsonl"], limit_bytes=15).documents()] == ["a"]


def test_single_file_gives_its_tail_to_validation(tmp_path: Path) -> None:
    text = "".join(f"line {i}\n" for i in range(100))
    write(tmp_path, {"t.txt": text})
    head, tail = find([tmp_path]).with_tail_apart(0.1).documents()
    assert head.text + tail.text == text
    assert tail.text.startswith("line ") and 0.05 < len(tail.text) / len(text) <= 0.1
    assert head.key > tail.key == 0
