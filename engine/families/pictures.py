"""The front's half of every family. No torch and no transformers are imported here."""

from __future__ import annotations

from engine.families.llava_pictures import LlavaPreprocessor
from engine.families.preprocessor import Preprocessor

PREPROCESSORS: dict[str, type[Preprocessor]] = {"llava": LlavaPreprocessor}
"""config.json's `model_type` -> how its pictures are prepared. A new family is a line here and one in
`engine.loader.VISION_FAMILIES`."""
