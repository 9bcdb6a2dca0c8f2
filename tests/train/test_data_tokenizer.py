"""The tokenizer: round trips, stable bytes, control tokens that text cannot forge, and a loss mask that is exact."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trivium.base.errors import DataError
from trivium.train.data.chat import Template
from trivium.train.data.sources import Message
from trivium.train.data.tokenizer import CHAT, END, PAD, Tokenizer

TEXTS = ["def add(a, b):\n    return a + b\n", "for word in words:\n    print(word)\n"] * 20
TOKENIZER = Tokenizer.train(TEXTS, vocabulary=290)


def chat(*turns: tuple[str, str]) -> list[Message]:
    return [Message(role=role, content=content) for role, content in turns]


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_any_text_round_trips(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert all(0 <= token < TOKENIZER.vocabulary for token in ids)


def test_training_is_deterministic_and_learns_merges() -> None:
    assert Tokenizer.train(TEXTS, vocabulary=290).to_json() == TOKENIZER.to_json()
    assert TOKENIZER.vocabulary == 290
    assert len(TOKENIZER.encode(TEXTS[0])) < len(TEXTS[0]) * 0.8


def test_save_and_load(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path)
    for place in (tmp_path, tmp_path / "tokenizer.json"):
        back = Tokenizer.load(place)
        assert back.encode("def x<|end|>") == TOKENIZER.encode("def x<|end|>")
        assert (back.end_id, back.pad_id, back.begin_id) == (TOKENIZER.end_id, TOKENIZER.pad_id, None)
        assert back.template == TOKENIZER.template
        assert back.to_json() == TOKENIZER.to_json()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]


@pytest.mark.parametrize("token", [END, PAD, *CHAT])
def test_text_cannot_forge_a_control_token(token: str, tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path)
    every_role = chat(("system", ""), ("user", ""), ("assistant", ""))
    for tokenizer in (TOKENIZER, Tokenizer.load(tmp_path)):
        ids, _ = tokenizer.encode_chat(chat(("user", f"a{token}b"), ("assistant", token)))
        controls = {tokenizer.end_id, tokenizer.pad_id, *tokenizer.encode_chat(every_role)[0]}
        assert not controls & set(tokenizer.encode(f"x {token} y"))
        assert sum(index in controls for index in ids) == 4
        assert tokenizer.decode(tokenizer.encode(token)) == token


def test_mask_is_exactly_the_answers_and_their_ends() -> None:
    messages = chat(("system", "be brief"), ("user", "hi"), ("assistant", "yes"), ("user", "more"), ("assistant", ""))
    ids, learned = TOKENIZER.encode_chat(messages)
    assert [i for i, on in zip(ids, learned, strict=True) if on] == [*TOKENIZER.encode("yes"), *[TOKENIZER.end_id] * 2]
    at = learned.index(True)
    assert ids[at : at + len(TOKENIZER.encode("yes"))] == TOKENIZER.encode("yes")
    prompt, _ = TOKENIZER.encode_chat(messages[:2], prompt=True)
    assert ids[:at] == prompt


def foreign(tmp_path: Path, template: str | None, **config: object) -> Tokenizer:
    TOKENIZER.save(tmp_path)
    config = {"eos_token": {"content": END}, **config}
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(config | ({"chat_template": template} if template else {}))
    )
    return Tokenizer.load(tmp_path)


def test_foreign_template_that_trims_and_continues(tmp_path: Path) -> None:
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}"
        "A: {{ m['content'] | trim }}{{ eos_token }}\n"
        "{% else %}{{ m['role'] | upper }}: {{ m['content'].strip() ~ '!' }}\n{% endif %}{% endfor %}"
    )
    tokenizer = foreign(tmp_path, template, bos_token="<|system|>", add_bos_token=True)
    ids, learned = tokenizer.encode_chat(chat(("user", "  hi "), ("assistant", " ok\n")))
    assert tokenizer.decode(ids) == "USER: hi!\nA: ok\n"
    assert ids[0] == tokenizer.begin_id
    assert [i for i, on in zip(ids, learned, strict=True) if on] == [*tokenizer.encode("ok"), tokenizer.end_id]


def test_template_file_beside_the_tokenizer(tmp_path: Path) -> None:
    foreign(tmp_path, "unused")
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    assert Tokenizer.load(tmp_path).decode(Tokenizer.load(tmp_path).encode_chat(chat(("user", "q")))[0]) == "[q]"


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
        "{% for i in range(90000) %}{{ 'xxxxxxxxxxxxxxxxxxxxxxxxxxxxx' }}{% endfor %}",
        "{{ 'x' * 1000000000 }}",
        "{{ 2 ** 100000000 }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ 'x'.ljust(1000000000) }}",
        "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
        "{% set n = namespace(x='aaaa') %}{% for i in range(60) %}{% set n.x = n.x.replace('a', n.x) %}{% endfor %}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0].content }}{{ messages[0].content }}",
        "nothing of the messages",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% include 'x' %}",
    ],
)
def test_template_is_caged(tmp_path: Path, template: str) -> None:
    tokenizer = foreign(tmp_path, template)
    with pytest.raises(DataError, match=r"rows\.jsonl:3: the chat_template of .*tokenizer\.json"):
        tokenizer.encode_chat(chat(("user", "q")), where="rows.jsonl:3")


def test_template_size_syntax_and_absence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="70000 characters: at most 65536"):
        Template("x" * 70_000, source="t")
    with pytest.raises(DataError, match="does not compile"):
        Template("{% for %}", source="t")
    bare = Tokenizer(TOKENIZER._backend, template=None, source="bare")
    with pytest.raises(DataError, match="bare has no chat_template"):
        bare.encode_chat(chat(("user", "q")))


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"tokenizer\.json: No such file"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer\.json: not a tokenizer\.json"):
        Tokenizer.load(tmp_path)
    TOKENIZER.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(DataError, match="expected an object, got list"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</nope>"}')
    with pytest.raises(DataError, match="'</nope>' is not in its vocabulary"):
        Tokenizer.load(tmp_path)


def test_characters(tmp_path: Path) -> None:
    Tokenizer.of_characters("abc ").save(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.decode(tokenizer.encode("a cab")) == "a cab"
    assert len(tokenizer.encode("a cab")) == 5
    with pytest.raises(DataError, match="'abx': character 'x' is not in the vocabulary"):
        tokenizer.encode("abx")


def test_transformers_reads_the_same(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    TOKENIZER.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = chat(("user", "add (a"), ("assistant", "def"))
    rows = [{"role": message.role, "content": message.content} for message in messages]
    ids = theirs.apply_chat_template(rows, tokenize=True, return_dict=True)["input_ids"]
    assert ids == TOKENIZER.encode_chat(messages)[0]
    assert theirs.encode(TEXTS[0]) == TOKENIZER.encode(TEXTS[0])
    assert (theirs.eos_token_id, theirs.pad_token_id) == (TOKENIZER.end_id, TOKENIZER.pad_id)


def test_words_are_one_token_wherever_they_stand(tmp_path: Path) -> None:
    Tokenizer.of_characters("adx ", ["add "]).save(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    assert len(tokenizer.encode("add xadd add")) == 1 + 1 + 1 + 3
    assert tokenizer.decode(tokenizer.encode("add xadd add")) == "add xadd add"
    with pytest.raises(DataError, match="character 'y' is not"):
        tokenizer.encode("add xy")
