"""The two ends that federated training lies between: a client alone, and all rows in one place.

Both are FedAvg with one participant: its adapter is the next global adapter. :mod:`fedsim.federation.participation`
says what each may spend in a round.
"""

from __future__ import annotations

from fedsim.config import FederationConfig
from fedsim.federation.algorithms import FedAvg
from fedsim.federation.participation import OneClient, Participation, Pooled


class LocalOnly(FedAvg):
    """Client ``federation.local_client`` trains alone, in every round (OpenFedLLM's ``local{i}``)."""

    def participation(self, federation: FederationConfig, seed: int) -> Participation:
        """The one client."""
        return OneClient(federation.local_client)


class Centralised(FedAvg):
    """All clients' kept rows are trained on in one place, as if there were nothing to keep apart."""

    def participation(self, federation: FederationConfig, seed: int) -> Participation:
        """One trainer with all rows and a whole cohort's steps."""
        return Pooled(federation.num_clients, federation.clients_per_round)
