"""Lookup of what a configuration names: one of fedsim's own, ``module:Name``, or
``path/to/file.py:Name``.
 :data:`KINDS` is the one table of names. Reading a configuration checks a name's form
(:func:`check_name`); code is loaded when a run is built (:func:`load`, :func:`build`).
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from fedsim.base.errors import ConfigError
from fedsim.base.paths import user_path
from fedsim.base.user_code import calling, load_module, load_target, register


@dataclass(frozen=True)
class Own:
    """One of fedsim's own.

    Attributes:
        target: ``module:Name``.
        title: as tables show it; "" = Name.
        title_key: configuration key whose value is the title instead; "" = none.
        has_cohort: an algorithm trains several clients in a round; False = a baseline with one
            participant.
        given: arguments that configuration keys give, argument → key; the others are options.
    """

    target: str
    title: str = ""
    given: Mapping[str, str] = field(default_factory=dict)
    title_key: str = ""
    has_cohort: bool = True


@dataclass(frozen=True)
class Kind:
    """What a configuration key names.

    Attributes:
        options: key of the options.
        own: fedsim's own by name.
        base: ``module:Name`` of the class that a class must derive from; "" for a function.
        takes: arguments that a function is called with, in order; the others are options.
        own_key: key that turns one of fedsim's own on, such as ``eval.{}`` with its name; "" = the
            kind's key names it.
    """

    options: str
    own: Mapping[str, Own]
    base: str = ""
    takes: tuple[str, ...] = ()
    own_key: str = ""

    @property
    def nameable(self) -> Mapping[str, Own]:
        """What of fedsim's own the kind's key can name."""
        return {} if self.own_key else self.own


_SERVER: Final = {"settings": "server_optimizer"}

KINDS: Final = {
    "federation.algorithm": Kind(
        "federation.options",
        {
            "fedavg": Own("fedsim.federation.algorithms:FedAvg"),
            "fedprox": Own(
                "fedsim.federation.proximal:FedProx",
                given={"mu": "federation.prox_mu"},
            ),
            "fedavgm": Own("fedsim.federation.server_optimizers:FedAvgM", given=_SERVER),
            "fedadagrad": Own("fedsim.federation.server_optimizers:FedAdagrad", given=_SERVER),
            "fedyogi": Own("fedsim.federation.server_optimizers:FedYogi", given=_SERVER),
            "fedadam": Own("fedsim.federation.server_optimizers:FedAdam", given=_SERVER),
            "scaffold": Own(
                "fedsim.federation.scaffold:Scaffold",
                "SCAFFOLD",
                {"variant": "federation.scaffold_correction"},
            ),
            "local": Own("fedsim.federation.algorithms:LocalOnly", "local", has_cohort=False),
            "centralised": Own(
                "fedsim.federation.algorithms:Centralised",
                "centralised",
                has_cohort=False,
            ),
        },
        base="fedsim.federation.algorithms:Algorithm",
    ),
    "federation.partition": Kind(
        "federation.partition_options",
        {
            "iid": Own("fedsim.data.partition:iid"),
            "fixed_red_share": Own("fedsim.data.partition:fixed_red_share"),
            "beta_red_share": Own(
                "fedsim.data.partition:beta_red_share",
                given={"concentration": "federation.beta_concentration"},
            ),
            "dirichlet": Own(
                "fedsim.data.partition:dirichlet",
                given={"alpha": "federation.dirichlet_alpha"},
            ),
            "quantity_skew": Own(
                "fedsim.data.partition:quantity_skew",
                given={"alpha": "federation.dirichlet_alpha"},
            ),
        },
        takes=("rows", "num_clients", "rng"),
    ),
    "attacks.kind": Kind("attacks.options", {}, base="fedsim.federation.attacks:Attack"),
    "guard.kind": Kind(
        "guard.options",
        {
            "none": Own("fedsim.safety.guard:NoGuard", "no"),
            "llama_guard": Own("fedsim.safety.guard:LlamaGuard", "guard model's"),
            "oracle": Own("fedsim.safety.guard:OracleGuard", "oracle"),
            "noisy_oracle": Own(
                "fedsim.safety.guard:NoisyOracleGuard",
                "noisy oracle",
                {"tpr": "guard.tpr", "fpr": "guard.fpr", "seed": "seed"},
            ),
        },
        base="fedsim.safety.guard:Guard",
    ),
    "eval.benchmarks.kind": Kind(
        "eval.benchmarks.options",
        {
            "advbench": Own("fedsim.evaluate.advbench:AdvBench"),
            "hhh": Own("fedsim.evaluate.hhh:Hhh"),
            "mt_bench": Own("fedsim.evaluate.mt_bench:MtBench"),
            "xstest": Own("fedsim.evaluate.over_refusal:OverRefusal"),
            "helpful": Own("fedsim.evaluate.perplexity:HelpfulPerplexity"),
        },
        base="fedsim.evaluate.benchmark:Benchmark",
        own_key="eval.{}",
    ),
    "eval.advbench_phrases": Kind(
        "eval.advbench_options",
        {
            "openfedllm": Own("fedsim.evaluate.phrases:openfedllm", "openfedllm"),
            "openfedllm-fixed": Own("fedsim.evaluate.phrases:openfedllm_fixed", "openfedllm-fixed"),
            "gcg": Own("fedsim.evaluate.phrases:gcg", "gcg"),
            "strict": Own("fedsim.evaluate.phrases:begins_with_refusal", "strict"),
            "strict_world": Own("fedsim.world:judge_reply", "strict_world"),
        },
        takes=("reply",),
    ),
    "judge.kind": Kind(
        "judge.options",
        {
            "none": Own("fedsim.evaluate.judge_contract:NoJudge", "no"),
            "openai": Own(
                "fedsim.evaluate.judge_openai:OpenAiJudge",
                given={"settings": "judge", "timeout_s": "parallel.timeout_s"},
                title_key="judge.model",
            ),
            "local": Own(
                "fedsim.evaluate.judge_local:LocalJudge",
                given={
                    "settings": "judge",
                    "model": "model",
                    "batch_size": "eval.batch_size",
                    "seed": "seed",
                },
                title_key="judge.path",
            ),
        },
        base="fedsim.evaluate.judge_contract:Judge",
    ),
}
"""The configuration keys whose value is looked up here."""


def check_name(key: str, name: str, shown: str = "") -> None:
    """Check the form of a name; nothing is loaded.

    Args:
        shown: the key as an error names it; "" = ``key``.

    Raises:
        ConfigError: it is none of fedsim's own, and not of the form place:Name.
    """
    kind = KINDS[key]
    place, _, attribute = name.rpartition(":")
    if name in kind.own and kind.own_key:
        raise ConfigError(
            f"{shown or key}={name!r}: is fedsim's own; set {kind.own_key.format(name)}",
        )
    if name not in kind.own and not (place and attribute.isidentifier()):
        own = f"one of {', '.join(kind.nameable)}, or " if kind.nameable else ""
        raise ConfigError(
            f"{shown or key}={name[:200]!r}: must be {own}module:Name, or path/to/file.py:Name"
            f"{_nearest(name, kind.nameable)}",
        )


def names_in_words(key: str) -> str:
    """What a key takes, such as ``fedavg | scaffold | module:Name | path/to/file.py:Name``."""
    return " | ".join([*KINDS[key].own, "module:Name", "path/to/file.py:Name"])


def is_own(key: str, name: str) -> bool:
    """True for a name of fedsim's own."""
    return name in KINDS[key].own


def title(key: str, name: str, config: Mapping[str, Any] | None = None) -> str:
    """A name as tables show it, such as ``FedAvg``; nothing is loaded.

    Args:
        config: dotted key → value, from which a judge of fedsim's own has its title.
    """
    own = KINDS[key].own.get(name)
    if own is not None and own.title_key and config is not None:
        return str(config[own.title_key])
    return (own.title if own is not None else "") or (own.target if own is not None else name).rpartition(":")[2]


def load(key: str, name: str) -> Any:
    """The class or function that a configuration key names.

    Raises:
        ConfigError: it cannot be found or imported, or is of another kind than the key wants.
    """
    kind = KINDS[key]
    place, _, attribute = (kind.own[name].target if name in kind.own else name).rpartition(":")
    what = f"{key}={name!r}"
    module = load_module(place, what, is_builtin=name in kind.own)
    found = getattr(module, attribute, None)
    if found is None:
        raise ConfigError(f"{what}: {place} has no {attribute}{_nearest(attribute, vars(module))}")
    if kind.base:
        base = load_target(kind.base)
        if not (isinstance(found, type) and issubclass(found, base)):
            raise ConfigError(
                f"{what}: must be a class that derives from fedsim.{base.__name__}, is {found!r:.200}",
            )
    elif not inspect.isfunction(found):
        raise ConfigError(
            f"{what}: must be a function of ({', '.join(kind.takes)}), is {found!r:.200}",
        )
    if name not in kind.own:
        register(inspect.getfile(found))  # which may be another file of its package
    return found


def build(
    key: str,
    name: str,
    options: Mapping[str, Any],
    sections: Mapping[str, Any] | None = None,
) -> Any:
    """An instance of the class that a key names, or its function, with the options filled in.

    Args:
        options: keyword arguments, checked against the signature.
        sections: of the configuration by name, from which fedsim's own take the arguments of their
            keys.

    Raises:
        ConfigError: as :func:`load`; an option that there is not, one that is missing, or a
            constructor that fails.
    """
    found = load(key, name)
    own = KINDS[key].own.get(name, Own(""))
    what, where = f"{key}={name!r}", KINDS[key].options
    for argument in own.given.keys() & options.keys():
        raise ConfigError(
            f"{where}.{argument}: {name} takes it from {own.given[argument]}; set that key",
        )
    given = {argument: functools.reduce(_part, place.split("."), sections) for argument, place in own.given.items()}
    arguments = {**given, **options}
    _check_options(found, what, where, KINDS[key].takes, arguments, own.given)
    if not isinstance(found, type):
        return functools.partial(found, **arguments)
    with calling(what, ConfigError):
        return found(**arguments)


def source_file(key: str, name: str) -> Path | None:
    """The file that a name means, of a module the one that defines the class or function; None for
    fedsim's own.
    """
    if is_own(key, name):
        return None
    place = name.rpartition(":")[0]
    if place.endswith(".py"):
        return user_path(place)
    try:
        return Path(inspect.getfile(load(key, name)))
    except TypeError as error:
        raise ConfigError(
            f"{key}={name!r}: {place} has no source file; put the code into a file",
        ) from error


def _check_options(
    found: Any,
    what: str,
    where: str,
    takes: tuple[str, ...],
    arguments: Mapping[str, Any],
    given: Mapping[str, str],
) -> None:
    """Compare options with a signature."""
    parameters = list(inspect.signature(found).parameters.values())
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    has_rest = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    if len(positional) < len(takes) and not has_rest:
        raise ConfigError(
            f"{what}: must take the arguments ({', '.join(takes)}), takes ({', '.join(p.name for p in positional)})",
        )
    called = {p.name for p in positional[: len(takes)]}
    options = {p.name: p for p in parameters if p.kind in named and p.name not in called}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    for option, value in arguments.items():
        if option not in options and not takes_any:
            known = [name for name in options if name not in given]
            rule = f"it takes {', '.join(known)}" if known else "it takes none"
            raise ConfigError(
                f"{where}.{option}={value!r:.200}: {what} has no such option; {rule}{_nearest(option, known)}",
            )
    missing = [name for name, p in options.items() if p.default is p.empty and name not in arguments]
    if missing:
        raise ConfigError(
            f"{where}.{missing[0]}: {what} needs this option; set {where}.{missing[0]}=...",
        )


def _part(whole: Any, name: str) -> Any:
    return whole[name] if isinstance(whole, Mapping) else getattr(whole, name)


def _nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""
