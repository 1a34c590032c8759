"""Training through gensim: what it learns, that it repeats and goes on, what it refuses."""

from __future__ import annotations

import gzip
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from featherweight.embeddings import train as module
from featherweight.embeddings.corpus import Corpus, open_corpus
from featherweight.embeddings.tokens import tokenizer
from featherweight.embeddings.train import Recipe, train
from featherweight.errors import DataError

SMALL = Recipe(dim=16, window=2, epochs=4, min_count=1, subsample=0.01, alpha=0.05, seed=3)


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    """Two topics whose words never meet."""
    pytest.importorskip("gensim")
    rng = np.random.default_rng(0)
    topics = [[f"{t}{i}" for i in range(8)] for t in ("sea", "sky")]
    lines = [" ".join(rng.choice(topics[i % 2], 12)) for i in range(600)]
    (tmp_path / "corpus.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return open_corpus(tmp_path / "corpus.txt")


def separation(vectors, words) -> float:
    """Mean cosine inside topics minus across."""
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    same = np.array([[a[:3] == b[:3] for b in words] for a in words])
    cosines = unit @ unit.T
    return float(cosines[same].mean() - cosines[~same].mean())


@pytest.mark.parametrize("model", ["skipgram", "cbow"])
def test_words_of_one_topic_come_together(corpus, model: str) -> None:
    found = train(corpus, replace(SMALL, model=model, epochs=20), workers=1)
    assert found.vectors.shape == (16, 16)
    assert separation(found.vectors, found.words) > 0.5
    assert found.counts.tolist() == sorted(found.counts.tolist(), reverse=True)
    assert found.counts.sum() == found.corpus_words == 7200
    assert len(found.loss) == 20
    assert found.loss[-1] < found.loss[0]


def test_equal_seeds_give_equal_bits_and_others_do_not(corpus) -> None:
    one, two = (train(corpus, SMALL, workers=1) for _ in range(2))
    np.testing.assert_array_equal(one.vectors, two.vectors)
    assert not np.array_equal(one.vectors, train(corpus, replace(SMALL, seed=4), workers=1).vectors)


def test_epoch_by_epoch_is_gensims_own_training(corpus) -> None:
    """One epoch here is one call of gensim's: the same rates, the same draws."""
    from gensim.models import Word2Vec

    recipe = replace(SMALL, epochs=1)
    counts, sentences = corpus.counts()
    own = Word2Vec(vector_size=16, window=2, min_count=1, sample=0.01, sg=1, negative=5, alpha=0.05, workers=1, seed=3)
    own.build_vocab_from_freq(dict(counts), corpus_count=sentences)
    own.random = np.random.RandomState(3 * 1_000_003)
    own.train(corpus_file=str(corpus.files[0]), total_examples=sentences, total_words=7200, epochs=1)
    np.testing.assert_array_equal(train(corpus, recipe, workers=1).vectors, own.wv.vectors)


@pytest.mark.parametrize("subwords", [False, True])
def test_an_interrupted_run_goes_on_to_the_same_bits(corpus, tmp_path: Path, monkeypatch, subwords: bool) -> None:
    recipe, state = replace(SMALL, subwords=subwords), tmp_path / "state.npz"
    whole = train(corpus, recipe, workers=1)
    true_epoch = module._epoch

    def dies(model, recipe, epoch, *rest):
        if epoch == 2:
            raise KeyboardInterrupt
        return true_epoch(model, recipe, epoch, *rest)

    monkeypatch.setattr(module, "_epoch", dies)
    with pytest.raises(KeyboardInterrupt):
        train(corpus, recipe, workers=1, state=state)
    monkeypatch.setattr(module, "_epoch", true_epoch)
    with pytest.raises(DataError, match="is of another run: window was 2, now 3"):
        train(corpus, replace(recipe, window=3), workers=1, state=state, resume=True)
    rest = train(corpus, recipe, workers=1, state=state, resume=True)
    assert rest.resumed_at == 2
    np.testing.assert_array_equal(rest.vectors, whole.vectors)
    assert rest.loss == pytest.approx(whole.loss)
    assert not state.exists()
    with pytest.raises(DataError, match="nothing to resume"):
        train(corpus, recipe, workers=1, state=state, resume=True)


def test_folders_packed_files_and_tokenizers_give_the_same_words(corpus, tmp_path: Path) -> None:
    (tmp_path / "many").mkdir()
    data = corpus.files[0].read_bytes()
    (tmp_path / "many" / "a.txt.gz").write_bytes(gzip.compress(data[: data.index(b"\n", 9000) + 1]))
    (tmp_path / "many" / "b.txt").write_bytes(data[data.index(b"\n", 9000) + 1 :])
    many = open_corpus(tmp_path / "many", tokenizer(None, lower=True))
    assert many.counts() == corpus.counts()
    assert train(many, SMALL, workers=1).words == train(corpus, SMALL, workers=1).words


def test_what_cannot_be_learnt_from_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no corpus"):
        open_corpus(tmp_path / "absent.txt")
    with pytest.raises(DataError, match=r"holds no \.txt file"):
        open_corpus(tmp_path)
    (tmp_path / "bad.txt").write_bytes(b"fine\nnot \xff\n")
    with pytest.raises(DataError, match=r"bad.txt line 2 is not UTF-8"):
        open_corpus(tmp_path / "bad.txt").counts()
    with pytest.raises(DataError, match="must be skipgram or cbow, but got 'glove'"):
        Recipe(model="glove")
    with pytest.raises(DataError, match="window must be at least 1, but got 0"):
        Recipe(window=0)
    pytest.importorskip("gensim")
    (tmp_path / "rare.txt").write_text("a b c\n")
    with pytest.raises(DataError, match="no word comes 5 times in these 3 words"):
        train(open_corpus(tmp_path / "rare.txt"), Recipe())
