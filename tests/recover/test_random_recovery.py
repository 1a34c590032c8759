"""Over networks of every construct: what was cut answers no worse after its weights were solved anew."""

import numpy as np
import pytest

from featherweight.graph import channels as ch
from featherweight.graph import io, surgery
from featherweight.graph.normalise import normalise
from featherweight.recover import recover
from featherweight.runtime import ort
from graph.channels.masking import chosen
from graph.channels.random_graphs import IMAGE_BLOCKS, TOKEN_BLOCKS, build


class InProcess:
    """Runs the child's function here."""

    def call(self, func, *args, progress=None, doing=""):
        return func(*args, progress=progress)


def feeds(feed, seed, count):
    rng = np.random.default_rng(seed)
    return [{k: rng.normal(size=v.shape).astype(v.dtype) for k, v in feed.items()} for _ in range(count)]


def output(model, batches):
    session = ort.session(io.to_bytes(model))
    return np.concatenate([session.run(b)["y"].ravel() for b in batches]).astype(np.float64)


@pytest.mark.parametrize("block", [*IMAGE_BLOCKS, *TOKEN_BLOCKS])
def test_no_construct_gets_worse(block: str) -> None:
    original, feed = build([block, block], 3)
    model = normalise(original, run=None).model
    reduced = surgery.copy_model(model)
    found = ch.analyse(reduced)
    ch.cut(found, chosen(found, 0.3, np.random.default_rng(3)))
    fresh = feeds(feed, 99, 40)
    want = output(model, fresh)
    before = float(((output(reduced, fresh) - want) ** 2).mean())
    recover(model, reduced, feeds(feed, 1, 80), worker=InProcess())
    after = float(((output(reduced, fresh) - want) ** 2).mean())
    assert np.isfinite(after)
    assert after <= before * 1.02 + 1e-9
