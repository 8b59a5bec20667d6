"""The one shape that data sets, networks and exits agree on."""

from typing import TypeAlias

ImageShape: TypeAlias = tuple[int, int, int]
"""Channels, height and width of an image or a feature map."""
