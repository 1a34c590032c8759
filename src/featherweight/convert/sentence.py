"""Sentence encoders (`modules.json`): pooling, dense layers and normalisation after the transformer.

The four ways of pooling and the file format are those of sentence-transformers (Reimers and Gurevych, 2019,
arXiv:1908.10084), read from its configuration; that package is not needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from featherweight.convert.folder import Folder, inside, read_json
from featherweight.errors import ModelError

_WAYS = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "lasttoken")
_SHORT = {"cls": "cls_token", "mean": "mean_tokens", "max": "max_tokens"}
_ACTIVATIONS = {
    "torch.nn.modules.activation.Tanh": torch.nn.Tanh,
    "torch.nn.modules.linear.Identity": torch.nn.Identity,
    "torch.nn.modules.activation.ReLU": torch.nn.ReLU,
    "torch.nn.modules.activation.GELU": torch.nn.GELU,
}


@dataclass(frozen=True)
class Heads:
    """What follows the transformer: ways of pooling (joined), dense layers, and whether vectors get length 1."""

    ways: tuple[str, ...]
    dense: tuple[torch.nn.Module, ...] = ()
    normalise: bool = False


def heads(folder: Folder) -> Heads | None:
    """The modules after the first; None where the folder is no sentence encoder. Raises ModelError for unknown ones."""
    if not folder.modules:
        return None
    ways: tuple[str, ...] = ()
    dense: list[torch.nn.Module] = []
    normalise = False
    for module in folder.modules[1:]:
        kind = str(module.get("type", "")).rpartition(".")[2]
        where = inside(folder.outer, str(module.get("path", "")))
        if kind == "Pooling":
            ways = _ways(read_json(where / "config.json"), folder)
        elif kind == "Dense":
            dense.append(_dense(where))
        elif kind == "Normalize":
            normalise = True
        else:
            raise ModelError(
                f"{folder.outer} has a module {kind!r} that is not known here (Pooling, Dense, Normalize are)"
            )
    if not ways:
        return None
    return Heads(ways, tuple(dense), normalise)


def _ways(config: Any, folder: Folder) -> tuple[str, ...]:
    found = tuple(
        k.removeprefix("pooling_mode_") for k, v in config.items() if k.startswith("pooling_mode_") and v is True
    )
    named = config.get("pooling_mode")
    if not found and isinstance(named, str):
        found = tuple(
            {"cls": "cls_token", "mean": "mean_tokens", "max": "max_tokens"}.get(n, n) for n in named.split("+")
        )
    unknown = [w for w in found if w not in _WAYS]
    if unknown or not found:
        raise ModelError(f"{folder.outer} pools by {unknown or 'nothing'}; known are {', '.join(_WAYS)}")
    return found


def _dense(where: Any) -> torch.nn.Module:
    from safetensors.torch import load_file

    config = read_json(where / "config.json")
    name = str(config.get("activation_function", "torch.nn.modules.linear.Identity"))
    if name not in _ACTIVATIONS:
        raise ModelError(f"{where} has the activation {name!r}; known are {', '.join(_ACTIVATIONS)}")
    file = where / "model.safetensors"
    if not file.is_file():
        raise ModelError(f"{where} holds no model.safetensors; save the sentence encoder again with safetensors")
    layer = torch.nn.Linear(
        int(config["in_features"]), int(config["out_features"]), bias=bool(config.get("bias", True))
    )
    layer.load_state_dict({k.removeprefix("linear."): v.float() for k, v in load_file(file).items()})
    return torch.nn.Sequential(layer, _ACTIVATIONS[name]())


class Sentence(torch.nn.Module):
    """A transformer and its heads: one output, `sentence_embedding` (batch, features)."""

    def __init__(self, inner: torch.nn.Module, heads: Heads) -> None:
        super().__init__()
        self.inner = inner
        self._ways, self._normalise = heads.ways, heads.normalise
        self.dense = torch.nn.Sequential(*heads.dense)

    def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any = None) -> dict[str, torch.Tensor]:
        """The sentence vectors."""
        tokens = self.inner(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)
        states = tokens["last_hidden_state"]
        mask = attention_mask.unsqueeze(-1).to(states.dtype)
        vectors = torch.cat([_pool(way, states, mask) for way in self._ways], dim=1)
        vectors = self.dense(vectors)
        if self._normalise:
            vectors = torch.nn.functional.normalize(vectors, p=2.0, dim=1)
        return {"sentence_embedding": vectors}


def _pool(way: str, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(batch, sequence, features) and (batch, sequence, 1) to (batch, features)."""
    if way == "cls_token":
        return states[:, 0]
    if way == "max_tokens":
        return states.masked_fill(mask == 0, torch.finfo(states.dtype).min).amax(1)
    if way == "lasttoken":
        last = mask.squeeze(-1).cumsum(1).argmax(1)
        return states.gather(1, last[:, None, None].expand(-1, 1, states.shape[2])).squeeze(1)
    total, count = (states * mask).sum(1), mask.sum(1).clamp(min=1e-9)
    return total / (count.sqrt() if way == "mean_sqrt_len_tokens" else count)
