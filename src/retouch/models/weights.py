"""Whether the weights in a part's folder are those of its module: loaders only warn of what is missing or too much."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

from diffusers import ModelMixin
from torch import nn
from transformers import PreTrainedModel

from retouch.edit import CheckpointMismatch
from retouch.models import single_file

log = logging.getLogger(__name__)

NAMES = {"diffusers": "diffusion_pytorch_model.safetensors", "transformers": "model.safetensors"}
"""Library -> the file that its loader reads; an index of shards is called so too, with `.index.json` behind it."""

SHOWN = 3
"""How many of several names an error or a warning has."""


def files_of(folder: Path, library: str) -> list[Path]:
    """The files that `library` reads of a part: one, or the shards of its index. Variants and whatever else lies there are not
    read. What is neither diffusers' nor transformers' own (a safety checker) is transformers'.

    Raises CheckpointMismatch where there are none, or their index cannot be read.
    """
    single = folder / NAMES["diffusers" if library == "diffusers" else "transformers"]
    index = single.with_name(f"{single.name}.index.json")
    first, second = (index, single) if library == "diffusers" else (single, index)
    chosen = next((path for path in (first, second) if is_there(path)), None)
    if chosen is None:
        others = ", ".join(sorted(path.name for path in folder.glob("*.safetensors"))[:SHOWN])
        raise CheckpointMismatch(
            f"{folder} has no {single.name} and no index of shards{others and f', only {others}'}; download the checkpoint "
            "again, with its weights."
        )
    return [chosen] if chosen == single else _shards(index)


def is_there(path: Path) -> bool:
    """Whether there is such a file. Raises CheckpointMismatch where that cannot be told: its folder may not be read."""
    try:
        return path.is_file()
    except OSError as error:
        raise CheckpointMismatch(f"{path} may not be looked for ({error.strerror}); check its folder's permissions.") from error


def _shards(index: Path) -> list[Path]:
    try:
        placed = json.loads(index.read_text())["weight_map"]
        shards = [index.parent / name for name in sorted(set(placed.values()))]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointMismatch(f"{index} is no index of shards ({error!r}); download it again.") from error
    if lacking := [shard.name for shard in shards if not is_there(shard)]:
        raise CheckpointMismatch(f"{index.parent} lacks {lacking[0]}, which {index.name} names; download it again.")
    return shards


def check(folder: Path, module: nn.Module, library: str) -> None:
    """Refuse weights that are missing, of another shape, or have no place in the module. Raises CheckpointMismatch.

    A text encoder of transformers may come with heads that its class leaves out: what it has too much is named in the log.
    """
    files = files_of(folder, library)
    stored: dict[str, list[int]] = {}
    for file in files:
        stored |= single_file.names_of(file)
    if isinstance(module, PreTrainedModel):
        stored = _renamed(stored, module)
    elif isinstance(module, ModelMixin) and len(files) == 1:  # as diffusers renames older autoencoders' attention
        module._fix_state_dict_keys_on_load(stored)
    tied = set(getattr(module, "_tied_weights_keys", None) or ())
    held = {k: list(v.shape) for k, v in module.state_dict().items()}
    wanted = {k: shape for k, shape in held.items() if k not in tied and not k.endswith("num_batches_tracked")}
    if missing := sorted(set(wanted) - set(stored)):
        raise CheckpointMismatch(
            f"{folder} lacks {len(missing)} of {len(wanted)} weights, first {missing[0]}; download it again."
        )
    if wrong := [k for k, shape in wanted.items() if stored[k] != shape]:
        raise CheckpointMismatch(
            f"{folder}: {wrong[0]} is {stored[wrong[0]]}, its config says {wanted[wrong[0]]}; they do not belong together."
        )
    if extra := _extra(set(stored) - set(held) - tied, module):
        some = ", ".join(extra[:SHOWN]) + (", ..." if len(extra) > SHOWN else "")
        if not isinstance(module, PreTrainedModel):
            raise CheckpointMismatch(
                f"{folder} has {len(extra)} weights that a {type(module).__name__} of its config has no place for: {some}; "
                "its files and its config.json do not belong together. Download it again."
            )
        log.warning("%s: %d weights that a %s has not are left out: %s", folder, len(extra), type(module).__name__, some)


def _extra(names: set[str], module: nn.Module) -> list[str]:
    """Those that are not left out on purpose: buffers that are made anew, and what the module's class says it ignores."""
    buffers = {name for name, _ in module.named_buffers()}
    patterns = list(getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ())
    patterns += [r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$"] if isinstance(module, PreTrainedModel) else []
    return sorted(name for name in names - buffers if not any(re.search(pattern, name) for pattern in patterns))


def _renamed(stored: dict[str, list[int]], module: PreTrainedModel) -> dict[str, list[int]]:
    """Files name some weights as older releases of transformers did; from_pretrained renames them so."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    rules = [rule for rule in get_model_conversion_mapping(module) if isinstance(rule, WeightRenaming)]
    names = module.state_dict()
    return {rename_source_key(key, rules, [], module.base_model_prefix, names)[0]: shape for key, shape in stored.items()}
