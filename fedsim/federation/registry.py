"""The one place where an algorithm's name becomes the algorithm."""

from __future__ import annotations

from collections.abc import Callable

from fedsim.config import FederationConfig, ServerOptimizerConfig
from fedsim.federation.algorithms import Algorithm, FedAvg
from fedsim.federation.baselines import Centralised, LocalOnly
from fedsim.federation.proximal import FedProx
from fedsim.federation.scaffold import Scaffold
from fedsim.federation.server_optimizers import FedAdagrad, FedAdam, FedAvgM, FedYogi

BUILDERS: dict[str, Callable[[FederationConfig, ServerOptimizerConfig], Algorithm]] = {
    "fedavg": lambda federation, server: FedAvg(),
    "fedprox": lambda federation, server: FedProx(federation.prox_mu),
    "fedavgm": lambda federation, server: FedAvgM(server),
    "fedadagrad": lambda federation, server: FedAdagrad(server),
    "fedyogi": lambda federation, server: FedYogi(server),
    "fedadam": lambda federation, server: FedAdam(server),
    "scaffold": lambda federation, server: Scaffold(federation.scaffold_correction),
    "local": lambda federation, server: LocalOnly(),
    "centralised": lambda federation, server: Centralised(),
}
"""One entry for every value that ``federation.algorithm`` may have."""


def build_algorithm(federation: FederationConfig, server_optimizer: ServerOptimizerConfig) -> Algorithm:
    """The algorithm that ``federation.algorithm`` names, with the variant that its keys choose."""
    return BUILDERS[federation.algorithm](federation, server_optimizer)
