"""`.pt2` files: checked member by member, and rebuilt from what was checked before PyTorch sees them.

Read in PyTorch 2.13's sources: `torch.export.load` unpickles weights and constants that say `use_pickle`, custom and
opaque objects, and weights in the older layout; it falls back to an unsafe unpickler for example inputs that a safe one
refuses; and it loads compiled libraries. None of these is let through. See `rules` for the program itself.
"""

from __future__ import annotations

import io
import json
import math
import re
import struct
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featherweight.convert.rules import checked_program
from featherweight.errors import ModelError

if TYPE_CHECKING:
    from torch.export import ExportedProgram

MAX_MEMBERS = 100_000
MAX_TEXT_BYTES = 256 << 20
"""Of one JSON member, or of the example inputs."""
_PAYLOAD = re.compile(r"data/(weights|constants)/(weight|tensor)_[0-9]{1,9}")
_CONFIG = re.compile(r"data/(weights|constants)/model_(weights|constants)_config\.json")
_UNREADABLE = (
    zipfile.BadZipFile, EOFError, NotImplementedError, ValueError, RuntimeError, struct.error, zlib.error,
    OverflowError,
)  # fmt: skip
"""What zipfile raises where an archive is damaged; also for encrypted members."""
_PROGRAM, _SAMPLES, _FORMAT = "models/model.json", "data/sample_inputs/model.pt", "archive_format"
_KEPT = {"archive_format", "archive_version", "byteorder", ".data/version", ".data/serialization_id"}


def open_program(path: Path, *, trust: bool) -> ExportedProgram:
    """The exported program of a file. Without `trust` only after its check; imports torch.

    Raises ModelError: not a `.pt2` file, truncated, of another version, or with members that could run code.
    """
    if trust:
        return _load(path, path)
    with tempfile.TemporaryDirectory(prefix="featherweight-") as folder:
        clean = Path(folder) / "program.pt2"
        rebuild(path, clean)
        return _load(clean, path)


def rebuild(path: Path, target: Path) -> None:
    """Write the checked members of `path` to `target`; nothing of a member that is not needed. Raises ModelError."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = checked_members(archive, path)
            configs = {
                name: _checked_config(_text(archive, m, path), name, path)
                for name, m in members.items()
                if _CONFIG.fullmatch(name)
            }
            program = checked_program(_text(archive, members[_PROGRAM], path), str(path))
            needed = _needed(configs, members, path)
            with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as out:
                for name, member in members.items():
                    if name == _PROGRAM:
                        out.writestr(f"program/{name}", json.dumps(program))
                    elif name == _SAMPLES:
                        out.writestr(f"program/{name}", _safe_samples(archive.read(member)))
                    elif name in needed or name in configs or name in _KEPT:
                        _copy(archive, member, out, f"program/{name}")
    except (*_UNREADABLE, KeyError) as e:
        raise ModelError(f"{path} is not a readable .pt2 file: truncated or corrupt ({e}); save it again") from e
    except OSError as e:
        raise ModelError(f"{path} cannot be read: {e.strerror or e}") from e


def checked_members(archive: zipfile.ZipFile, path: Path) -> dict[str, zipfile.ZipInfo]:
    """Members by name without the root folder. Raises ModelError for what torch.export.save would not write."""
    size = path.stat().st_size
    infos = archive.infolist()
    if not infos or len(infos) > MAX_MEMBERS:
        raise ModelError(f"{path} must have 1 to {MAX_MEMBERS} members, but has {len(infos)}; save it again")
    if min(i.header_offset for i in infos):
        raise zipfile.BadZipFile("the archive does not begin where the file does")
    root = infos[0].filename.partition("/")[0]
    found: dict[str, zipfile.ZipInfo] = {}
    seen: set[str] = set()
    for info in infos:
        name = info.filename
        if name.startswith("/") or "\\" in name or ".." in name.split("/") or "\0" in name:
            raise ModelError(
                f"{path} is not loaded: its member {name[:100]!r} points outside the archive; save it again"
            )
        if info.compress_type != zipfile.ZIP_STORED or info.file_size > size:
            raise ModelError(
                f"{path} is not loaded: PyTorch stores members uncompressed, but {name[:100]!r} would unpack to "
                f"{info.file_size} B from a file of {size} B; save it again with torch.export.save"
            )
        if name.lower() in seen:
            raise ModelError(f"{path} is not loaded: it has the member {name[:100]!r} twice; save it again")
        seen.add(name.lower())
        top, _, inner = name.partition("/")
        found[inner if top == root and inner else name] = info
    _check_kinds(found, archive, path)
    return found


def _check_kinds(members: dict[str, zipfile.ZipInfo], archive: zipfile.ZipFile, path: Path) -> None:
    if _FORMAT not in members or _PROGRAM not in members:
        old = "serialized_exported_program.json" in members
        why = "was saved by an older PyTorch" if old else "holds no program of torch.export"
        if "data.pkl" in members:
            why = "holds TorchScript or a pickle, not a program of torch.export"
        raise ModelError(
            f"{path} {why}; save the module again: torch.export.save(torch.export.export(...), 'model.pt2')"
        )
    if archive.read(members[_FORMAT])[:16] != b"pt2":
        raise ModelError(f"{path} is not of the format pt2; save it again with torch.export.save")
    for name in members:
        if name.startswith("data/aotinductor/") and not name.endswith("/"):
            raise _runs_code(path, name, "compiled code")
        if name.startswith(("data/weights/", "data/constants/")):
            if not (_PAYLOAD.fullmatch(name) or _CONFIG.fullmatch(name)):
                raise _runs_code(path, name, "a pickle")
        elif name.startswith("models/") and name != _PROGRAM:
            raise ModelError(f"{path} holds more than one program ({name}); save each in a file of its own")


def _needed(configs: dict[str, dict[str, int]], members: dict[str, zipfile.ZipInfo], path: Path) -> set[str]:
    """Members the configs point to. Raises ModelError where one is absent, or is empty though its tensor is not."""
    found = set()
    for name, payloads in configs.items():
        for file, elements in payloads.items():
            member = f"{name.rpartition('/')[0]}/{file}"
            if member not in members or (elements and not members[member].file_size):
                raise ModelError(f"{path} is corrupt: {member} is missing or empty; save it again")
            found.add(member)
    return found


def _checked_config(text: bytes, name: str, path: Path) -> dict[str, int]:
    """Payload files of one config with the elements of their tensor. Raises ModelError for a pickled one."""
    try:
        entries: dict[str, Any] = json.loads(text)["config"]
        found: dict[str, int] = {}
        for tensor, entry in entries.items():
            file = entry["path_name"]
            if entry["use_pickle"] is not False or not _PAYLOAD.fullmatch(f"{name.rpartition('/')[0]}/{file}"):
                raise _runs_code(path, f"{tensor} ({file})", "a pickle")
            found[str(file)] = math.prod(int(d["as_int"]) for d in entry["tensor_meta"]["sizes"])
        return found
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise ModelError(f"{path} is corrupt: {name} is not what torch.export.save writes ({e}); save it again") from e


def _text(archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> bytes:
    if member.file_size > MAX_TEXT_BYTES:
        raise ModelError(f"{path}: {member.filename} has {member.file_size} B, more than {MAX_TEXT_BYTES}")
    return archive.read(member)


def _safe_samples(data: bytes) -> bytes:
    """The example inputs where a reader of plain tensors takes them, else none: they can be made from the program."""
    import torch

    if not data or len(data) > MAX_TEXT_BYTES:
        return b""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as inner:
            if any(i.compress_type != zipfile.ZIP_STORED or i.file_size > len(data) for i in inner.infolist()):
                return b""
        torch.load(io.BytesIO(data), weights_only=True)
    except Exception:  # whatever is wrong with them, the program runs without
        return b""
    return data


def _copy(archive: zipfile.ZipFile, member: zipfile.ZipInfo, out: zipfile.ZipFile, name: str) -> None:
    with archive.open(member) as source, out.open(zipfile.ZipInfo(name), "w", force_zip64=True) as target:
        while chunk := source.read(1 << 24):
            target.write(chunk)


def _load(path: Path, said: Path) -> ExportedProgram:
    import torch

    try:
        return torch.export.load(path)
    except Exception as e:
        text = (str(e).strip() or type(e).__name__).splitlines()[0][:300]
        raise ModelError(f"{said} cannot be loaded by PyTorch {torch.__version__}: {text}; save it again") from e


def _runs_code(path: Path, what: str, kind: str) -> ModelError:
    return ModelError(
        f"{path} is not loaded: {what[:150]} is {kind}, and loading it can run any code. Two ways out: save the "
        "program again with plain tensors only; or, if you trust who made the file, say --trust (trust=True in Python)"
    )
