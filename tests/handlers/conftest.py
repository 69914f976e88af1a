"""Models are fetched from S3 by the tests of artefacts and of the offline API."""

from __future__ import annotations

from tests.support.s3 import endpoint, s3

__all__ = ["endpoint", "s3"]
