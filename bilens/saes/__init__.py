"""Dictionaries of features: stored, published and fitted ones, what they respond to, and their cards."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
