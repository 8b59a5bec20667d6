"""How training images are varied, so that a network learns more from them than they are.

Shapes: B = images of a batch, H, W = height and width, D = channels.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Augmentation:
    """What may be done to a training image; by default nothing.

    Attributes:
        padding: The image is padded with this many black pixels at each edge, and a part of its own size cut out.
        flips: It is mirrored left to right, every second time.
    """

    padding: int = 0
    flips: bool = False

    def vary(self, pixels_BHW: Pixels, random: np.random.Generator) -> Pixels:
        """Give a variation of every image, of the same shape.

        Args:
            pixels_BHW: uint8, shape (B, H, W), or (B, H, W, D).
            random: What is drawn from; nothing is where nothing is varied.
        """
        varied_BHW = pixels_BHW
        if self.padding:
            varied_BHW = self._shifted(varied_BHW, random)
        if self.flips:
            is_flipped_B = random.random(len(varied_BHW)) < 0.5
            varied_BHW = varied_BHW.copy()
            varied_BHW[is_flipped_B] = varied_BHW[is_flipped_B][:, :, ::-1]
        return varied_BHW

    def _shifted(self, pixels_BHW: Pixels, random: np.random.Generator) -> Pixels:
        num, height, width = pixels_BHW.shape[:3]
        edges = ((0, 0), (self.padding, self.padding), (self.padding, self.padding), *[(0, 0)] * (pixels_BHW.ndim - 3))
        padded_BHW = np.pad(pixels_BHW, edges)
        tops_B, lefts_B = random.integers(0, 2 * self.padding + 1, (2, num))
        rows_BH1 = (tops_B[:, None] + np.arange(height))[:, :, None]
        columns_B1W = (lefts_B[:, None] + np.arange(width))[:, None, :]
        shifted_BHW: Pixels = padded_BHW[np.arange(num)[:, None, None], rows_BH1, columns_B1W]
        return shifted_BHW


UNVARIED: Final = Augmentation()
