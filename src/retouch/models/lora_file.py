"""Reading a LoRA file for one model: every key of it has a place there, in its shape, or it is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import convert_unet_state_dict_to_peft
from safetensors import safe_open
from torch import Tensor, nn

from retouch.edit import AdapterMismatch

HEADER = "lora_adapter_metadata"
"""Where diffusers keeps what peft was told of an adapter, in the file's header."""

OTHER_KINDS = {"dora_scale": "DoRA", "lora_magnitude_vector": "DoRA", "lokr_": "LoKr", "hada_": "LoHa", "diff": "full weights"}
"""Part of a key's end -> the kind of adapter that it belongs to."""


def read(path: Path, denoiser: nn.Module, pipeline: type) -> dict[str, tuple[Tensor, Tensor]]:
    """Module -> down (rank, in) and up (out, rank), the latter times alpha / rank.

    What is not in peft's form is brought into it by the loader of the diffusers pipeline. Raises AdapterMismatch, and OSError,
    ValueError or SafetensorError where the file is damaged.
    """
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  no mapping
        header = json.loads((file.metadata() or {}).get(HEADER, "{}"))
    if not tensors:
        raise AdapterMismatch(f"{path.name} is empty.")
    for key in tensors:
        last = key.removesuffix(".weight").rsplit(".", 1)[-1]
        for mark, kind in OTHER_KINDS.items():
            if last.startswith(mark):
                raise AdapterMismatch(f"{path.name} is a {kind} adapter ({key}); only plain LoRA is served.")
    prefix = str(getattr(pipeline, "transformer_name", None) or getattr(pipeline, "unet_name", "unet"))
    tensors, alphas = _in_peft_form(path, tensors, prefix, pipeline, denoiser)
    ours: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if key.startswith("text_encoder"):
            raise AdapterMismatch(f"{path.name} adapts the text encoder too ({key}); that is not served. Train it without.")
        if not key.startswith(f"{prefix}."):
            raise AdapterMismatch(f"{path.name} has {key}, which is no weight of a {prefix}; it is of another kind of model.")
        ours[key.removeprefix(f"{prefix}.")] = tensor
    layers = {name: layer for name, layer in denoiser.named_modules() if isinstance(layer, nn.Linear)}
    found = {}
    for key in ours:
        module, end = _split(key)
        if end not in ("lora_A.weight", "lora_B.weight", "alpha"):
            raise AdapterMismatch(f"{path.name} has {key}, which is no part of a LoRA ({end or 'no lora_A or lora_B'}).")
        if module not in layers:
            raise AdapterMismatch(f"{path.name} adapts {module}, no linear layer of this model; it is of another model.")
        found[module] = layers[module]
    if stray := sorted(alphas.keys() - found.keys()):
        raise AdapterMismatch(f"{path.name} has an alpha for {stray[0]}, but no weights; download it again.")
    return {module: _pair(path, module, layer, ours, alphas, _Told(header, prefix)) for module, layer in found.items()}


def _in_peft_form(
    path: Path, tensors: dict[str, Tensor], prefix: str, pipeline: Any, denoiser: Any
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Keys PREFIX.MODULE.lora_A.weight, and alphas by module. diffusers' converters raise whatever they like."""
    peft = all(key.startswith((f"{prefix}.", "text_encoder")) and _split(key)[1] for key in tensors)
    alphas: dict[str, Any] = {}
    if not peft:
        try:
            with_alphas = pipeline.lora_state_dict(dict(tensors), return_alphas=True, unet_config=denoiser.config)
            tensors, alphas = with_alphas if isinstance(with_alphas, tuple) else (with_alphas, {})
            if not any(".lora_A." in key for key in tensors):
                tensors = convert_unet_state_dict_to_peft(tensors)
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise AdapterMismatch(
                f"{path.name} is no LoRA that diffusers can read for a {pipeline.__name__} ({reason}); its first key is "
                f"{next(iter(tensors))}."
            ) from error
    named = convert_unet_state_dict_to_peft(alphas or {})
    return tensors, {_split(key.removeprefix(f"{prefix}."))[0]: float(value) for key, value in named.items()}


def _split(key: str) -> tuple[str, str]:
    """transformer_blocks.0.attn.to_q.lora_A.weight -> its module, and lora_A.weight."""
    for mark in (".lora_A.", ".lora_B.", ".alpha"):
        if mark in key:
            module, end = key.split(mark, 1)
            return module, (mark + end).strip(".").replace(".default.", ".")
    return key, ""


class _Told:
    """What the header says of an adapter's scale."""

    def __init__(self, header: dict[str, Any], prefix: str) -> None:
        self.said = {key.removeprefix(f"{prefix}."): value for key, value in header.items()}

    def alpha(self, module: str, rank: int) -> float:
        """As peft takes it: that of a pattern that the module's name ends with, else the common one, else the rank."""
        for pattern, alpha in (self.said.get("alpha_pattern") or {}).items():
            if f".{module}".endswith(f".{pattern.lstrip('^')}"):
                return float(alpha)
        return float(self.said.get("lora_alpha", rank))

    def divisor(self, rank: int) -> float:
        return rank**0.5 if self.said.get("use_rslora") else float(rank)


def _pair(
    path: Path, module: str, layer: nn.Linear, tensors: dict[str, Tensor], alphas: dict[str, float], told: _Told
) -> tuple[Tensor, Tensor]:
    parts = {}
    for key, tensor in tensors.items():
        if _split(key)[0] == module:
            parts[_split(key)[1]] = tensor
    for end in ("lora_A.weight", "lora_B.weight"):
        if end not in parts:
            raise AdapterMismatch(f"{path.name} lacks {module}.{end}; download it again.")
    down, up = parts["lora_A.weight"].float(), parts["lora_B.weight"].float()
    rank, shapes = len(down), f"{list(down.shape)} and {list(up.shape)}"
    if down.ndim != 2 or up.ndim != 2 or up.shape[1] != rank or rank == 0:
        raise AdapterMismatch(f"{path.name}: lora_A and lora_B of {module} are {shapes}, of no common rank; it is damaged.")
    if down.shape[1] != layer.in_features or up.shape[0] != layer.out_features:
        raise AdapterMismatch(
            f"{path.name}: lora_A and lora_B of {module} are {shapes}, where this model's layer goes from {layer.in_features} "
            f"to {layer.out_features}; it is of another model."
        )
    if "alpha" in parts:
        alpha = float(parts["alpha"])
    else:
        alpha = alphas.get(module, told.alpha(module, rank))
    scale = alpha / told.divisor(rank)
    if not (torch.isfinite(down).all() and torch.isfinite(up).all() and abs(scale) < float("inf")):
        raise AdapterMismatch(f"{path.name}: {module} has weights that are no finite numbers; it is damaged.")
    return down, up * scale
