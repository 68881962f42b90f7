"""All data sets by name, each from the module of its modality.

   Public: SETS, Set, Files."""

from aveb.sets import audio, image, video, audiovisual, savebench  # noqa: F401, I001 (SETS' order)
from aveb.sets.common import SETS, Files, Set

__all__ = ["SETS", "Files", "Set"]
