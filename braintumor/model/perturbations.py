"""What happens to slices on their way to a model, at four severities each.

An image's draw depends on the seed and on its own pixels alone, so that its place among others changes nothing. All
severities share it: a stronger noise is the weaker one, enlarged.
"""

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Images = NDArray[np.uint8]

WHITE = 255
BIAS_ORDER = 3


@dataclass(frozen=True)
class Perturbation:
    """One kind of change to grey images (height, width); a severity of 0 changes nothing."""

    unit: str
    severities: tuple[float, ...]
    change: Callable[[NDArray[np.float64], float, np.random.Generator], NDArray[np.float64]]

    def apply(self, images: Images, severity: float, seed: int) -> Images:
        """The images (n, height, width, 1), changed."""
        if severity == 0:
            return images.copy()
        changed = np.empty_like(images)
        for index, image in enumerate(images[..., 0]):
            random = np.random.default_rng((seed, content_seed(image)))
            values = self.change(image.astype(np.float64), severity, random)
            changed[index, ..., 0] = np.rint(values.clip(0, WHITE))
        return changed


def content_seed(image: NDArray[np.uint8]) -> int:
    """A number that the image's pixels alone decide."""
    return int.from_bytes(hashlib.blake2b(np.ascontiguousarray(image).tobytes(), digest_size=8).digest(), "big")


def _add_noise(image: NDArray[np.float64], severity: float, random: np.random.Generator) -> NDArray[np.float64]:
    """Rician, as the magnitude of a complex signal has it (Gudbjartsson & Patz, MRM 1995)."""
    real, imaginary = random.normal(size=(2, *image.shape)) * severity
    return np.hypot(image + real, imaginary)


def _blur(image: NDArray[np.float64], severity: float, random: np.random.Generator) -> NDArray[np.float64]:
    from scipy.ndimage import gaussian_filter

    return np.asarray(gaussian_filter(image, severity / 100 * max(image.shape), mode="nearest"))


def _apply_bias_field(image: NDArray[np.float64], severity: float, random: np.random.Generator) -> NDArray[np.float64]:
    """A smooth gain, the exponential of a random polynomial (Van Leemput et al., IEEE TMI 1999)."""
    rows, columns = np.meshgrid(*(np.linspace(-1, 1, size) for size in image.shape), indexing="ij")
    powers = [(row, column) for row in range(BIAS_ORDER + 1) for column in range(BIAS_ORDER + 1 - row) if row + column]
    field = np.sum([random.uniform(-1, 1) * rows**row * columns**column for row, column in powers], axis=0)
    # Where it shows: a gain in a black corner would change nothing.
    largest = np.abs(field[image >= image.mean()]).max()
    return np.asarray(image * 2 ** (severity * field / largest))


def _change_contrast(image: NDArray[np.float64], severity: float, random: np.random.Generator) -> NDArray[np.float64]:
    return np.asarray(WHITE * (image / WHITE) ** (2.0 ** (severity * random.choice([-1, 1]))))


def _compress(image: NDArray[np.float64], severity: float, random: np.random.Generator) -> NDArray[np.float64]:
    stored = io.BytesIO()
    Image.fromarray(image.astype(np.uint8)).save(stored, "JPEG", quality=round(100 - severity))
    return np.asarray(Image.open(stored), np.float64)


def _shift(image: NDArray[np.float64], severity: float, random: np.random.Generator) -> NDArray[np.float64]:
    from scipy.ndimage import shift

    angle = random.uniform(0, 2 * np.pi)
    offset = severity / 100 * max(image.shape) * np.array([np.sin(angle), np.cos(angle)])
    return np.asarray(shift(image, offset, order=1))


def _rotate(image: NDArray[np.float64], severity: float, random: np.random.Generator) -> NDArray[np.float64]:
    from scipy.ndimage import rotate

    return np.asarray(rotate(image, severity * random.choice([-1, 1]), reshape=False, order=1))


PERTURBATIONS = {
    "noise": Perturbation("standard deviation, of 255 grey levels", (5, 10, 20, 40), _add_noise),
    "blur": Perturbation("standard deviation, % of the side", (0.5, 1, 2, 4), _blur),
    "bias field": Perturbation("largest gain, as a power of 2", (0.25, 0.5, 1, 1.5), _apply_bias_field),
    "contrast": Perturbation("exponent, as a power of 2", (0.25, 0.5, 1, 1.5), _change_contrast),
    "JPEG": Perturbation("100 - quality", (50, 70, 85, 95), _compress),
    "shift": Perturbation("% of the side", (2, 5, 10, 20), _shift),
    "rotation": Perturbation("degrees", (5, 10, 20, 40), _rotate),
}
