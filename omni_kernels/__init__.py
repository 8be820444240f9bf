"""Exact top-k routing over N² experts from two logit vectors of length N, at the speed of memory."""

from .configs import as_triton_was_imported, get_arch, get_arch_specific_configs, get_device

with as_triton_was_imported():
    from .adaptive import ExpertGroups, adaptive_router, to_csr
    from .factored import explain
    from .reference import brute_force_router, factored_router
    from .router import (
        omni_router,
        replay,
        sharded_router,
        triton_omni_router_func,
        triton_omni_router_func_optimized,
    )

__all__ = [
    "ExpertGroups",
    "adaptive_router",
    "brute_force_router",
    "explain",
    "factored_router",
    "get_arch",
    "get_arch_specific_configs",
    "get_device",
    "omni_router",
    "replay",
    "sharded_router",
    "to_csr",
    "triton_omni_router_func",
    "triton_omni_router_func_optimized",
]
