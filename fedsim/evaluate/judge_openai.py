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
"""Longest time between two collectives while rank 0's requests are under way.

It is a quarter of ``parallel.timeout_s`` where that is less, so that no collective times out while
rank 0 backs off.
"""


class OpenAiJudge(OwnJudge):
    """A model behind an endpoint that speaks OpenAI's chat protocol.

    Args:
        settings: model, address and retries.
        timeout_s: longest wait of a collective, in seconds.
    """

    def __init__(self, settings: JudgeConfig, timeout_s: float) -> None:
        self.settings = settings
        self.timeout_s = timeout_s
        # Of rank 0. It is kept between calls, as it learns which form of request is accepted.
        self._client: OpenAiClient | None = None

    @property
    def name(self) -> str:
        """The endpoint's model."""
        return self.settings.model

    def check(self, prompts: Mapping[str, JudgePrompt]) -> None:
        """See :func:`fedsim.evaluate.judge_client.check_client`."""
        check_client(self.settings)

    def judge_all(self, work: Work, what: str) -> Outcome:
        """Send the requests from rank 0; all ranks call a collective every few seconds."""
        # Rank 0 has one pool of requests; the other ranks have none.
        pools: list[RequestPool] = []
        missing = work.missing

        def poll() -> tuple[int, Outcome | None]:
            if self._client is None:
                self._client = OpenAiClient(self.settings)
            if not pools:
                pools.append(
                    RequestPool(missing, self._client.ask, work.keep, self.settings.workers),
                )
            # Seconds; see POLL_S.
            done, is_over = pools[0].wait(min(POLL_S, self.timeout_s / 4))
            if not is_over:
                return done, None
            return done, Outcome(pools[0].failure, pools[0].gave_up, self._client.news())

        # Every rank takes part in each call, until rank 0 reports the outcome.
        while True:
            done, outcome = work.ranks.once(poll)
            if work.report is not None:
                work.report(work.num_held + done, len(work.matches))
            if outcome is not None:
                return outcome
