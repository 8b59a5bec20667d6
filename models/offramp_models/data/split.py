"""Which training images are held out for calibration."""

import numpy as np
from offramp_contract.errors import DataSetError

from offramp_models.data.images import LabelledImages


def hold_out(images: LabelledImages, num_held_out: int, seed: int) -> tuple[LabelledImages, LabelledImages]:
    """Split the published training images by a seed.

    Args:
        images: All of them.
        num_held_out: How many are for calibration.
        seed: Decides which.

    Returns:
        Those to train on and those to calibrate on.

    Raises:
        DataSetError: If there are too few.
    """
    if len(images) <= num_held_out:
        raise DataSetError(f"{len(images)} training images are too few to hold {num_held_out} out for calibration")
    order_N = np.random.default_rng(seed).permutation(len(images))
    return images.rows(order_N[num_held_out:]), images.rows(order_N[:num_held_out])
