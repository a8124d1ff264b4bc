"""One .safetensors file in the place of a pipeline's folders of weights.

A file has neither configs nor tokenizers nor a schedule, and often the weights of one part alone. All else is taken from a
`base`, the directory of a diffusers pipeline. diffusers' own `from_single_file` looks these things up on the hub, and lets keys
pass that do not fit; here its conversions of keys are used, nothing is looked up, and every key of the file is accounted for.

Weights stay views of the mapped file where they need no change (`mapped.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from diffusers.loaders import single_file_utils
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from retouch.edit import CheckpointMismatch
from retouch.models import flux1_keys

log = logging.getLogger(__name__)

Tensors = dict[str, Tensor]

PREFIXES = {
    "transformer": ("model.diffusion_model.", "diffusion_model.", "transformer."),
    "unet": ("model.diffusion_model.", "unet."),
    "vae": ("first_stage_model.", "vae."),
    "text_encoder": (
        "conditioner.embedders.0.transformer.", "cond_stage_model.transformer.", "cond_stage_model.model.",
        "text_encoders.clip_l.transformer.", "text_encoder.",
    ),
    "text_encoder_2": ("conditioner.embedders.1.model.", "text_encoders.t5xxl.transformer.", "text_encoder_2."),
}  # fmt: skip
"""What a part's keys begin with in files that hold several; those of a transformer or UNet may begin with nothing."""

KINDS = {
    "lora_": "a LoRA adapter (which goes into the folder of --adapters)", "joint_blocks.": "Stable Diffusion 3",
    "single_stream_modulation.": "FLUX.2", "distilled_guidance_layer.": "Chroma", "double_blocks.": "FLUX.1",
    "single_transformer_blocks.": "FLUX (keys of diffusers)", "transformer_blocks.0.img_mod.": "Qwen-Image",
    "conditioner.embedders.1.": "Stable Diffusion XL", "cond_stage_model.": "Stable Diffusion",
    "input_blocks.": "a Stable Diffusion UNet", "cap_embedder.": "Lumina or Z-Image", "head.modulation": "Wan",
    "patchify_proj.": "LTX-Video",
}  # fmt: skip
"""What a key with this in it shows its file to be, the more telling ones first."""

READ = (
    "FLUX.1, FLUX.2 and Stable Diffusion (XL) with the keys of their makers, and the transformer or UNet of any pipeline that "
    "is served with the keys of diffusers"
)

LEFT_OUT = (
    "model_ema.", "alphas_cumprod", "betas", "log_one_minus_alphas_cumprod", "sqrt_", "posterior_", "denoiser.sigmas",
    "scale_factor", "cond_stage_model.logit_scale", "cond_stage_model.model.logit_scale",
    "conditioner.embedders.1.model.logit_scale", "text_encoders.clip_l.logit_scale", "text_encoders.t5xxl.logit_scale",
    "text_encoders.clip_l.transformer.text_projection.weight",
)  # fmt: skip
"""Beginnings of keys of which a pipeline needs nothing: averages kept for training, the training's schedule, CLIP's scale
(bundles of FLUX.1 have one for T5 too), and its projection where a pipeline takes what comes before that.
"""

SCALES = ("weight_scale", "weight_scale_2", "input_scale", "scale_weight", "scale_input")
"""Endings of keys of weights in scaled 8 bits or fewer."""


def kind_of(names: Iterable[str]) -> str:
    """What a file with these keys is, as far as its keys say."""
    names = list(names)
    known = next((kind for mark, kind in KINDS.items() if any(mark in name for name in names)), None)
    return known or f"of an unknown architecture ({len(names):,} keys such as {min(names, default='none')})"


def names_of(file: Path) -> dict[str, list[int]]:
    """Keys and shapes, by the file's head alone. Raises CheckpointMismatch where it is damaged."""
    try:
        with safe_open(file, "pt") as tensors:
            return {key: tensors.get_slice(key).get_shape() for key in tensors.keys()}  # noqa: SIM118  no mapping
    except (OSError, SafetensorError) as error:
        raise CheckpointMismatch(f"{file} is damaged ({error}); download it again.") from error


def parts_of(names: Iterable[str], parts: Iterable[str]) -> dict[str, str]:
    """Which of a pipeline's `parts` a file holds, and what their keys begin with."""
    names, parts = list(names), list(parts)
    found = {}
    for part in parts:
        prefix = next((p for p in PREFIXES.get(part, ()) if any(name.startswith(p) for name in names)), None)
        if prefix is not None:
            found[part] = prefix
    denoiser = "unet" if "unet" in parts else "transformer"
    return found if denoiser in found else {**found, denoiser: ""}


def read(file: Path, base: Path, index: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The parts of `base`, whose model_index.json is `index`, that the file has weights of. Raises CheckpointMismatch."""
    shapes = names_of(file)
    held = parts_of(shapes, [part for part, value in index.items() if isinstance(value, list) and value[0] is not None])
    with safe_open(file, "pt") as tensors:
        left = {name: tensors.get_tensor(name) for name in shapes}
    modules = {}
    for part, prefix in sorted(held.items(), key=lambda item: -len(item[1])):  # what begins with nothing takes the rest
        of_part = {name: left.pop(name) for name in list(left) if name.startswith(prefix) and not _is_left_out(name)}
        library, name = index[part]
        kind = getattr(diffusers if library == "diffusers" else transformers, name)
        stored = {name.removeprefix(prefix): tensor for name, tensor in of_part.items()}
        modules[part] = _module(kind, base / part, stored, dtype, f"{file.name}, {part}", prefix)
    if extra := sorted(name for name in left if not _is_left_out(name)):
        raise _misfit(file.name, "keys have no place in the pipeline", extra)
    log.info("%s has %s; %d keys of training are left out", file.name, ", ".join(sorted(modules)), len(left))
    return modules


def _is_left_out(name: str) -> bool:
    return name.startswith(LEFT_OUT) or name in single_file_utils.SD_2_TEXT_ENCODER_KEYS_TO_IGNORE


def _module(kind: type, folder: Path, stored: Tensors, dtype: torch.dtype, where: str, prefix: str) -> Any:
    try:
        if issubclass(kind, PreTrainedModel):
            return _text_encoder(kind, folder, stored, dtype, where, prefix)
        return _diffusers_part(kind, folder, stored, dtype, where)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, IndexError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointMismatch(
            f"{where}: it is {kind_of(stored)}, and cannot be read as a {kind.__name__} with the config in {folder} "
            f"({reason}); give a --base of the same architecture."
        ) from error


def _diffusers_part(kind: Any, folder: Path, stored: Tensors, dtype: torch.dtype, where: str) -> nn.Module:
    with init_empty_weights():
        module: nn.Module = kind.from_config(kind.load_config(folder, local_files_only=True))
    wanted = module.state_dict()
    form = next((form for mark, form in FORMS.get(kind.__name__, {}).items() if any(mark in key for key in stored)), None)
    made, extra = (stored, []) if form is None else form(stored, module)
    counted = {key for key in wanted if not key.endswith("num_batches_tracked")}
    if 2 * len(counted & made.keys()) < len(counted):
        has = f"{len(counted & made.keys())} of {len(counted)} weights of the {kind.__name__} of {folder}"
        raise CheckpointMismatch(
            f"{where}: it is {kind_of(stored)}, with {has}. Read are {READ}; give a --base of the same architecture."
        )
    _check(where, sorted(counted - made.keys()), sorted(extra) + sorted(made.keys() - wanted.keys()), len(counted))
    if wrong := sorted(key for key in counted if made[key].shape != wanted[key].shape):
        shapes = f"{wrong[0]} ({list(made[wrong[0]].shape)}, there {list(wanted[wrong[0]].shape)})"
        raise _misfit(where, f"weights have another shape than the config in {folder} says", [shapes, *wrong[1:]])
    made = {key: _cast(made.get(key, wanted[key]), dtype) for key in wanted}
    module.load_state_dict(made, assign=True)
    return module.eval().requires_grad_(False)


def _text_encoder(
    kind: type[PreTrainedModel], folder: Path, stored: Tensors, dtype: torch.dtype, where: str, prefix: str
) -> PreTrainedModel:
    """transformers renames what files call by older names, and ties what is tied."""
    config = kind.config_class.from_pretrained(folder, local_files_only=True)
    extra: list[str] = []
    if any("transformer.resblocks." in key for key in stored):
        with init_empty_weights():
            stored, extra = _open_clip(stored, kind(config), prefix)
    stored = {key: tensor for key, tensor in stored.items() if not key.endswith("position_ids")}
    module, told = kind.from_pretrained(
        None, config=config, state_dict=stored, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
    )  # fmt: skip
    _check(where, sorted(told["missing_keys"]), extra + sorted(told["unexpected_keys"]), len(module.state_dict()))
    if wrong := sorted(str(found[0]) for found in told["mismatched_keys"]):
        raise _misfit(where, f"weights have another shape than the config in {folder} says", wrong)
    return module.eval()


def _check(where: str, missing: list[str], extra: list[str], count: int) -> None:
    if missing:
        raise _misfit(where, f"of {count} weights are missing", missing)
    if extra:
        raise _misfit(where, "keys have no place in the pipeline", extra)


def _misfit(where: str, what: str, names: list[str]) -> CheckpointMismatch:
    mend = "download it again, or give the --base that it belongs to."
    return CheckpointMismatch(f"{where}: {len(names)} {what}, first {names[0]}; {mend}")


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _unet(stored: Tensors, module: Any) -> tuple[Tensors, list[str]]:
    whole = {single_file_utils.LDM_UNET_KEY + key: tensor for key, tensor in stored.items()}
    return _moved(stored, single_file_utils.convert_ldm_unet_checkpoint(whole, module.config))


def _autoencoder(stored: Tensors, module: Any) -> tuple[Tensors, list[str]]:
    whole = {single_file_utils.LDM_VAE_KEYS[0] + key: tensor for key, tensor in stored.items()}
    return _moved(stored, single_file_utils.convert_ldm_vae_checkpoint(whole, module.config))


def _moved(stored: Tensors, made: Tensors) -> tuple[Tensors, list[str]]:
    """And which keys a conversion that copies nothing has dropped."""
    used = {tensor.data_ptr() for tensor in made.values()}
    return made, [key for key, tensor in stored.items() if tensor.numel() and tensor.data_ptr() not in used]


def _flux2(stored: Tensors, module: Any) -> tuple[Tensors, list[str]]:
    """The conversion would take scales for weights, and fail at their shape."""
    scales = [key for key in stored if key.endswith(SCALES)]
    plain = {key: tensor for key, tensor in stored.items() if key not in scales}
    return single_file_utils.convert_flux2_transformer_checkpoint_to_diffusers(plain), scales


class _Asked(Tensors):
    """Knows which of its keys were asked for."""

    def __init__(self, tensors: Tensors) -> None:
        super().__init__(tensors)
        self.asked: set[str] = set()

    def __getitem__(self, key: str) -> Tensor:
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)


def _open_clip(stored: Tensors, module: Any, prefix: str) -> tuple[Tensors, list[str]]:
    whole = _Asked({prefix + key: tensor for key, tensor in stored.items()})
    made = single_file_utils.convert_open_clip_checkpoint(module, whole, prefix)
    return made, sorted(key for key in whole if key not in whole.asked)


FORMS: dict[str, dict[str, Callable[[Tensors, Any], tuple[Tensors, list[str]]]]] = {
    "UNet2DConditionModel": {"input_blocks.": _unet},
    "AutoencoderKL": {"encoder.down.": _autoencoder},
    "FluxTransformer2DModel": {"double_blocks.": flux1_keys.renamed},
    "Flux2Transformer2DModel": {"double_blocks.": _flux2},
}
"""Class -> what its makers' keys have in them -> to diffusers' keys, and the keys that are not of it."""
