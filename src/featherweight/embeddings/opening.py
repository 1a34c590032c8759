"""One door for all tables of vectors: the format is found from the file's first bytes, not from its name."""

from __future__ import annotations

import zipfile
from pathlib import Path

from featherweight.embeddings import safetensors, store
from featherweight.embeddings.read_arrays import PICKLED, npy_table, onnx_table, safetensors_table
from featherweight.embeddings.read_binary import binary_table
from featherweight.embeddings.read_text import header, is_number, opened, text_table
from featherweight.embeddings.table import Table
from featherweight.errors import DataError

FASTTEXT_MAGIC = (793712314).to_bytes(4, "little")


def open_table(
    path: str | Path, *, vocabulary: str | Path | None = None, tensor: str | None = None, skip_bad: bool = False
) -> Table:
    """The Table of word2vec text or binary, GloVe, fastText .vec (each also .gz), .npy, .safetensors or ONNX.

    `vocabulary`: words of bare arrays, a line each, or a tokenizer.json; found by itself beside the file. `tensor`
    names one of several. `skip_bad`: leave out rows that cannot be used, and count them. Raises DataError.
    """
    where = Path(path)
    try:
        with where.open("rb") as file:
            begin = file.read(16)
    except OSError as e:
        raise DataError(f"the vectors {where} cannot be read: {e.strerror or e}") from e
    if not begin:
        raise DataError(f"the vectors {where} must hold rows, but the file is empty")
    words = Path(vocabulary) if vocabulary is not None else None
    if begin.startswith(b"\x93NUMPY"):
        return npy_table(where, words=words, skip_bad=skip_bad)
    if where.suffix == ".onnx":
        return onnx_table(where, tensor=tensor, words=words, skip_bad=skip_bad)
    _refuse(where, begin)
    if safetensors.is_safetensors(where, begin):
        found = safetensors.read_header(where)
        if tensor is None and store.is_ours(found):
            return store.as_table(found, skip_bad=skip_bad)
        return safetensors_table(where, tensor=tensor, words=words, skip_bad=skip_bad)
    return binary_table(where, skip_bad=skip_bad) if _is_binary(where) else text_table(where, skip_bad=skip_bad)


def _refuse(where: Path, begin: bytes) -> None:
    """Raises DataError, with the way out, for files that are known but cannot be read safely."""
    if begin[0] == 0x80 and begin[1] in range(2, 6):
        raise DataError(
            f"{where} is a Python pickle (gensim's .kv and .model are): {PICKLED}; in gensim write the vectors with "
            "kv.save_word2vec_format('vectors.bin', binary=True)"
        )
    if begin.startswith(FASTTEXT_MAGIC):
        raise DataError(f"{where} is a fastText model; give the .vec file that fastText writes beside it")
    if begin.startswith(b"PK"):
        inside = ", ".join(zipfile.ZipFile(where).namelist()[:4]) if zipfile.is_zipfile(where) else "nothing readable"
        raise DataError(f"{where} is a zip archive ({inside}); unpack it and give the file of vectors inside")


def _is_binary(where: Path) -> bool:
    """True if a word2vec header is followed by something that is no line of numbers."""
    try:
        with opened(where) as file:
            said = header(file.readline(64))
            after = file.read(4096)
    except (OSError, EOFError) as e:
        raise DataError(f"{where} cannot be unpacked: {e}") from e
    if said is None:
        return False
    numbers = after.split(b"\n")[0].split()[1:5]
    return any(c < 9 or 14 <= c < 32 for c in after) and not all(map(is_number, numbers))
