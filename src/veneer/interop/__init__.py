"""Interop: adapters in the formats of other programs. One module a format, with `read` and `write`.

The engine finds a format by its name (`engine.FORMATS`); nothing here is imported before a folder asks for it.
"""

from ._converter import Converter, converter, converters
from ._report import ExportReport

__all__ = ["Converter", "ExportReport", "converter", "converters"]
