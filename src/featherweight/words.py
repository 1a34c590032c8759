"""Word vectors: `load` a table and use it, read and write its formats.

import featherweight as fw
words = fw.words.load("vectors.safetensors")
words["cat"], words.most_similar("cat")
"""

from __future__ import annotations

from featherweight.embeddings.opening import open_table
from featherweight.embeddings.store import Words, from_arrays, load
from featherweight.embeddings.table import Block, Table
from featherweight.embeddings.write import write_vectors

__all__ = ["Block", "Table", "Words", "from_arrays", "load", "open_table", "write_vectors"]
