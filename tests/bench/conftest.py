"""Slim models are made as for the tests of what runs them."""

from tests.runtime.conftest import slim

__all__ = ["slim"]
