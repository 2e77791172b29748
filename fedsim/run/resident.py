"""The model that stays in a process for a run, and everything that works on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fedsim.base.errors import CheckpointError, RunError
from fedsim.config import Config
from fedsim.data.chat import ChatFormat, TokenRow
from fedsim.data.square import SquareRow
from fedsim.federation.algorithms import Algorithm, RoundSums, ServerState, Updates, build_algorithm
from fedsim.federation.attacks import build_attacks
from fedsim.federation.attendance import Attendance, attend
from fedsim.federation.client_state import ClientStateStore
from fedsim.federation.elementwise import all_finite
from fedsim.federation.participation import Participation
from fedsim.generate.engine import Engine
from fedsim.model.flat_adapter import FlatAdapter
from fedsim.model.load import LoadedModel, load_model
from fedsim.parallel.world import World
from fedsim.run.cohort import CohortRunner
from fedsim.run.local_rows import LocalRows, local_rows
from fedsim.train.client import ClientTrainer
from fedsim.train.loop import StepSettings, Trainer
from fedsim.train.objectives import SftObjective


@dataclass(frozen=True, eq=False)
class Resident:
    """The global model and its clients, as one process holds them.

    Attributes:
        loaded: frozen base with LoRA, and its chat format.
        flat: the adapter in the model; stages load what they need into it.
        trainer: takes optimizer steps on it.
        engine: generates and scores with it, over all ranks.
        algorithm: client and server rule.
        participation: who trains in a round.
        rows: usable rows of everyone who may train, and counts of the others.
        controls: control variates of clients.
        cohorts: trains a round's clients.
    """

    loaded: LoadedModel
    flat: FlatAdapter
    trainer: Trainer
    engine: Engine
    algorithm: Algorithm
    participation: Participation
    rows: LocalRows
    controls: ClientStateStore
    cohorts: CohortRunner

    @property
    def chat(self) -> ChatFormat:
        """The model's chat format."""
        return self.loaded.chat

    @property
    def shards(self) -> list[list[TokenRow]]:
        """Usable rows of each client, or of all together."""
        return self.rows.shards

    def start(self, seed: int) -> ServerState:
        """The state before the first round, around an adapter that changes nothing."""
        return self.algorithm.start(self.flat.initial(seed))

    def to_device(self, state: ServerState) -> ServerState:
        """Move a state to the adapter's device."""
        return state.to(self.flat.values.device)

    def check(self, state: ServerState) -> None:
        """Check that a state from disk is one of this run.

        Raises:
            CheckpointError: it is not.
        """
        self.algorithm.check(state, self.flat.size)

    def step(self, state: ServerState, sums: RoundSums | Updates) -> ServerState:
        """Take the server's step.

        Raises:
            RunError: a vector is no longer finite, or is none of this algorithm's; the same on
                every rank.
        """
        # A rule may be the user's: check the type and the vectors of the state that it returns.
        name = type(self.algorithm).__name__
        after = self.algorithm.server_step(state, sums)
        if not isinstance(after, ServerState):
            raise RunError(f"{name}.server_step must return a ServerState, not {after!r:.100}")
        try:
            self.check(after)
        except CheckpointError as error:
            raise RunError(f"{name}.server_step: {error}") from error

        # Vectors must be finite.
        after = replace(after, num_steps=state.num_steps + 1)
        for vector_name, vector in after.named().items():
            if not all_finite(vector):
                raise RunError(
                    f"the server's vector {vector_name} became NaN or infinite in step "
                    f"{after.num_steps}; lower server_optimizer.lr or local.lr"
                )
        return after

    def attendance(self, round_idx: int) -> Attendance:
        """Clients that train in a round with their steps, and reasons of the others."""
        drawn = self.participation.drawn(round_idx)
        able = [client for client in drawn if self.shards[client]]
        clients = self.cohorts.trainer
        return attend(
            drawn,
            able,
            clients.num_steps,
            round_idx,
            clients.seed,
            self.cohorts.failures,
        )


def assemble(
    config: Config,
    world: World,
    shards: Sequence[Sequence[SquareRow]],
    client_state: Path,
    pass_tokens: int = 0,
) -> Resident:
    """Load the model and build trainer, engine, algorithm and cohort runner around it.

    Args:
        shards: rows of every client after the filter.
        client_state: where clients' control variates are kept.
        pass_tokens: see :class:`ClientTrainer`.

    Raises:
        DataError, ConfigError: no client could train (:func:`fedsim.run.local_rows.local_rows`).
    """
    model, federation = config.model, config.federation

    # The frozen base with LoRA, its flat adapter, and the trainer of it.
    loaded = load_model(
        model.path,
        model.lora,
        dtype=model.dtype,
        attention=model.attention,
        device=world.device,
        ranks=world.ranks,
    )
    flat = FlatAdapter(loaded.model)
    local = config.local
    steps = StepSettings(
        local.micro_batch_size,
        local.max_grad_norm,
        local.weight_decay,
        config.seed,
    )
    trainer = Trainer(loaded.base, flat, steps)

    # The algorithm's rules, and who takes part.
    algorithm = build_algorithm(federation, config.server_optimizer)
    participation = algorithm.participation(federation, config.seed)

    # Generation and scoring.
    engine = Engine(
        loaded.base,
        loaded.chat,
        world.ranks,
        batch_size=config.eval.batch_size,
        max_context=min(model.max_context, loaded.max_positions),
        seed=config.seed,
    )

    # Clients: trainer, usable rows, control variates, attackers.
    objective = SftObjective()
    num_steps = participation.num_steps(local.steps)
    clients = ClientTrainer(
        trainer,
        algorithm,
        objective,
        local,
        num_steps,
        federation.num_rounds,
        config.seed,
        pass_tokens,
    )
    rows = local_rows(config, participation, loaded.chat, shards)
    controls = ClientStateStore(client_state)
    cohorts = CohortRunner(
        world,
        clients,
        rows.shards,
        controls,
        config.failures,
        wide_lanes=config.parallel.wide_lanes,
        attacks=build_attacks(config.attacks, federation.num_clients, config.seed),
    )
    return Resident(
        loaded,
        flat,
        trainer,
        engine,
        algorithm,
        participation,
        rows,
        controls,
        cohorts,
    )
