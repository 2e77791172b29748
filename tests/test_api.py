"""``fedsim.simulate`` as a notebook uses it: in this process, twice, with errors as exceptions."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import matplotlib
import pandas
import pytest
import torch

import fedsim
from fedsim.api import configuration
from fedsim.base.errors import ConfigError, RunError
from fedsim.config import load_config

SMALL = Path(__file__).parent / "distributed" / "small.yaml"
BRIEF = {
    "federation": {"num_rounds": 1},
    "guard": {"kind": "none"},
    "cai.iterations": 0,
    "eval": {"every": 0, "limit": 2, "mt_bench": "", "xstest": "", "helpful": "", "hhh": "", "guard_judge": "none"},
}


def test_a_notebook_runs_a_round_and_plots_from_it(tmp_path: Path, square_file: Path) -> None:
    """The cells of a notebook, one after the other; nothing of the process is another afterwards."""
    places = {"data.square": str(square_file), "record": {"dir": str(tmp_path), "artefacts": str(tmp_path / "a")}}
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    threads, backend = torch.get_num_threads(), matplotlib.get_backend()
    deterministic = torch.are_deterministic_algorithms_enabled()
    result = fedsim.simulate(SMALL, seed=5, **BRIEF, **places)

    frame = pandas.DataFrame(result.metrics)
    (row,) = frame[frame["stage"] == "round"].to_dict("records")
    assert row["client/loss"] > 0 and result.config.seed == 5 and result.config.federation.num_rounds == 1
    items = pandas.DataFrame(result.items)
    assert set(items.columns) == {"evaluation", "figure", "item", "value"}
    means = items.groupby(["evaluation", "figure"])["value"].mean() * 100
    final = frame[(frame["stage"] == "eval") & (frame["round"] == 1)].iloc[0]
    assert means["round1-global", "advbench_harmless_gcg"] == pytest.approx(final["eval/advbench_harmless_gcg"])
    assert (result.adapter / "adapter_model.safetensors").is_file() and "# Run small" in result.summary.read_text()
    figure = matplotlib.figure.Figure()
    frame[frame["stage"] == "eval"].plot(x="round", y="eval/advbench_harmless", ax=figure.subplots())
    figure.savefig(tmp_path / "plot.png")

    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert (threads, backend) == (torch.get_num_threads(), matplotlib.get_backend())
    assert torch.are_deterministic_algorithms_enabled() is deterministic
    again = fedsim.simulate(result.config)  # it is finished: read, not run
    assert again.metrics == result.metrics
    other = fedsim.simulate(result.config, name="other")
    assert (other.adapter / "adapter_model.safetensors").read_bytes() == (
        result.adapter / "adapter_model.safetensors"
    ).read_bytes()


def test_overrides_come_after_what_is_given() -> None:
    given = {"attacks": [{"kind": "my.py:Flip", "share": 0.2}], "attacks.0.share": 0.4, "federation.num_rounds": 7}
    assert configuration(given, {}).attacks[0].share == 0.4
    changed = configuration(given, {"attacks": [{"kind": "my.py:Flip", "share": 0.3}], "federation": {"num_rounds": 2}})
    assert changed.attacks[0].share == 0.3 and changed.federation.num_rounds == 2


def test_a_mistake_is_an_exception(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"federation.algorithm='fedavgg'.*did you mean fedavg"):
        fedsim.simulate({"federation": {"algorithm": "fedavgg"}})
    with pytest.raises(ConfigError, match="seeed=1: is not a configuration key; the nearest key is seed"):
        fedsim.simulate(SMALL, seeed=1)
    config = load_config(SMALL, [f"record.dir={tmp_path}", f"record.artefacts={tmp_path / 'a'}"])
    with pytest.raises(ConfigError, match=r"nowhere.py cannot be read"):
        fedsim.simulate(config, **{"federation.algorithm": "nowhere.py:Rule"})
    assert (tmp_path / "small" / "exit.json").is_file()


def test_a_user_s_error_keeps_its_place(tmp_path: Path, square_file: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from fedsim import FedAvg\nclass Mine(FedAvg):\n    def server_step(self, state, sums):\n        return 1\n"
    )
    places = {"data.square": str(square_file), "record": {"dir": str(tmp_path), "artefacts": str(tmp_path / "a")}}
    rule: dict[str, Any] = {**BRIEF, "federation": {"num_rounds": 1, "algorithm": f"{tmp_path / 'mine.py'}:Mine"}}
    with pytest.raises(RunError, match=r"Mine.server_step must return a ServerState, not 1"):
        fedsim.simulate(SMALL, **rule, **places)


def test_public_names_are_there() -> None:
    assert all(getattr(fedsim, name) is not None for name in fedsim.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'simulat'"):
        fedsim.simulat  # noqa: B018
