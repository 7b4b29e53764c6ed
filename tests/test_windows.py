"""Windows of a text: spread over its documents, the same for all, and the documents that they are in."""

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcascade.cache.errors import BadInput
from kvcascade.eval.quality.windows import choose, spread
from kvcascade.model import tokenizer
from kvcascade.train import data

BYTES = tokenizer.bytes_encoding()


@given(st.integers(1, 3000), st.integers(0, 99))
def test_every_beginning_is_spread(total, seed):
    """All windows once; of any number from the first on, no stretch of the text has far more than its share."""
    order = spread(total, seed)
    assert sorted(order.tolist()) == list(range(total))
    for count in {min(total, n) for n in (2, 5, 16, 100)}:
        parts = np.histogram(order[:count], bins=4, range=(0, total))[0]
        assert parts.max() - parts.min() <= 4 and (count < 16 or parts.min() > 0)


def test_windows_are_of_the_text_and_know_their_documents():
    """Each is a stretch of the text at a multiple of its length; the document is that of its middle; twice as many are these and others."""
    tokens, starts = np.arange(1000, dtype=np.uint16), np.asarray([0, 95, 500])
    some = choose(tokens, starts, "x", 10, 8)
    assert (some.rows_BT % 10 == np.arange(10)).all() and (np.diff(some.rows_BT) == 1).all()
    assert some.documents_B.tolist() == [0 if row[5] < 95 else 1 if row[5] < 500 else 2 for row in some.rows_BT]
    more = choose(tokens, starts, "x", 10, 16)
    np.testing.assert_array_equal(more.part(0, 8).rows_BT, some.rows_BT)
    assert more.part(0, 8).key == some.key != more.key and more.text == some.text
    assert choose(tokens, starts, "x", 10, 8, seed=1).key != some.key
    first = choose(tokens, starts, "x", 11, 4, "first", bos=7)
    assert (first.rows_BT[:, 0] == 7).all()
    np.testing.assert_array_equal(first.rows_BT[:, 1:].ravel(), tokens[:40])
    assert choose(tokens.astype(np.uint32), starts, "x", 10, 8).text == some.text
    for context, count in ((10, 101), (1001, 1), (10, 0)):
        with pytest.raises(BadInput, match=f"{count} windows of {context} tokens"):
            choose(tokens, starts, "x", context, count)


WIKI = " \n = One = \n \n Text of one . \n = = Part = = \n More . \n \n = Two and a half = \n \n Größe . \n"


@pytest.mark.parametrize("rows", [[WIKI], WIKI.splitlines(keepends=True)], ids=["a file", "a row per line"])
def test_articles_are_documents(rows):
    """Of WikiText, in whatever rows it comes: at headings of the first level, what is before the first one left to it."""
    dataset = datasets.Dataset.from_dict({"text": rows})
    tokens = data.tokenize(dataset, BYTES)
    starts = data.document_starts(dataset, tokens, tokenizer.token_bytes(BYTES))
    text = WIKI.encode()
    assert [text[start:].split(b"\n")[0] for start in starts] == [b" ", b" = Two and a half = "]


def test_rows_are_documents_where_there_are_no_headings():
    dataset = datasets.Dataset.from_dict({"text": ["abc", "defg\n", "h"]})
    tokens = data.tokenize(dataset, BYTES)
    assert data.document_starts(dataset, tokens, tokenizer.token_bytes(BYTES)).tolist() == [0, 4, 9]
