"""The vocabulary of `retouch-mini`: which stickers it learns, under which names, in which colours, and how they are asked for.

Pictures are Microsoft's Fluent 3D emoji (MIT), by codepoint, as `@lobehub/fluent-emoji-3d` packs them.
"""

from __future__ import annotations

import colorsys
import hashlib
from dataclasses import dataclass

import numpy as np

CODEPOINTS = {
    "red apple": "1f34e", "banana": "1f34c", "strawberry": "1f353", "watermelon": "1f349", "carrot": "1f955",
    "pumpkin": "1f383", "mushroom": "1f344", "pizza": "1f355", "doughnut": "1f369", "cat": "1f431", "panda": "1f43c",
    "frog": "1f438", "penguin": "1f427", "fish": "1f420", "butterfly": "1f98b", "ladybug": "1f41e", "crab": "1f980",
    "car": "1f697", "rocket": "1f680", "sailboat": "26f5", "house": "1f3e0", "tree": "1f333", "cactus": "1f335",
    "sunflower": "1f33b", "star": "2b50", "heart": "2764-fe0f", "balloon": "1f388", "gift": "1f381", "ball": "26bd",
    "snowman": "26c4",
}  # fmt: skip
"""Name in a prompt -> Unicode codepoint of its picture. As many as two cores can teach in an hour; a larger world is a longer
list."""

COLOURABLE = frozenset("car butterfly fish heart balloon mushroom".split())
"""Concepts of one dominant hue, which may be asked for in any colour."""

HUES = {"red": 0.99, "orange": 0.075, "yellow": 0.14, "green": 0.35, "blue": 0.60, "purple": 0.76, "pink": 0.91}

HELD_OUT = frozenset(name for name in CODEPOINTS if int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10 == 0)
"""About a tenth of all names by their hash, a fifth of these: never trained on, used to judge encoding and removal."""

SEEN = tuple(name for name in CODEPOINTS if name not in HELD_OUT)

REMOVE = ("remove the object", "remove it", "erase the object", "remove the {}", "erase the {}")
INSERT = ("{}", "a {}", "add a {}", "put a {} here", "insert a {}")
REPLACE = ("replace the {} with a {}", "turn the {} into a {}", "change it to a {1}", "a {1}")
RECOLOUR = ("make the {0} {1}", "turn the {0} {1}", "change the colour to {1}")


@dataclass(frozen=True, slots=True)
class Sticker:
    """A concept in a colour; `colour` is empty for the picture as it comes."""

    concept: str
    colour: str = ""

    @property
    def name(self) -> str:
        return f"{self.colour} {self.concept}".strip()


def caption(before: Sticker | None, after: Sticker | None, rng: np.random.Generator) -> str:
    """A prompt for the edit that turns `before` into `after` (None = nothing there)."""
    if after is None:
        return str(rng.choice(REMOVE)).format(before.concept if before else "object")
    if before is None:
        return _article(str(rng.choice(INSERT)), after.name)
    if before.concept == after.concept and after.colour:
        return str(rng.choice(RECOLOUR)).format(after.concept, after.colour)
    return _article(str(rng.choice(REPLACE)), before.concept, after.name)


def _article(template: str, *names: str) -> str:
    text = template.format(*names)
    for name in names:
        if name[0] in "aeiou":
            text = text.replace(f"a {name}", f"an {name}")
    return text


def recolour(sprite: np.ndarray, colour: str) -> np.ndarray:
    """Turn the hues of a sprite so that its dominant one becomes `colour`.

    `sprite`: (H, W, 4) uint8. Greys and skin of low saturation stay as they are.
    """
    from skimage.color import hsv2rgb, rgb2hsv

    hsv = rgb2hsv(sprite[..., :3])
    vivid = (hsv[..., 1] > 0.35) & (sprite[..., 3] > 128)
    weights, edges = np.histogram(hsv[..., 0][vivid], bins=36, range=(0, 1))
    dominant = edges[int(weights.argmax())] + 0.5 / 36
    distance = np.abs((hsv[..., 0] - dominant + 0.5) % 1 - 0.5)
    turn = (distance < 0.14) & (hsv[..., 1] > 0.15)
    hsv[..., 0] = np.where(turn, (hsv[..., 0] - dominant + HUES[colour]) % 1, hsv[..., 0])
    rgb = (hsv2rgb(hsv) * 255).round().astype(np.uint8)
    return np.dstack([rgb, sprite[..., 3]])


def hue_name(rgb: tuple[float, float, float]) -> str:
    """The colour name nearest to an RGB triple of 0 to 1."""
    hue = colorsys.rgb_to_hsv(*rgb)[0]
    return min(HUES, key=lambda name: abs((HUES[name] - hue + 0.5) % 1 - 0.5))
