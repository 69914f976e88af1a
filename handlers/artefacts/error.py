"""What goes wrong with getting a model."""

from __future__ import annotations


class ArtefactError(Exception):
    """The model cannot be fetched; the message names it and says what to do."""
