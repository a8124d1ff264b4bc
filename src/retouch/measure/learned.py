"""Measures that need weights, for whoever has them: LPIPS, the CLIP score, the bundled concepts' judge. None is fetched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from retouch.edit import InvalidOption
from retouch.measure.cases import Case
from retouch.measure.zones import SEAM, box_of, cut, mirrored
from retouch.train.classifier import Classifier, tile, train_classifier
from retouch.train.data import Source

ALEXNET = ((11, 4, 2), (5, 1, 2), (3, 1, 1), (3, 1, 1), (3, 1, 1))
"""Kernel, stride and padding of its convolutions; a maximum over 3 x 3 with stride 2 stands before the second and the third."""

LPIPS_SIDE = 64
CLIP_MEAN, CLIP_SPREAD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Learned:
    """A `quality.Look`. `lpips` are two files, AlexNet's weights as torchvision saves them and the linear layers of LPIPS 0.1;
    `clip` is a folder of transformers' CLIPModel with its tokenizer; `judge` a folder with the classifier that `retouch train
    judge` has finished. Raises InvalidOption.
    """

    def __init__(self, lpips: tuple[Path, Path] | None = None, clip: Path | None = None, judge: Path | None = None) -> None:
        self.lpips = None if lpips is None else Lpips(*lpips)
        self.clip = None if clip is None else Clip(clip)
        self.judge = None if judge is None else _judge(judge)

    def __call__(self, case: Case, shown: np.ndarray) -> tuple[dict[str, float], bool | None]:
        found: dict[str, float] = {}
        box = box_of(case.mask, SEAM)
        if self.lpips is not None:
            found["lpips"] = self.lpips(cut(case.truth, box), cut(shown, box))
        if self.clip is not None:
            found["clip"] = self.clip(cut(shown, box), case.edit.prompt)
        right = None
        if self.judge is not None and case.concept:
            best = self.judge.ranked(np.array(tile(shown, case.mask))[None])[0, 0]
            right = self.judge.names[int(best)] == case.concept
        return found, right


class Lpips:
    """0 for the same picture; higher is further apart. Zhang et al., The unreasonable effectiveness of deep features as a
    perceptual metric, 2018, version 0.1 on AlexNet.
    """

    def __init__(self, backbone: Path, linear: Path) -> None:
        weights, scales = _weights(backbone), _weights(linear)
        try:
            self.layers = [(weights[f"features.{at}.weight"], weights[f"features.{at}.bias"]) for at in (0, 3, 6, 8, 10)]
            self.linear = [scales[f"lin{at}.model.1.weight"] for at in range(5)]
        except KeyError as error:
            raise InvalidOption(f"{backbone} and {linear} are not AlexNet's and LPIPS 0.1's: {error} is missing.") from error

    @torch.inference_mode()
    def __call__(self, truth: np.ndarray, answer: np.ndarray) -> float:
        features = [self._features(mirrored(pixels, LPIPS_SIDE)) for pixels in (truth, answer)]
        apart = 0.0
        for one, other, linear in zip(*features, self.linear, strict=True):
            apart += float(F.conv2d((one - other) ** 2, linear).mean())
        return apart

    def _features(self, pixels: np.ndarray) -> list[Tensor]:
        """Of each layer, of length 1 at each place."""
        shift, scale = (torch.tensor(three).view(1, 3, 1, 1) for three in ((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)))
        values = (_planes(pixels) * 2 - 1 - shift) / scale
        found = []
        for at, ((weight, bias), (_, stride, padding)) in enumerate(zip(self.layers, ALEXNET, strict=True)):
            if at in (1, 2):
                values = F.max_pool2d(values, 3, 2)
            values = F.relu(F.conv2d(values, weight, bias, stride, padding))
            found.append(values / (values.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return found


class Clip:
    """100 x the cosine between a picture and a prompt, not below 0. Hessel et al., CLIPScore, 2021, without its factor 2.5."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer, CLIPModel

        try:
            self.model = CLIPModel.from_pretrained(folder, local_files_only=True).eval()
            self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise InvalidOption(f"{folder} is no folder of a CLIPModel with its tokenizer: {error}") from error

    @torch.inference_mode()
    def __call__(self, shown: np.ndarray, prompt: str) -> float:
        side = self.model.config.vision_config.image_size
        scaled = np.asarray(Image.fromarray(np.ascontiguousarray(shown)).resize((side, side), Image.Resampling.BICUBIC))
        mean, spread = (torch.tensor(three).view(1, 3, 1, 1) for three in (CLIP_MEAN, CLIP_SPREAD))
        words: Any = self.tokenizer(prompt, return_tensors="pt", truncation=True, max_length=77)
        out = self.model(pixel_values=(_planes(scaled) - mean) / spread, **words)
        return max(0.0, 100 * float(F.cosine_similarity(out.image_embeds, out.text_embeds)))


def _planes(pixels: np.ndarray) -> Tensor:
    """(H, W, 3) uint8 -> (1, 3, H, W) in 0..1."""
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None].float() / 255


def _weights(path: Path) -> dict[str, Tensor]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and pickle raise anything on strange bytes
        raise InvalidOption(f"{path} cannot be read as weights: {type(error).__name__} {error}") from error
    if not isinstance(loaded, dict):
        raise InvalidOption(f"{path} holds a {type(loaded).__name__}; give a state dictionary.")
    return loaded


def _judge(folder: Path) -> Classifier:
    def untrained() -> Source:
        raise InvalidOption(f"there is no finished judge in {folder}; `retouch train judge --work {folder}` makes one.")

    return train_classifier(untrained, folder, torch.device("cpu"))
