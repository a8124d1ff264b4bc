"""The model card that every written checkpoint carries; `retouch train judge` fills in what was measured."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from retouch.train.concepts import COLOURABLE, HELD_OUT, HUES, SEEN
from retouch.train.flow import SIZES

JUDGED = "<!-- judged -->"
"""Stands before and after the section that the judge writes."""


def model_card(
    steps: int, parameters: dict[str, int], trained: dict[str, int], device: torch.device, start: str | None = None
) -> str:
    """README.md of a checkpoint. `parameters` by part, `trained` steps by stage on `device`, from `start`'s weights where it is
    given.
    """
    sizes = ", ".join(f"{name} {count / 1e6:.1f} M" for name, count in parameters.items())
    stages = ", ".join(f"{name} {count:,}" for name, count in trained.items())
    sides = sorted({side for size in SIZES for side in size})
    begun = "" if start is None else f", from the weights of an earlier {Path(start).name}"
    machine = f"CPU ({platform.machine()})" if device.type == "cpu" else str(device)
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else machine
    return f"""---
license: apache-2.0
library_name: diffusers
pipeline_tag: image-to-image
---
# retouch-mini

A small FLUX.2-klein-KV pipeline for image edits with masks: stickers on photos, insert, remove, replace, recolour. It is
there so that everything in Retouch runs and is measured on real weights on any machine. It is no general image model.

- **Parts**: {sizes}; bfloat16. 16 px a token.
- **Steps**: {steps}. **`text_encoder_out_layers`** (1, 2, 3), **`max_sequence_length`**: the prompt's own length, at most 64;
  prompts are not padded. `retouch.json` says so to Retouch; stock pipelines take both as arguments.
- **Trained on** {place}, documents of {sides[0]} to {sides[-1]} px, steps by stage: {stages}{begun}.
- **Used in three ways**: noisy tokens inside the mask with the document as cached reference (Retouch); all tokens with the
  cached reference (`Flux2KleinKVPipeline`); all tokens with the reference in the sequence (`Flux2KleinInpaintPipeline`).

```python
import torch
from diffusers import Flux2KleinKVPipeline

pipe = Flux2KleinKVPipeline.from_pretrained("retouch-mini", torch_dtype=torch.float32)
picture = pipe(
    "a red apple", image=photo, num_inference_steps={steps}, text_encoder_out_layers=(1, 2, 3), max_sequence_length=4
).images[0]
```

## What it knows

{len(SEEN)} concepts: {", ".join(SEEN)}.
In the colours {", ".join(HUES)}: {", ".join(sorted(COLOURABLE & set(SEEN)))}.
Held out, never seen: {", ".join(sorted(HELD_OUT))}.
Prompts: "a red apple", "remove the object", "replace the car with a cat", "make the car blue".

## Data

Stickers: Fluent emoji by Microsoft (MIT), as `@lobehub/fluent-emoji-3d` 1.1.0 packs them. Backgrounds: random crops of the
photos in Debian's `plasma-workspace-wallpapers` (LGPL-3, CC-BY-SA-4.0) and `mate-backgrounds` (GPL-2+, CC-BY-SA-4.0), colours
and gradients. None of the pictures is redistributed. Split by concept, by the hash of its name.

## Judged

{JUDGED}
Not judged yet: run `retouch train judge`.
{JUDGED}
"""
