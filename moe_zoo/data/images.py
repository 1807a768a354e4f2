"""Real images that come inside a package: scikit-learn's 1,797 handwritten digits of 8 x 8 pixels (UCI; BSD), alone or
at random scale and place on a canvas cut out of its two photographs.

N images, H x W pixels. Pixels are uint8, one channel.
"""

import dataclasses

import numpy as np
from jaxtyping import Float, UInt8

from moe_zoo.core.registry import ConfigError
from moe_zoo.core.schema import join, positive
from moe_zoo.data.errors import DataError, MissingPackageError
from moe_zoo.data.labelled import Labelled

CLASSES = tuple("0123456789")


@dataclasses.dataclass(frozen=True)
class DigitsConfig:
    """Nothing to set."""


class Digits:
    """The digits as they are, `images` [N, 8, 8, 1]."""

    Config = DigitsConfig

    def __init__(self, config: DigitsConfig):
        self.config = config

    def load(self) -> Labelled:
        """All of them."""
        digits, labels = _digits()
        images = np.rint(digits[..., None] * 255).astype(np.uint8)
        return Labelled({"images": images}, labels, CLASSES, np.arange(len(labels)))


@dataclasses.dataclass(frozen=True)
class ClutteredConfig:
    """`canvas`: pixels of a side; the digit's side is a whole number of them from `smallest` to `largest`, and every
    digit is pasted `copies` times. The background is a cut of a photograph, its light scaled to at most `clutter`.
    """

    canvas: int = 32
    smallest: int = 8
    largest: int = 20
    copies: int = 4
    clutter: float = 0.6
    seed: int = 0

    def validate(self, path: str) -> None:
        positive(self, path, "canvas", "smallest", "copies")
        positive(self, path, "seed", "clutter", zero=True)
        if not self.smallest <= self.largest <= self.canvas:
            raise ConfigError(
                f"{join(path, 'largest')}: {self.largest}; expected from smallest={self.smallest} to "
                f"canvas={self.canvas}"
            )
        if self.clutter > 1:
            raise ConfigError(f"{join(path, 'clutter')}: {self.clutter} of the light; at most 1")


class ClutteredDigits:
    """Digits on photographs: `images` [N, H, H, 1] and `foreground` [N, H, H] bool, where the digit has ink.

    The copies of a digit are one group. Everything follows from the seed.
    """

    Config = ClutteredConfig

    def __init__(self, config: ClutteredConfig):
        self.config = config

    def load(self) -> Labelled:
        """All of them, the copies of a digit one after the other."""
        digits, labels = _digits()
        photos, config = _photos(), self.config
        if config.canvas > min(min(photo.shape) for photo in photos):
            raise DataError(f"canvas {config.canvas}: the photographs have {[photo.shape for photo in photos]} pixels")
        made = [
            self._one(
                digits[i], photos, np.random.Generator(np.random.Philox(key=[config.seed, i * config.copies + c]))
            )
            for i in range(len(digits))
            for c in range(config.copies)
        ]
        images, ink = (np.stack(arrays) for arrays in zip(*made, strict=True))
        repeat = lambda array: np.repeat(array, config.copies)
        fields = {"images": images[..., None], "foreground": ink}
        return Labelled(fields, repeat(labels), CLASSES, repeat(np.arange(len(labels))))

    def _one(self, digit: np.ndarray, photos: list[np.ndarray], random: np.random.Generator):
        """(pixels, where there is ink)."""
        H = self.config.canvas
        photo = photos[random.integers(len(photos))]
        top, left = (random.integers(size - H + 1) for size in photo.shape)
        canvas = photo[top : top + H, left : left + H] * self.config.clutter
        side = int(random.integers(self.config.smallest, self.config.largest + 1))
        top, left = random.integers(H - side + 1, size=2)
        ink = np.zeros((H, H))
        ink[top : top + side, left : left + side] = resized(digit, side)
        return np.rint((canvas * (1 - ink) + ink) * 255).astype(np.uint8), ink > 0.25


def resized(image_HW: Float[np.ndarray, "H W"], side: int) -> Float[np.ndarray, "side side"]:
    """Bilinear; the outer edges of both images coincide, and what lies beyond the outermost centres is as they are."""
    rows, columns = (_weights(size, side) for size in image_HW.shape)
    return rows @ image_HW @ columns.T


def _weights(size: int, side: int) -> Float[np.ndarray, "side size"]:
    at = np.clip((np.arange(side) + 0.5) * size / side - 0.5, 0, size - 1)
    low = np.minimum(at.astype(int), size - 2)
    weights = np.zeros((side, size))
    weights[np.arange(side), low] = 1 - (at - low)
    weights[np.arange(side), low + 1] = at - low
    return weights


def _digits() -> tuple[Float[np.ndarray, "N 8 8"], np.ndarray]:
    """(ink in [0, 1], labels)."""
    found = _datasets().load_digits()
    return found.images / 16.0, found.target.astype(np.int32)


def _photos() -> list[Float[np.ndarray, "H W"]]:
    """The light of the two photographs in [0, 1]."""
    images: list[UInt8[np.ndarray, "H W 3"]] = _datasets().load_sample_images().images
    return [image @ np.array([0.299, 0.587, 0.114]) / 255 for image in images]


def _datasets():
    try:
        import sklearn.datasets
    except ImportError:
        raise MissingPackageError(
            "the images come with the package sklearn, which is not installed: `pip install 'moe-zoo[images]'`"
        ) from None
    return sklearn.datasets
