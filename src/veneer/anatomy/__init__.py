"""Reading a base: which parts it has, how a person names them, what training it will take. Changes nothing in it."""

from veneer.anatomy._anatomy import Anatomy, read
from veneer.anatomy._select import PORTS, ROLES, Selector
from veneer.anatomy._types import BaseFacts, Site
from veneer.anatomy.forecast import Memory, memory

__all__ = ["PORTS", "ROLES", "Anatomy", "BaseFacts", "Memory", "Selector", "Site", "memory", "read"]
