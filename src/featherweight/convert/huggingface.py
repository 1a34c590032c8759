"""Local Hugging Face folders as sources of a conversion.

Only `config.json` and safetensors are read, never the network, code of the folder (`auto_map`) or a pickle. The class
is one of transformers' own, by the name in `architectures`. Encoders, classifiers of sequences and tokens, question
answering, small decoders without a cache, and image classifiers; computed in float32.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from featherweight.convert import extras, sentence
from featherweight.convert.axes import BATCH, SEQUENCE, Axes
from featherweight.convert.causes import first_line
from featherweight.convert.export import Source, quiet
from featherweight.convert.folder import Folder
from featherweight.core import Note
from featherweight.errors import ModelError

EXAMPLE_LENGTH = 12
_SKIPPED_OUTPUTS = ("loss", "past_key_values", "hidden_states", "attentions", "cross_attentions", "router_logits")


def from_folder(path: Path) -> Source:
    """The model of a folder, ready to convert. Raises ModelError with what is missing or not allowed."""
    transformers = extras.transformers(f"reading {path}")
    folder = Folder.of(path)
    heads = sentence.heads(folder)
    module, lacking, notes = _load(transformers, folder)
    examples, axes = _examples(module, folder)
    wrapped: torch.nn.Module = Named(module, tuple(examples), drop_pooler=any("pooler" in k for k in lacking))
    if heads is not None:
        wrapped = sentence.Sentence(wrapped, heads)
    return Source(path.name or str(path), ((), examples), module=wrapped, prefix=_prefix(heads), notes=notes, axes=axes)


def _prefix(heads: object) -> str:
    return "inner.model." if heads is not None else "model."


def _load(transformers: Any, folder: Folder) -> tuple[torch.nn.Module, tuple[str, ...], tuple[Note, ...]]:
    """The module with all its weights, names of weights that may be absent, and what the user should know."""
    options = {"local_files_only": True, "trust_remote_code": False}
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    try:
        with quiet():
            config = transformers.AutoConfig.from_pretrained(folder.path, **options)
            kind = _class(transformers, config, folder)
            module, found = kind.from_pretrained(
                folder.path, config=config, dtype=torch.float32, use_safetensors=True, attn_implementation="eager",
                output_loading_info=True, local_files_only=True,
            )  # fmt: skip
    except ModelError:
        raise
    except Exception as e:
        raise ModelError(
            f"{folder.path} cannot be read by transformers {transformers.__version__}: {first_line(e)}"
        ) from e
    finally:
        transformers.logging.set_verbosity(level)
    missing = sorted(str(k) for k in found.get("missing_keys", ()))
    needed = [k for k in missing if "pooler" not in k or "pooled" in k or _classifies(kind)]
    if needed:
        more = f" and {len(needed) - 1} more" if len(needed) > 1 else ""
        raise ModelError(
            f"{folder.path} lacks the weight {needed[0]!r}{more} of {kind.__name__}, which would be random; "
            "give the folder of the finished model"
        )
    if found.get("mismatched_keys"):
        raise ModelError(
            f"{folder.path}: the sizes of weights contradict config.json: {next(iter(found['mismatched_keys']))}"
        )
    notes = []
    unused = sorted(str(k) for k in found.get("unexpected_keys", ()) if not str(k).endswith("position_ids"))
    if unused:
        notes.append(
            Note(folder.path.name, f"{len(unused)} stored tensors are not used by {kind.__name__}: {unused[0]}")
        )
    if folder.stored_half:
        notes.append(Note(folder.path.name, f"stored in {folder.stored_half}, computed in float32"))
    return module.eval(), tuple(missing), tuple(notes)


def _classifies(kind: type) -> bool:
    return "For" in kind.__name__


def _class(transformers: Any, config: Any, folder: Folder) -> Any:
    """The model class that the folder names, which must be one of transformers' own."""
    name = (folder.config.get("architectures") or [""])[0]
    found = getattr(transformers, str(name), None) if name else transformers.AutoModel
    is_model = isinstance(found, type) and (
        found is transformers.AutoModel or issubclass(found, transformers.PreTrainedModel)
    )
    if found is None or not is_model:
        raise ModelError(
            f"{folder.path} names the architecture {name!r}, which transformers {transformers.__version__} lacks"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{folder.path} is an encoder and a decoder ({name}), which are two graphs; convert it with optimum "
            "(package optimum-onnx: optimum-cli export onnx) and compress its parts"
        )
    return found


def _examples(module: Any, folder: Folder) -> tuple[dict[str, torch.Tensor], Axes]:
    """Inputs by name, and their open axes."""
    config = module.config
    accepted = inspect.signature(module.forward).parameters
    rng = torch.Generator().manual_seed(0)
    if getattr(module, "main_input_name", "input_ids") == "pixel_values":
        size = config.image_size if isinstance(config.image_size, list | tuple) else [config.image_size] * 2
        pixels = torch.randn(2, int(getattr(config, "num_channels", 3)), *map(int, size), generator=rng)
        return {"pixel_values": pixels}, {"pixel_values": {0: BATCH}}
    if "input_ids" not in accepted:
        raise ModelError(
            f"{folder.path} takes {next(iter(accepted))!r}; only models of text and of images are converted"
        )
    longest = int(getattr(config, "max_position_embeddings", None) or EXAMPLE_LENGTH)
    length = max(2, min(EXAMPLE_LENGTH, longest - 2))
    ids = torch.randint(0, config.get_text_config().vocab_size, (2, length), generator=rng)
    pad = getattr(config, "pad_token_id", None)
    if isinstance(pad, int):
        ids[ids == pad] = (pad + 1) % config.vocab_size
    mask = torch.ones_like(ids)
    mask[1, -(length // 4 or 1) :] = 0
    if isinstance(pad, int) and 0 <= pad < config.vocab_size:
        ids[mask == 0] = pad
    found = {"input_ids": ids}
    if "attention_mask" in accepted:
        found["attention_mask"] = mask
    if "token_type_ids" in accepted and int(getattr(config, "type_vocab_size", 0) or 0) > 1:
        found["token_type_ids"] = torch.zeros_like(ids)
    return found, {name: {0: BATCH, 1: SEQUENCE} for name in found}


class Named(torch.nn.Module):
    """A transformers model whose outputs are a plain mapping of the tensors that inference needs."""

    def __init__(self, model: Any, inputs: tuple[str, ...], *, drop_pooler: bool) -> None:
        super().__init__()
        self.model = model
        self._fixed = {"return_dict": True}
        accepted = inspect.signature(model.forward).parameters
        if "use_cache" in accepted:
            self._fixed["use_cache"] = False
        self._skipped = (*_SKIPPED_OUTPUTS, *(("pooler_output",) if drop_pooler else ()))
        self._inputs = inputs

    def forward(
        self, input_ids: Any = None, attention_mask: Any = None, token_type_ids: Any = None, pixel_values: Any = None
    ) -> dict[str, torch.Tensor]:
        """Outputs by name."""
        every = {
            "input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids,
            "pixel_values": pixel_values,
        }  # fmt: skip
        found: Mapping[str, Any] = self.model(**{n: every[n] for n in self._inputs}, **self._fixed)
        return {k: v for k, v in found.items() if k not in self._skipped and isinstance(v, torch.Tensor)}
