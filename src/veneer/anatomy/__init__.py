"""Reading a base: which parts it has, and how a person names them. Changes nothing in it."""

from veneer.anatomy._anatomy import Anatomy, read
from veneer.anatomy._types import BaseFacts, Site

__all__ = ["Anatomy", "BaseFacts", "Site", "read"]
