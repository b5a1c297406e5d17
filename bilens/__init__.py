"""bilens: hooked bilinear transformers and the circuits in their weights.

The names are listed in `__init__.pyi`, the table of contents; each is imported when it is first used.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__version__ = "0.1.0"
