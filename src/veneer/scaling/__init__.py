"""Scaling: the same adapters where one process is not enough. Now: training split between a server and a client."""

from veneer.scaling._split import Exchange, RemoteLinear, serve, split

__all__ = ["Exchange", "RemoteLinear", "serve", "split"]
