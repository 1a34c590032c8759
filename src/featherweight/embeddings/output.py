"""Where a compressed table goes: our own mapped form, or a sentence encoder in ONNX; and its vectors for others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from featherweight.embeddings import write
from featherweight.embeddings.compressed import Compressed
from featherweight.embeddings.compressing import SizeOf
from featherweight.embeddings.encoder import encoder
from featherweight.embeddings.table import F32, Block, from_arrays
from featherweight.embeddings.train import Trained
from featherweight.embeddings.vocabulary import Packed, pack
from featherweight.errors import OutputError
from featherweight.graph import io
from featherweight.whole import whole_file

ENDINGS = (".safetensors", ".onnx")


def check_ending(path: Path) -> None:
    """Raises OutputError unless a compressed table can be saved under this name."""
    if path.suffix not in ENDINGS:
        raise OutputError(
            f"a compressed table is saved as .safetensors or .onnx, but got {path.name!r}; --plain FILE writes its "
            f"vectors as {', '.join(write.WRITERS)}"
        )


def sizer(path: Path, dim: int) -> SizeOf:
    """Bytes of the file that `save` makes, and of its float32 counterpart (None), by the ending of `path`."""
    if path.suffix == ".onnx":
        frame = len(io.to_bytes(encoder(np.zeros((1, dim), np.float32)))) - 4 * dim

        def onnx_bytes(words: list[str], table: Compressed | None) -> int:
            return frame + 4 * dim * len(words) if table is None else len(io.to_bytes(encoder(table)))

        return onnx_bytes

    packed: list[Packed] = []  # made once: every attempt has the same words

    def own_bytes(words: list[str], table: Compressed | None) -> int:
        if not packed:
            packed.append(pack(words))
        empty = Compressed((), None, None, None, None, None, dim)
        size = write.coded_bytes(packed[0], empty if table is None else table)
        return size + 4 * dim * len(words) if table is None else size

    return own_bytes


def save(path: Path, table: Compressed, words: Sequence[str], *, normalise: bool = False) -> None:
    """Write a table by the ending of `path`. Raises OutputError."""
    check_ending(path)
    if path.suffix == ".onnx":
        io.save(encoder(table, normalise=normalise), path)
    else:
        write.write_coded(path, words, table)


def decoded_blocks(table: Compressed, words: Sequence[str], rows: int = 8192) -> Iterator[Block]:
    """The vectors a table stands for, some rows at a time, for `write_vectors`."""
    for start in range(0, len(words), rows):
        at = np.arange(start, min(start + rows, len(words)))
        vectors: F32 = table.rows(at)
        yield Block(list(words[start : start + rows]), vectors, [int(i) + 1 for i in at])


def check_plain_ending(path: Path) -> None:
    """Raises OutputError unless plain vectors can be saved under this name."""
    if path.suffix != ".onnx" and path.suffix not in write.WRITERS:
        raise OutputError(f"vectors are saved as {', '.join(write.WRITERS)} or .onnx, but got {path.name!r}")


def save_vectors(path: Path, words: Sequence[str], vectors: F32) -> None:
    """Write plain vectors by the ending of `path`. Raises OutputError."""
    check_plain_ending(path)
    if path.suffix == ".onnx":
        io.save(encoder(vectors), path)
    else:
        table = from_arrays(str(path), words, vectors)
        write.write_vectors(path, table.blocks(), table.dim)


def save_trained(path: Path, found: Trained) -> Path:
    """Write trained vectors by the ending of `path`, and their words' counts beside it, whose path is returned.

    The rows of an .onnx are those of the counts file. Raises OutputError.
    """
    save_vectors(path, found.words, found.vectors)
    counts = path.with_name(f"{path.stem}.counts.txt")
    with whole_file(counts) as file:
        for word, count in zip(found.words, found.counts.tolist(), strict=True):
            file.write(f"{word}\t{count}\n".encode("utf-8", "surrogatepass"))
    return counts
