"""Text tables: columns, pairs, padding, input names, hostile files."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import numpy as np
import pytest

from featherweight.data import Dataset, InputSpec, check, open_data, split, spool
from featherweight.errors import DataError, MissingExtraError

tokenizers = pytest.importorskip("tokenizers")

I64 = np.dtype(np.int64)
BERT = [InputSpec(n, I64, ("b", "s")) for n in ("input_ids", "attention_mask", "token_type_ids")]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "c", "d", "e"]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    made.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def _open(
    folder: Path, text: str, tokenizer: Path, *, ending: str = "tsv", inputs: list[InputSpec] = BERT, **more: object
) -> Dataset:
    path = folder / f"d.{ending}"
    path.write_text(text, "utf-8")
    return open_data(path, inputs, tokenizer=tokenizer, **more)


def test_padding_mask_and_labels(tmp_path: Path, tokenizer: Path) -> None:
    data = _open(tmp_path, 'label\ttext\n1\ta "b"\n0\tc\n1\td e\n', tokenizer, batch_size=2)
    check(data, BERT, n_classes=2, id_limits={"input_ids": len(WORDS)})
    first, second = data.batches()
    # `"` is no quote in a .tsv but a token of its own (unknown here).
    assert first.feeds["input_ids"].tolist() == [[2, 4, 1, 5, 1, 3], [2, 6, 3, 0, 0, 0]]
    assert first.feeds["attention_mask"].tolist() == [[1] * 6, [1] * 3 + [0] * 3]
    assert first.labels.tolist() == [1, 0]
    assert second.feeds["input_ids"].tolist() == [[2, 7, 8, 3]]


def test_pairs_with_a_score_are_two_rows(tmp_path: Path, tokenizer: Path) -> None:
    data = _open(tmp_path, "score\tsentence1\tsentence2\n5.0\ta\tb\n2.5\tc\td\n", tokenizer, batch_size=2)
    (batch,) = data.batches()
    assert (data.rows_per_sample, batch.n, data.n_samples) == (2, 2, 2)
    assert batch.feeds["input_ids"][:, 1].tolist() == [4, 5, 6, 7]
    assert batch.labels.tolist() == [5.0, 2.5]
    out = spool(data, tmp_path / "s", inputs=BERT)
    assert next(out.subset([0]).batches()).feeds["input_ids"].tolist() == batch.feeds["input_ids"].tolist()
    assert (out.rows_per_sample, out.n_samples) == (2, 2)


def test_pairs_with_a_label_are_one_row(tmp_path: Path, tokenizer: Path) -> None:
    data = _open(tmp_path, 'label,sentence1,sentence2\nyes,a,"b, c"\nno,d,e\n', tokenizer, ending="csv")
    first = next(data.batches())
    assert first.feeds["input_ids"].tolist() == [[2, 4, 3, 5, 1, 6, 3]]
    assert first.feeds["token_type_ids"].tolist() == [[0, 0, 0, 1, 1, 1, 1]]
    assert data.labels().tolist() == [1, 0]
    assert any("alphabetical order ('no' is 0)" in n.text for n in data.notes)


def test_named_columns_split_and_plain_text(tmp_path: Path, tokenizer: Path) -> None:
    text = "body\tstars\tset\na\t3\ttrain\nb\t1\ttrain\nc\t2\ttest\n"
    data = _open(tmp_path, text, tokenizer, columns={"text": "body", "label": "stars", "split": "set"})
    assert data.labels().tolist() == [3, 1, 2]
    assert split(data).holdout.labels().tolist() == [2]
    plain = _open(tmp_path, "a b\n\nc\n", tokenizer, ending="txt")
    assert [b.feeds["input_ids"].tolist() for b in plain.batches()] == [[[2, 4, 5, 3]], [[2, 6, 3]]]


def test_fixed_length_truncation_and_types(tmp_path: Path, tokenizer: Path) -> None:
    specs = [InputSpec("ids", np.dtype(np.int32), (2, 4)), InputSpec("input_mask", np.dtype(np.float32), (2, 4))]
    data = _open(tmp_path, "text\na b c d e\na\nb\n", tokenizer, inputs=specs)
    (batch,) = data.batches()
    assert batch.feeds["ids"].tolist() == [[2, 4, 5, 3], [2, 4, 3, 0]]
    assert [batch.feeds[name].dtype.name for name in ("ids", "input_mask")] == ["int32", "float32"]
    assert any("1 of 3 rows are not used" in n.text for n in data.notes)
    short = _open(tmp_path, "text\na b c d e\n", tokenizer, max_length=3)
    assert next(short.batches()).feeds["input_ids"].shape == (1, 3)


def test_flat_ids_with_offsets(tmp_path: Path, tokenizer: Path) -> None:
    specs = [InputSpec("input_ids", I64, ("t",)), InputSpec("offsets", I64, ("b",))]
    (batch,) = _open(tmp_path, "text\na b\nc\n", tokenizer, inputs=specs, batch_size=2).batches()
    assert batch.feeds["input_ids"].tolist() == [2, 4, 5, 3, 2, 6, 3]
    assert batch.feeds["offsets"].tolist() == [0, 4]


def test_any_order_of_batches_and_pickling(tmp_path: Path, tokenizer: Path) -> None:
    data = _open(tmp_path, "label\ttext\n" + "".join(f"{i}\t{w}\n" for i, w in enumerate("abcde")), tokenizer)
    again = pickle.loads(pickle.dumps(data.subset([3, 0, 4])))
    assert [b.feeds["input_ids"][0, 1] for b in again.batches()] == [7, 4, 8]
    assert again.labels().tolist() == [3, 0, 4]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("texts\tlabel\na\t1\n", r"no column text.*columns are \['texts', 'label'\]; did you mean 'texts'"),
        ("text\tlabel\na\n", "line 2 has 1 fields, but the header has 2"),
        ("text\tlabel\na\t\n", "line 2: 'label' is empty"),
        ("text\n", "calibration data is empty"),
        ("", "calibration data is empty"),
        ("text\tsplit\na\tfold\n", "split is 'fold'"),
    ],
)
def test_wrong_tables_name_what_is_wrong(tmp_path: Path, tokenizer: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        _open(tmp_path, text, tokenizer)


def test_bytes_that_are_not_utf8_are_located(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "d.tsv").write_bytes(b"text\nfine\ncaf\xe9\n")
    with pytest.raises(DataError, match=r"is not UTF-8 \(byte 0xe9"):
        open_data(tmp_path / "d.tsv", BERT, tokenizer=tokenizer)


def test_a_wrong_or_absent_tokenizer_is_said(tmp_path: Path, tokenizer: Path) -> None:
    with pytest.raises(DataError, match=r"needs the model's tokenizer: give the path"):
        _open(tmp_path, "text\na\n", None)
    tokenizer.write_text("{}")
    with pytest.raises(DataError, match=r"is not a tokenizer.json"):
        _open(tmp_path, "text\na\n", tokenizer)


def test_the_missing_package_is_named(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(MissingExtraError, match=r"install featherweight\[text\]"):
        _open(tmp_path, "text\na\n", tokenizer)


def test_inputs_that_text_cannot_fill_are_named(tmp_path: Path, tokenizer: Path) -> None:
    specs = [*BERT, InputSpec("past_key_values.0.key", np.dtype(np.float32), ("b", 2, "p", 4))]
    with pytest.raises(DataError, match=r"cannot fill the model's input 'past_key_values.0.key'"):
        _open(tmp_path, "text\na\n", tokenizer, inputs=specs)
    with pytest.raises(DataError, match="pairs need an even number of rows a call, but the model takes 1"):
        _open(tmp_path, "score\tsentence1\tsentence2\n1\ta\tb\n", tokenizer, inputs=[InputSpec("ids", I64, (1, "s"))])


def test_real_pairs_have_their_scores(shared_data: Path, tokenizer: Path) -> None:
    data = open_data(shared_data / "sts" / "stsb-en-dev.tsv", BERT, tokenizer=tokenizer, batch_size=4)
    assert (data.n_samples, data.rows_per_sample) == (1500, 2)
    assert data.labels()[:2].tolist() == [5.0, 4.75]
