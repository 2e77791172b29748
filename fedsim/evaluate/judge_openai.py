"""An OpenAI-compatible endpoint as the judge of MT-Bench: rank 0 sends the requests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from fedsim.config import JudgeConfig
from fedsim.evaluate.judge_client import OpenAiClient, check_client
from fedsim.evaluate.judge_contract import Outcome, OwnJudge, Work
from fedsim.evaluate.judge_pool import RequestPool
from fedsim.evaluate.judge_prompts import JudgePrompt

POLL_S: Final = 5.0
"""Ranks that wait for rank 0's requests meet this often, or four times in ``parallel.timeout_s``
where that is more often: however long rank 0 backs off, no collective times out.
"""


class OpenAiJudge(OwnJudge):
    """A model behind an endpoint that speaks OpenAI's chat protocol.

    Args:
        settings: model, address, and how often it is asked.
        timeout_s: longest wait of a collective.
    """

    def __init__(self, settings: JudgeConfig, timeout_s: float) -> None:
        self.settings = settings
        self.timeout_s = timeout_s
        self._client: OpenAiClient | None = None  # rank 0's; kept, as it learns what the endpoint takes

    @property
    def name(self) -> str:
        """The endpoint's model."""
        return self.settings.model

    def check(self, prompts: Mapping[str, JudgePrompt]) -> None:
        """See :func:`fedsim.evaluate.judge_client.check_client`."""
        check_client(self.settings)

    def judge_all(self, work: Work, what: str) -> Outcome:
        """Rank 0 sends the requests; all ranks meet every few seconds."""
        pools: list[RequestPool] = []
        missing = work.missing

        def poll() -> tuple[int, Outcome | None]:
            if self._client is None:
                self._client = OpenAiClient(self.settings)
            if not pools:
                pools.append(
                    RequestPool(missing, self._client.ask, work.keep, self.settings.workers),
                )
            done, is_over = pools[0].wait(min(POLL_S, self.timeout_s / 4))
            outcome = Outcome(pools[0].failure, pools[0].gave_up, self._client.news()) if is_over else None
            return done, outcome

        while True:
            done, outcome = work.ranks.once(poll)
            if work.report is not None:
                work.report(work.num_held + done, len(work.matches))
            if outcome is not None:
                return outcome
