"""A ranker behind HTTP (extra ``serve``): :func:`create_app`, :func:`serve`."""

from __future__ import annotations

from ctrlib.service.app import create_app, serve
from ctrlib.service.engine import Engine, Limits

__all__ = ["Engine", "Limits", "create_app", "serve"]
