"""Every name builds its algorithm, with the keys that choose the variant."""

from __future__ import annotations

import torch

from fedsim.config import ALGORITHMS, FederationConfig, ServerOptimizerConfig
from fedsim.federation.algorithms import ServerState
from fedsim.federation.proximal import FedProx
from fedsim.federation.registry import BUILDERS, build_algorithm
from fedsim.federation.scaffold import GradientCorrection
from fedsim.record.paper import ALGORITHM_NAMES


def test_every_name_has_an_algorithm_and_a_title() -> None:
    assert set(BUILDERS) == set(ALGORITHMS) == set(ALGORITHM_NAMES)
    built = {name: build_algorithm(FederationConfig(algorithm=name), ServerOptimizerConfig()) for name in ALGORITHMS}
    assert len({type(algorithm) for algorithm in built.values()}) == len(ALGORITHMS)
    for name, algorithm in built.items():
        if name not in ("local", "centralised"):
            assert type(algorithm).__name__.lower() == name
        algorithm.check(algorithm.start(torch.zeros(3)), 3)


def test_keys_reach_the_algorithm() -> None:
    server = ServerOptimizerConfig(variant="reddi", lr=0.5)
    prox = build_algorithm(FederationConfig(algorithm="fedprox", prox_mu=0.25), server)
    assert isinstance(prox, FedProx) and prox.mu == 0.25
    scaffold = build_algorithm(FederationConfig(algorithm="scaffold", scaffold_correction="gradient"), server)
    state = ServerState(torch.zeros(2), {"control": torch.ones(2)})
    assert isinstance(scaffold.correction(state, None), GradientCorrection)
    for name in ("fedavgm", "fedadagrad", "fedyogi", "fedadam"):
        assert vars(build_algorithm(FederationConfig(algorithm=name), server))["settings"] is server
