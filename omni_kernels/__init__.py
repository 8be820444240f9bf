"""Exact top-k routing over N² experts from two logit vectors of length N, at the speed of memory."""

from .reference import brute_force_router, factored_router
from .router import omni_router

__all__ = ["brute_force_router", "factored_router", "omni_router"]
