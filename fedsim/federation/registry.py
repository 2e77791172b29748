"""Construction of the algorithm that ``federation.algorithm`` names."""

from __future__ import annotations

from fedsim.base.errors import ConfigError
from fedsim.config import FederationConfig, ServerOptimizerConfig
from fedsim.extend import build
from fedsim.federation.algorithms import Algorithm


def build_algorithm(
    federation: FederationConfig,
    server_optimizer: ServerOptimizerConfig,
) -> Algorithm:
    """Build the algorithm that ``federation.algorithm`` names, in the variant that its keys choose.

    Raises:
        ConfigError: it cannot be loaded, or its options are wrong (:func:`fedsim.extend.build`).
    """
    # Keys of these sections that an algorithm takes as options.
    sections = {"federation": federation, "server_optimizer": server_optimizer}
    found = build("federation.algorithm", federation.algorithm, federation.options, sections)
    assert isinstance(found, Algorithm)
    if found.wants not in ("sums", "updates"):
        name = f"federation.algorithm={federation.algorithm!r}"
        raise ConfigError(f"{name}: wants={found.wants!r} must be sums or updates")
    return found
