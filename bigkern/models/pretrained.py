"""Weights that others trained: Hugging Face's folders of config.json and model.safetensors, read without their code.

A model that can take them says, parameter by parameter, which of the file's tensors it is made of (``Source``).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLE = "pytorch_model.bin"
# https://huggingface.co/docs/safetensors: the dtypes that torch has as well
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class Source(NamedTuple):
    """Where a parameter comes from: the tensors of these names, one below the other, then transposed if asked."""

    names: tuple[str, ...]
    transposed: bool = False

    def read(self, weights: Mapping[str, Tensor]) -> Tensor:
        tensor = torch.cat([weights[name] for name in self.names]) if len(self.names) > 1 else weights[self.names[0]]
        return tensor.t() if self.transposed else tensor


def layer_sources(ours: str, theirs: str, *, transposed: bool = False) -> dict[str, Source]:
    """Weight and bias of one layer."""
    return {
        f"{ours}.weight": Source((f"{theirs}.weight",), transposed),
        f"{ours}.bias": Source((f"{theirs}.bias",)),
    }


def read_config(directory: str | Path, model_type: str) -> dict[str, Any]:
    """config.json of a folder, checked to describe a ``model_type``."""
    path = Path(directory) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{directory}: no config.json there; expected a folder that save_pretrained wrote") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    found = config.get("model_type") if isinstance(config, dict) else None
    if found != model_type:
        raise ValueError(f"{path}: describes a model of type {found!r}; this class loads {model_type!r}")
    return config


def check_options(path: str | Path, config: dict[str, Any], supported: Mapping[str, Iterable[Any]]) -> None:
    """Refuses a configuration that asks for what this model does not do; an absent option has its default, the first.

    Loading its weights all the same would give a model that answers, wrongly.
    """
    for name, values in supported.items():
        values = tuple(values)
        if (found := config.get(name, values[0])) not in values:
            allowed = " or ".join(map(repr, values))
            raise ValueError(f"{path}: its config has {name} = {found!r}; supported is {allowed}")


def options(path: str | Path, config: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The constructor's arguments that the configuration holds: {ours: theirs}."""
    missing = [theirs for theirs in names.values() if theirs not in config]
    if missing:
        raise ValueError(f"{path}: its config lacks {', '.join(missing)}")
    return {ours: config[theirs] for ours, theirs in names.items()}


def read_weights(directory: str | Path) -> dict[str, Tensor]:
    """All tensors of a folder by name: model.safetensors, whole or in parts, or else pytorch_model.bin.

    The tensors of safetensors files are views of the file, mapped into memory. Of pytorch_model.bin torch's reader for
    tensors alone is used, which runs no code of the file's.
    """
    directory = Path(directory)
    if (directory / WEIGHTS).is_file():
        return read_safetensors(directory / WEIGHTS)
    if (directory / _INDEX).is_file():
        try:
            parts = sorted(set(json.loads((directory / _INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{directory / _INDEX}: not an index of safetensors files") from error
        weights: dict[str, Tensor] = {}
        for part in parts:
            if Path(part).name != part:
                raise ValueError(f"{directory / _INDEX}: names {part!r}, a file outside its folder")
            weights.update(read_safetensors(directory / part))
        return weights
    path = directory / _PICKLE
    if not path.is_file():
        raise ValueError(f"{directory}: no weights there; expected {WEIGHTS}, {_INDEX} or {_PICKLE}")
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # Foreign bytes make torch's reader fail in more ways than it documents.
        raise ValueError(f"{path}: not a file of tensors alone, or a damaged one; {WEIGHTS} is safer") from error
    if not isinstance(weights, dict) or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise ValueError(f"{path}: not a state_dict")
    return weights


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file: 8 bytes with the header's length, a JSON header, the tensors' bytes."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    try:
        if size < 8:
            raise ValueError("shorter than its header")
        data = torch.from_file(str(path), size=size, dtype=torch.uint8)
        start = 8 + int.from_bytes(bytes(data[:8].tolist()), "little")
        if start > size:
            raise ValueError("shorter than its header")
        header = json.loads(bytes(data[8:start].tolist()))
        header.pop("__metadata__", None)
        return {name: _tensor(data[start:], **entry) for name, entry in header.items()}
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"{path}: not a safetensors file, or a damaged one ({error})") from error


def _tensor(data: Tensor, dtype: str, shape: list[int], data_offsets: list[int]) -> Tensor:
    begin, end = data_offsets
    kind = _DTYPES[dtype]
    if not 0 <= begin <= end <= len(data) or end - begin != math.prod(shape) * kind.itemsize:
        raise ValueError(f"a tensor of shape {shape} and {dtype} at bytes {begin} to {end} of {len(data)}")
    part = data[begin:end]
    # A view as another type must start at a multiple of the type's size.
    part = part.clone() if part.storage_offset() % kind.itemsize else part
    return part.view(kind).view(shape)


def load(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    sources: Mapping[str, Source],
    *,
    where: str | Path,
    drawn: tuple[str, ...] = (),
) -> None:
    """Gives each parameter of ``model`` its values from ``weights``; all must be there, and nothing may be left over.

    ``drawn`` are parameters that keep the values they have.
    """
    wanted = {name for source in sources.values() for name in source.names}
    for what, names in (("missing", wanted - weights.keys()), ("unexpected", weights.keys() - wanted)):
        if names:
            shown = ", ".join(sorted(names)[:5]) + (", ..." if len(names) > 5 else "")
            raise ValueError(f"{where}: {len(names)} {what} tensor{'s' * (len(names) > 1)}: {shown}")
    own = model.state_dict()
    assert own.keys() == sources.keys() | set(drawn), own.keys() ^ (sources.keys() | set(drawn))
    state = {}
    for key, source in sources.items():
        try:
            state[key] = source.read(weights)
        except RuntimeError as error:
            raise ValueError(f"{where}: {', '.join(source.names)} do not fit together: {error}") from error
        if state[key].shape != own[key].shape:
            raise ValueError(
                f"{where}: {', '.join(source.names)}: shape {tuple(state[key].shape)}, the config says "
                f"{tuple(own[key].shape)}"
            )
    model.load_state_dict(state, strict=False)
