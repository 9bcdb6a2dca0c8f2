"""From text on disk to two corpora: cached by content, deterministic, whole or absent, and counted by the baselines."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from trivium.base.errors import ConfigError, DataError
from trivium.train.data import Corpus, DataConfig, Loader, Tokenizer, baseline, prepare
from trivium.train.data import sources as sources_module
from trivium.train.data.corpus import Writer


def text_folder(folder: Path, count: int = 30) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        (folder / f"f{i:02}.py").write_text(f"def name_{i}(value):\n    return value + {i}\n" * 5)
    return folder


def config_of(folder: Path, **other: object) -> DataConfig:
    return DataConfig(**{"paths": (str(folder),), "vocabulary": 300, "validation": 0.2, **other})  # type: ignore[arg-type]


def text_of(corpus: Corpus, tokenizer: Tokenizer, document: int) -> str:
    return tokenizer.decode(corpus.tokens[corpus.offsets[document] : corpus.offsets[document + 1]].tolist())


def test_text_becomes_tokens_and_back(tmp_path: Path) -> None:
    folder = text_folder(tmp_path / "text")
    data = prepare(config_of(folder), tmp_path / "cache")
    assert len(data.train.documents) + len(data.validation.documents) == 30
    assert len(data.validation.documents) > 0 and not set(data.train.documents) & set(data.validation.documents)
    for document in [*data.train.documents, *data.validation.documents]:
        assert text_of(data.train, data.tokenizer, document) == (folder / f"f{document:02}.py").read_text()
        assert data.train.tokens[data.train.offsets[document + 1] - 1] == data.tokenizer.end_id
    assert data.train.name(3) == "f03.py:1"
    assert data.train.tokens.dtype == np.uint16 and isinstance(data.train.tokens, np.memmap)
    batch = next(Loader(data.train, sequence=32, batch_size=2))
    assert batch.num_tokens > 0


def test_cache_is_used_and_follows_content_and_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, cache = text_folder(tmp_path / "text"), tmp_path / "cache"
    first = prepare(config_of(folder), cache)
    kept = sorted(path.name for path in cache.iterdir())
    assert [name.split("-")[0] for name in kept] == ["corpus", "tokenizer"]

    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "train", None)
        patch.setattr(Tokenizer, "encode_batch", None)
        again = prepare(config_of(folder), cache)
    assert again.train.fingerprint == first.train.fingerprint
    elsewhere = prepare(config_of(text_folder(tmp_path / "moved"), cache=str(tmp_path / "other")), cache)
    assert elsewhere.train.fingerprint == first.train.fingerprint
    assert sorted(path.name for path in (tmp_path / "other").iterdir()) == kept

    (folder / "f00.py").write_text("changed = 1\n")
    assert prepare(config_of(folder), cache).train.fingerprint != first.train.fingerprint
    assert prepare(config_of(folder, vocabulary=290), cache).tokenizer.vocabulary == 290
    assert len(list(cache.iterdir())) == 6


def test_given_tokenizer(tmp_path: Path) -> None:
    folder = text_folder(tmp_path / "text")
    Tokenizer.train(["return value"] * 9, vocabulary=270).save(tmp_path / "given")
    data = prepare(config_of(folder, tokenizer=str(tmp_path / "given")), tmp_path / "cache")
    assert data.tokenizer.vocabulary <= 270
    assert [path.name.split("-")[0] for path in (tmp_path / "cache").iterdir()] == ["corpus"]


def test_chat_rows_are_learned_where_the_assistant_speaks(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}!"}]}
        for i in range(20)
    ]
    rows.insert(7, {"text": "plain words"})  # type: ignore[dict-item]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = prepare(config_of(tmp_path / "d.jsonl"), tmp_path / "cache")
    corpus = data.train
    assert corpus.learned is not None
    for document in range(21):
        here = slice(int(corpus.offsets[document]), int(corpus.offsets[document + 1]))
        ids = np.asarray(corpus.tokens[here])[np.asarray(corpus.learned[here], bool)].tolist()
        i = document - (document > 7)
        assert data.tokenizer.decode(ids) == ("plain words" if document == 7 else f"a{i}!")
        assert ids[-1] == data.tokenizer.end_id
        assert corpus.name(document) == f"d.jsonl:{document + 1}"


def test_empty_answers_and_bad_rows_leave_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n{"nothing": 1}\n')
    with pytest.raises(DataError, match=r"d\.jsonl:3"):
        prepare(config_of(tmp_path / "d.jsonl"), tmp_path / "cache")
    Tokenizer.train(["x"], vocabulary=270).save(tmp_path / "given")
    with pytest.raises(DataError, match=r"d\.jsonl:3"):
        prepare(config_of(tmp_path / "d.jsonl", tokenizer=str(tmp_path / "given")), tmp_path / "cache")
    assert not (tmp_path / "cache").exists() or list((tmp_path / "cache").iterdir()) == []


def test_long_document_in_pieces_equals_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = text_folder(tmp_path / "text", 4)
    monkeypatch.setattr(sources_module, "_PIECE_BYTES", 50)
    data = prepare(config_of(folder), tmp_path / "cache")
    assert len(data.train.keys) == 4
    for document in range(4):
        assert text_of(data.train, data.tokenizer, document) == (folder / f"f{document:02}.py").read_text()


def test_single_file_is_split_at_its_tail(tmp_path: Path) -> None:
    folder = text_folder(tmp_path / "text", 1)
    data = prepare(config_of(folder), tmp_path / "cache")
    head, tail = (text_of(c, data.tokenizer, int(c.documents[0])) for c in (data.train, data.validation))
    assert head + tail == (folder / "f00.py").read_text() and tail
    whole = prepare(config_of(folder, validation=0.0), tmp_path / "cache")
    assert len(whole.validation.documents) == 0 and len(whole.train.documents) == 1


def test_two_writers_of_one_corpus_agree(tmp_path: Path) -> None:
    one = Writer(tmp_path / "corpus", vocabulary=70_000, pad_id=1, fingerprint="x")
    one.add([1, 2, 69_999], None, key=2**64 - 1, source=0, line=1, ends=True)
    first = one.close(["a"])
    two = Writer(tmp_path / "corpus", vocabulary=70_000, pad_id=1, fingerprint="x")
    two.add([1, 2, 69_999], None, key=2**64 - 1, source=0, line=1, ends=True)
    second = two.close(["a"])
    assert first.tokens.tolist() == second.tokens.tolist() == [1, 2, 69_999]
    assert first.tokens.dtype == np.uint32 and first.learned is None
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


@pytest.mark.parametrize("damage", ["short", "missing", "json", "count", "offsets"])
def test_damaged_cache_is_named(tmp_path: Path, damage: str) -> None:
    data = prepare(config_of(text_folder(tmp_path / "text")), tmp_path / "cache")
    del data
    (place,) = (tmp_path / "cache").glob("corpus-*")
    about = json.loads((place / "corpus.json").read_text())
    if damage == "short":
        (place / "tokens.bin").write_bytes((place / "tokens.bin").read_bytes()[:-2])
    elif damage == "missing":
        (place / "keys.bin").unlink()
    elif damage == "offsets":
        offsets = np.fromfile(place / "offsets.bin", np.int64)
        offsets[1] = -5
        offsets.tofile(place / "offsets.bin")
    elif damage == "json":
        (place / "corpus.json").write_text("{")
    else:
        (place / "corpus.json").write_text(json.dumps(about | {"documents": 10**15}))
    with pytest.raises(DataError, match=r"delete .* to tokenise again"):
        Corpus.open(place)


def test_baselines_of_a_known_source(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    steps = generator.integers(0, 2, size=(40, 500))
    rows = [(list(np.cumsum(row) % 4), None) for row in steps]
    corpus = Corpus.of(rows, vocabulary=4, pad_id=0, keys=[int(i) << 58 for i in range(40)])
    train, held = corpus.split(0.25)
    found = baseline(train, held)
    assert found.tokens == len(held.documents) * 499 and found.train_tokens == len(train.documents) * 499
    assert found.unigram == pytest.approx(math.log(4), abs=0.01)
    assert found.bigram == pytest.approx(math.log(2), abs=0.01)
    assert baseline(train, held, max_train_tokens=1000).train_tokens < 1010


def test_baselines_score_only_what_carries_loss_and_stay_finite() -> None:
    def corpus(rows: list[tuple[list[int], list[bool] | None]]) -> Corpus:
        return Corpus.of(rows, vocabulary=8, pad_id=0)

    seen = baseline(corpus([([0, 1, 2], None)]), corpus([([5, 6, 7, 1], [True, True, False, True])]))
    assert seen.tokens == 2 and math.isfinite(seen.bigram)
    assert seen.unigram == pytest.approx(-(math.log(0.5 / 6) + math.log(1.5 / 6)) / 2)
    with pytest.raises(DataError, match="validation corpus has no token"):
        baseline(corpus([([0, 1], None)]), corpus([([3], None)]))
    with pytest.raises(DataError, match="training corpus has no token"):
        baseline(corpus([([0], None)]), corpus([([3, 4], None)]))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("format", "csv"),
        ("sequence", 1),
        ("vocabulary", 100),
        ("validation", 1.0),
        ("validation", -0.1),
        ("limit_bytes", 0),
    ],
)
def test_config_refuses_by_key(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"data.{key}="):
        DataConfig(**{key: value})  # type: ignore[arg-type]
