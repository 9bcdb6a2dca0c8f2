"""Text as it comes: no character is split, stop strings are held back no longer than they may be one."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.inference.folders import tokenizer_json
from trivium.inference.stream import Detokenizer, StopFinder
from trivium.inference.tokenizer import Tokenizer

BYTES = Tokenizer(tokenizer_json())


class Words:
    """A decoder that drops the first token's leading space, as sentencepiece models do."""

    def decode(self, token_ids: list[int]) -> str:
        return "".join(f" {token}" for token in token_ids)[1:]


@given(st.text(max_size=40), st.lists(st.integers(1, 5), max_size=60))
@example("0𐀀\x80\x800\x80\x80ࠀ", [3, 5, 5, 2])
def test_pieces_are_whole_characters_and_add_up(text: str, sizes: list[int]) -> None:
    tokens = BYTES.encode(text, special=False)
    stream = Detokenizer(BYTES)
    pieces, at = [], 0
    for size in [*sizes, *[1] * len(tokens)]:
        pieces.append(stream.push(tokens[at : at + size]))
        at += size
    pieces.append(stream.flush())
    assert "".join(pieces) == text == BYTES.decode(tokens)
    if "\ufffd" not in text:
        assert "\ufffd" not in "".join(pieces)


@given(st.lists(st.integers(0, 255), max_size=60))
def test_any_bytes_come_out_in_the_end(tokens: list[int]) -> None:
    stream = Detokenizer(BYTES)
    pieces = [stream.push([token]) for token in tokens]
    assert "".join(pieces) + stream.flush() == BYTES.decode(tokens)
    assert stream.flush() == ""


def test_an_emoji_comes_whole_and_control_tokens_silently() -> None:
    tokens = BYTES.encode("a😀b", special=False)
    stream = Detokenizer(BYTES)
    end = BYTES.control["<|end|>"]
    assert [stream.push([token]) for token in (*tokens, end)] == ["a", "", "", "", "😀", "b", ""]
    cut = Detokenizer(BYTES)
    assert [cut.push([token]) for token in tokens[:3]] == ["a", "", ""]
    assert cut.flush() == "\ufffd"


def test_the_first_word_keeps_its_space_after_a_prompt() -> None:
    stream = Detokenizer(Words(), [5, 6])
    assert [stream.push([7]), stream.push([8, 9]), stream.flush()] == [" 7", " 8 9", ""]
    assert Detokenizer(Words()).push([7]) == "7"


@given(st.text(min_size=1, max_size=12), st.text(max_size=12), st.data())
def test_a_character_that_begins_in_the_prompt_belongs_to_the_answer(
    before: str, after: str, data: st.DataObject
) -> None:
    tokens = BYTES.encode(before + after, special=False)
    cut = data.draw(st.integers(0, len(tokens)))
    prompt = tokens[:cut]
    stream = Detokenizer(BYTES, prompt)
    pieces = [stream.push([token]) for token in tokens[cut:]]
    whole = bytes(BYTES.token_bytes(token)[0] for token in prompt).decode(errors="ignore")
    assert (before + after).startswith(whole)
    assert "".join(pieces) + stream.flush() == (before + after)[len(whole) :]


def test_tokens_without_text_do_not_pile_up() -> None:
    stream = Detokenizer(BYTES)
    end = BYTES.control["<|end|>"]
    for _ in range(500):
        assert stream.push([end]) == ""
    assert len(stream._tail) <= 65
    assert stream.push(BYTES.encode("x", special=False)) == "x"


@pytest.mark.parametrize(
    ("stops", "pieces", "shown", "stop"),
    [
        (["END"], ["a", "E", "N", "D", "x"], ["a", "", "", ""], "END"),
        (["END"], ["aE", "Nx"], ["a", "ENx"], None),
        (["b", "abc"], ["xa", "bc"], ["x", "a"], "b"),
        (["abc", "b"], ["xabc"], ["xa"], "b"),
        (["bc", "abc"], ["xabc"], ["x"], "abc"),
        (["aab"], ["aa", "a", "b"], ["", "a", ""], "aab"),
        (["\n\n"], ["x\n", "y\n", "\nz"], ["x", "\ny", ""], "\n\n"),
        ([], ["END"], ["END"], None),
    ],
)
def test_stop_strings(stops: list[str], pieces: list[str], shown: list[str], stop: str | None) -> None:
    finder = StopFinder(stops)
    found: list[str] = []
    end = None
    for piece in pieces:
        text, end = finder.push(piece)
        found.append(text)
        if end is not None:
            break
    assert (found, end) == (shown, stop)


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.integers(1, 5))
def test_stops_are_found_wherever_the_text_is_cut(text: str, stops: list[str], size: int) -> None:
    finder = StopFinder(stops)
    shown, stop = "", None
    for at in range(0, len(text), size):
        piece, stop = finder.push(text[at : at + size])
        shown += piece
        assert not any(one in shown for one in stops)
        if stop is not None:
            break
    shown += "" if stop else finder.flush()
    first = min((text.find(one) + len(one) for one in stops if one in text), default=None)
    assert (stop is None) == (first is None)
    if stop is None:
        assert shown == text
    else:
        assert text.startswith(shown + stop)
