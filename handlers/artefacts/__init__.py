"""Fetches models: from a directory, the Hugging Face hub or S3 to a directory on this machine."""


class ArtefactError(Exception):
    """The model cannot be fetched; the message names it and says what to do."""


class Cancelled(Exception):
    """The download was cancelled."""
