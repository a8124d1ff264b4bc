"""Flow matching for `retouch-mini`, in the three ways it is used: see `MODES`.

Documents are run once and their keys and values serve M edits each, with gradients through them: at 64 reference tokens and
some 25 masked ones, that more than halves the work of a sample.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import Flux2Transformer2DModel
from torch import Tensor
from transformers import Qwen2TokenizerFast, Qwen3ForCausalLM

from retouch.models import transformer as flux
from retouch.models.packing import cell_positions
from retouch.train.loop import Stage, train
from retouch.train.scenes import Batch, Scenes
from retouch.train.text import OUT_LAYERS, WIDTH

MODES = {"mask": 0.74, "all": 0.14, "joint": 0.12}
"""mask: noisy tokens inside the mask only, document as cached keys and values (what Retouch serves);
all: every token noisy, known ones re-noised, document as cached keys and values (FLUX.2-klein-KV);
joint: the same with the document in the sequence at the step's own timestep (FLUX.2-klein). Value: share of the batches."""

SHIFT = 5.0
"""Of the schedule, sigma = s u / (1 + (s - 1) u), in the checkpoint's scheduler and in the later part of training."""

FIRST_SHIFT, FIRST_SHARE = 2.0, 0.6112
"""Training begins with more of the low noise, until this share of its steps: there details are learned, and what is asked is
nearly given. Latents that are coarse first show their shapes already at a sigma of 0.85, so shapes are learned above that."""

SIZES = {(128, 128): 0.72, (128, 192): 0.05, (192, 128): 0.05, (256, 256): 0.14, (512, 512): 0.04}
"""(height, width) -> share of the batches."""

KNOWN = 0.25
"""Weight in the loss of a token that the mask leaves alone: it can be read off the document, and they are three in four."""

SPAN = 32
"""Cells along the longest side of a document. A smaller one is trained as lying anywhere within it."""

EDITS = {"mask": 8, "all": 4, "joint": 4}
"""Edits of each document in a batch; at 64 reference tokens, sharing them among eight leaves a step to the masked tokens."""

TOKENS = 2600
"""About how many tokens a step trains on; the number of documents follows from their size."""


def build_transformer(channels: int) -> Flux2Transformer2DModel:
    """4.2 M parameters: 1 double and 6 single blocks of width 192, rotary dimensions mostly on rows and columns."""
    model = Flux2Transformer2DModel(
        patch_size=1, in_channels=channels, num_layers=1, num_single_layers=6, attention_head_dim=64,
        num_attention_heads=3, joint_attention_dim=len(OUT_LAYERS) * WIDTH, timestep_guidance_channels=256, mlp_ratio=3.0,
        axes_dims_rope=(8, 24, 24, 8), rope_theta=2000, guidance_embeds=False,
    )  # fmt: skip
    heads = (model.double_stream_modulation_img, model.double_stream_modulation_txt, model.single_stream_modulation)
    for linear in (*(head.linear for head in heads), model.norm_out.linear, model.proj_out):
        torch.nn.init.zeros_(linear.weight)
    return model


@dataclass(frozen=True, slots=True)
class Noised:
    """What one training or distillation step sees: E = D * M edits.

    x, clean, noise (E, N, C); sigma (E,); valid (E, N) bool, false where padded; known (E, N) bool, true for tokens that
    the mask leaves alone; positions (E, N, 4).
    """

    x: Tensor
    clean: Tensor
    noise: Tensor
    sigma: Tensor
    valid: Tensor
    known: Tensor
    positions: Tensor

    def at(self, x: Tensor, sigma: Tensor) -> Noised:
        """The same edits further down: `x` (E, N, C) at `sigma` (E,)."""
        return replace(self, x=x, sigma=sigma)


def noised(batch: Batch, mode: str, sigma: Tensor, noise: torch.Generator, device: torch.device) -> Noised:
    docs, edits = batch.target.shape[:2]
    cells, inside = batch.cells, batch.inside
    count = batch.target.shape[2]
    if mode == "mask":
        index = cells[:, None, :, None].expand(-1, edits, -1, batch.target.shape[-1])
        clean, valid = batch.target.gather(2, index), inside
        known = torch.zeros_like(inside)
    else:
        clean, valid = batch.target, torch.ones(docs, count, dtype=torch.bool)
        known = torch.ones_like(valid).scatter_(1, cells, torch.where(inside, False, True))
        known.scatter_(1, cells[:, :1], False)
        cells = torch.arange(count).expand(docs, -1)
    clean = clean.flatten(0, 1)
    eps = torch.randn(clean.shape, generator=noise)
    weight = sigma[:, None, None]
    positions = cell_positions(cells, batch.grid[1], time=0) + batch.shift
    each = [t.repeat_interleave(edits, 0) for t in (valid, known, positions)]
    parts = (torch.lerp(clean, eps, weight), clean, eps, sigma, *each)
    return Noised(*(part.to(device) for part in parts))


class Velocity:
    """The model as training sees it: padded batches of D documents with M edits each."""

    def __init__(self, transformer: Flux2Transformer2DModel, encoder: Qwen3ForCausalLM, tokenizer: Qwen2TokenizerFast) -> None:
        self.transformer, self.encoder, self.tokenizer = transformer, encoder, tokenizer

    def prompts(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Embeddings (E, T, width) and which tokens are real, (E, T) bool; each distinct text is encoded once."""
        distinct = list(dict.fromkeys(texts))
        messages = [self.tokenizer.apply_chat_template([{"role": "user", "content": t}], tokenize=False) for t in distinct]
        tokens = self.tokenizer(messages, return_tensors="pt", padding=True).to(self.encoder.device)
        states = self.encoder.model(**tokens, output_hidden_states=True, use_cache=False).hidden_states
        embedded = torch.cat([states[layer] for layer in OUT_LAYERS], -1)
        index = torch.tensor([distinct.index(text) for text in texts], device=embedded.device)
        return embedded[index], tokens["attention_mask"].bool()[index]

    def __call__(
        self, batch: Batch, step: Noised, mode: str, text: tuple[Tensor, Tensor],
        keys: list[tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:  # fmt: skip
        """Velocity (E, N, C). `keys` are the documents' where they are known from an earlier call."""
        embedded, text_valid = text
        edits = batch.target.shape[1]
        document = batch.document.to(step.x.device)
        image, positions, valid = step.x, step.positions, step.valid
        if mode == "joint":
            keys = []
            image = torch.cat([image, document.repeat_interleave(edits, 0)], 1)
            positions = torch.cat([positions, _place(batch).to(image.device).expand(len(image), -1, -1)], 1)
            valid = F.pad(valid, (0, document.shape[1]), value=True)
        elif keys is None:
            keys = self.reference(batch, step.x.device)
        text_positions = torch.zeros(*embedded.shape[:2], 4, dtype=torch.int64, device=image.device)
        text_positions[..., 3] = torch.arange(embedded.shape[1], device=image.device)
        rope = flux.rope_of(self.transformer, torch.cat([text_positions, positions], 1))
        seen = torch.cat([text_valid, valid], 1)  # no token sees padding
        if keys:
            seen = F.pad(seen, (0, document.shape[1]), value=True)
        mask = None if bool(seen.all()) else seen[:, None, None]
        layout = Padded(embedded.shape[1], mask, keys, edits)
        modulation = flux.modulate_at(self.transformer, step.sigma)
        return flux.denoise(self.transformer, image, embedded, _broadcast(modulation), rope, layout)[:, : step.x.shape[1]]

    def reference(self, batch: Batch, device: torch.device) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of each layer, (D, R, heads, head_dim): self-attending, modulated at timestep 0."""
        layout = Padded()
        at_zero = flux.modulate_at(self.transformer, torch.zeros(1, device=device))
        rope = flux.rope_of(self.transformer, _place(batch).to(device))
        flux.encode_reference(self.transformer, batch.document.to(device), _broadcast(at_zero), rope, layout)
        return layout.seen


def _place(batch: Batch) -> Tensor:
    """Positions (R, 4) of the document as first reference."""
    return cell_positions(torch.arange(batch.document.shape[1]), batch.grid[1], time=10) + batch.shift


class Padded:
    """Layout of training: (edits, text + image tokens, ...), text first; `keys` of D documents serve `edits` rows each."""

    def __init__(
        self, text: int = 0, mask: Tensor | None = None, keys: list[tuple[Tensor, Tensor]] | None = None, edits: int = 1
    ) -> None:
        self.text, self.mask, self.keys, self.edits = text, mask, keys, edits
        self.seen: list[tuple[Tensor, Tensor]] = []

    def join(self, text: Tensor, image: Tensor, axis: int = -2) -> Tensor:
        return torch.cat([text, image], axis)

    def split(self, joined: Tensor) -> tuple[Tensor, Tensor]:
        return joined[:, : self.text], joined[:, self.text :]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.keys:
            of_document = (keys.repeat_interleave(self.edits, 0) for keys in self.keys[layer])
            k, v = (torch.cat(pair, 1) for pair in zip((k, v), of_document, strict=True))
        else:
            self.seen.append((k, v))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask).transpose(1, 2)


def _broadcast(modulation: flux.Modulation) -> flux.Modulation:
    return flux.Modulation(*(tuple(m.unsqueeze(1) for m in part) for part in modulation))


def pick(shares: dict, rng: np.random.Generator):  # type: ignore[no-untyped-def,type-arg]
    """One key of `shares`, by its share."""
    keys = list(shares)
    weights = np.array([shares[k] for k in keys], float)
    return keys[rng.choice(len(keys), p=weights / weights.sum())]


def draw(scenes: Scenes, rng: np.random.Generator, tokens: int = TOKENS) -> tuple[Batch, str]:
    """A batch of about `tokens` tokens and the mode it is trained in."""
    sizes = {size: share for size, share in SIZES.items() if size in scenes.by_size}
    size, mode = pick(sizes, rng), pick(MODES, rng)
    grid = size[0] // 16, size[1] // 16
    area, edits = grid[0] * grid[1], EDITS[mode]
    own = {"mask": min(0.35 * area, 40), "all": area, "joint": 2 * area}[mode]
    documents = max(1, round(tokens / (area + edits * (own + 8))))
    batch = scenes.batch(size, documents, rng, edits)
    row, column = (int(rng.integers(SPAN - side + 1)) for side in grid)
    return replace(batch, shift=torch.tensor([0, row, column, 0])), mode


def train_flow(
    transformer: Flux2Transformer2DModel, encoder: Qwen3ForCausalLM, tokenizer: Qwen2TokenizerFast, scenes: Scenes,
    stage: Stage, folder: Path, device: torch.device, sheet: Callable[[Path], None], seed: int = 0,
    first_share: float = FIRST_SHARE,
) -> None:  # fmt: skip
    """Train transformer and text encoder together, in place."""
    velocity = Velocity(transformer.to(device).train(), encoder.to(device).train(), tokenizer)

    def loss_of(drawn: tuple[Batch, str, float], noise: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        batch, mode, shift = drawn
        u = torch.rand(batch.target.shape[0] * batch.target.shape[1], generator=noise)
        sigma = shift * u / (1 + (shift - 1) * u)
        sigma[::8] = 1.0
        step = noised(batch, mode, sigma, noise, device)
        out = velocity(batch, step, mode, velocity.prompts(batch.prompts))
        error = (out - (step.noise - step.clean)).square().mean(-1)
        weight = torch.where(step.known, KNOWN, 1.0) * step.valid
        loss = (error * weight).sum() / weight.sum()
        return loss, {mode: float(loss.detach()), "documents": len(batch.document)}

    modules = torch.nn.ModuleDict({"transformer": transformer, "encoder": encoder})

    def batch_at(rng: np.random.Generator, done: float) -> tuple[Batch, str, float]:
        return *draw(scenes, rng), FIRST_SHIFT if done < first_share else SHIFT

    train(stage, modules, batch_at, loss_of, folder, sheet, seed)
