"""The processes of one machine talk over its loopback interface, and nobody else can reach what they listen on."""

from __future__ import annotations

import os

import pytest

from fedsim.parallel import world


@pytest.mark.parametrize(
    ("given", "chosen"),
    [
        ({}, "lo"),  # a launcher of one's own, or deepspeed
        ({"LOCAL_WORLD_SIZE": "4"}, "lo"),
        ({"LOCAL_WORLD_SIZE": "2"}, None),  # other processes are elsewhere
        ({"GLOO_SOCKET_IFNAME": "eth7"}, "eth7"),
        ({"LOCAL_WORLD_SIZE": "4", "GLOO_SOCKET_IFNAME": "eth7"}, "eth7"),
    ],
)
def test_gloo_listens_on_this_machine_alone(
    given: dict[str, str], chosen: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")  # put back afterwards
    for name in ("GLOO_SOCKET_IFNAME", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    world._stay_on_this_machine(4)
    assert os.environ.get("GLOO_SOCKET_IFNAME") == chosen
