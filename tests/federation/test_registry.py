"""Every name builds its algorithm, with the keys that choose the variant."""

from __future__ import annotations

import pytest
import torch

from fedsim.base.errors import ConfigError
from fedsim.config import FederationConfig, ServerOptimizerConfig
from fedsim.extend import KINDS, title
from fedsim.federation.algorithms import ServerState, build_algorithm
from fedsim.federation.proximal import FedProx
from fedsim.federation.scaffold import GradientCorrection

NAMES = list(KINDS["federation.algorithm"].own)


def test_every_name_has_an_algorithm_and_a_title() -> None:
    built = {name: build_algorithm(FederationConfig(algorithm=name), ServerOptimizerConfig()) for name in NAMES}
    assert len({type(algorithm) for algorithm in built.values()}) == len(NAMES)
    for name, algorithm in built.items():
        assert title("federation.algorithm", name).lower() == name
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


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("fedavg", {"mu": 1}, "federation.options.mu=1: .*'fedavg' has no such option; it takes none"),
        ("fedprox", {"mu": 1}, "federation.options.mu: fedprox takes it from federation.prox_mu; set that key"),
    ],
)
def test_fedsim_s_own_take_no_options_beside_their_keys(name: str, options: dict[str, int], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build_algorithm(FederationConfig(algorithm=name, options=options), ServerOptimizerConfig())
