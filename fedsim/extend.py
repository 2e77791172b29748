"""Lookup of classes and functions that a configuration names.

A name is that of a built-in class or function, ``module:Name``, or ``path/to/file.py:Name``.
:data:`KINDS` is the only table of names. Reading a configuration checks a name's form
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
    """A built-in class or function.

    Attributes:
        target: ``module:Name``.
        title: its name in tables; "" = Name.
        title_key: configuration key whose value is the title instead; "" = none.
        has_cohort: an algorithm trains several clients in a round; False = a baseline with one
            participant.
        given: arguments taken from configuration keys, argument → key; the others are options.
    """

    target: str
    title: str = ""
    given: Mapping[str, str] = field(default_factory=dict)
    title_key: str = ""
    has_cohort: bool = True


@dataclass(frozen=True)
class Kind:
    """The kind of class or function that a configuration key names.

    Attributes:
        options: key of the options.
        own: the built-in ones by name.
        base: ``module:Name`` of the class that a class must derive from; "" for a function.
        takes: arguments that a function is called with, in order; the others are options.
        own_key: key that turns a built-in one on, such as ``eval.{}`` with its name; "" = the
            kind's key names it.
    """

    options: str
    own: Mapping[str, Own]
    base: str = ""
    takes: tuple[str, ...] = ()
    own_key: str = ""

    @property
    def nameable(self) -> Mapping[str, Own]:
        """The built-in ones that the kind's key can name."""
        if self.own_key:
            return {}
        return self.own


_SERVER: Final = {"settings": "server_optimizer"}

KINDS: Final = {
    "federation.algorithm": Kind(
        "federation.options",
        {
            # Algorithms with a cohort.
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
            # Baselines with one participant.
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
            # The filter of the clients' rows.
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
"""Kinds by the configuration key whose value is looked up."""


def check_name(key: str, name: str, shown: str = "") -> None:
    """Check the form of a name; nothing is loaded.

    Args:
        key: one of :data:`KINDS`.
        name: its value.
        shown: the key as an error names it; "" = ``key``.

    Raises:
        ConfigError: it is neither built in nor of the form place:Name.
    """
    kind = KINDS[key]
    place, _, attribute = name.rpartition(":")
    # Keys of their own turn some of the built-in ones on.
    if name in kind.own and kind.own_key:
        raise ConfigError(
            f"{shown or key}={name!r}: is fedsim's own; set {kind.own_key.format(name)}",
        )
    if name not in kind.own and not (place and attribute.isidentifier()):
        own = ""
        if kind.nameable:
            own = f"one of {', '.join(kind.nameable)}, or "
        raise ConfigError(
            f"{shown or key}={name[:200]!r}: must be {own}module:Name, or path/to/file.py:Name"
            f"{_nearest(name, kind.nameable)}",
        )


def names_in_words(key: str) -> str:
    """Describe a key's values: ``fedavg | scaffold | module:Name | path/to/file.py:Name``."""
    return " | ".join([*KINDS[key].own, "module:Name", "path/to/file.py:Name"])


def is_own(key: str, name: str) -> bool:
    """Return whether a name is that of a built-in class or function."""
    return name in KINDS[key].own


def title(key: str, name: str, config: Mapping[str, Any] | None = None) -> str:
    """Return the title of a name in tables, such as ``FedAvg``; nothing is loaded.

    Args:
        key: one of :data:`KINDS`.
        name: its value.
        config: dotted key → value, for the title of a built-in judge; None = without it.
    """
    own = KINDS[key].own.get(name)
    # The name itself, without its file or module.
    if own is None:
        return name.rpartition(":")[2]
    if own.title_key and config is not None:
        return str(config[own.title_key])
    if own.title:
        return own.title
    return own.target.rpartition(":")[2]


def load(key: str, name: str) -> Any:
    """Load the class or function that a configuration key names.

    Raises:
        ConfigError: it cannot be found or imported, or is not of the kind that the key needs.
    """
    kind = KINDS[key]
    what = f"{key}={name!r}"

    # Import its module, or run its file.
    is_builtin = name in kind.own
    target = name
    if is_builtin:
        target = kind.own[name].target
    place, _, attribute = target.rpartition(":")
    module = load_module(place, what, is_builtin=is_builtin)
    found = getattr(module, attribute, None)
    if found is None:
        raise ConfigError(f"{what}: {place} has no {attribute}{_nearest(attribute, vars(module))}")

    # Check its kind: a class with the right base, or a function.
    if kind.base:
        base = load_target(kind.base)
        if not (isinstance(found, type) and issubclass(found, base)):
            rule = f"must be a class that derives from fedsim.{base.__name__}"
            raise ConfigError(f"{what}: {rule}, is {found!r:.200}")
    elif not inspect.isfunction(found):
        raise ConfigError(
            f"{what}: must be a function of ({', '.join(kind.takes)}), is {found!r:.200}",
        )

    # The code's own file is part of the run's record; it may be another file of its package.
    if not is_builtin:
        try:
            register(inspect.getfile(found))
        except (TypeError, OSError) as error:  # such as a class of a notebook's cell
            fix = "put the code into a file"
            raise ConfigError(f"{what}: {place} has no source file; {fix}") from error
    return found


def build(
    key: str,
    name: str,
    options: Mapping[str, Any],
    sections: Mapping[str, Any] | None = None,
) -> Any:
    """Instantiate the class that a key names, or bind its function's options.

    Args:
        key: one of :data:`KINDS`.
        name: its value.
        options: keyword arguments, checked against the signature.
        sections: of the configuration by name, from which built-in classes take arguments
            (:attr:`Own.given`).

    Raises:
        ConfigError: as of :func:`load`; an unknown option, a missing one, or a constructor that
            fails.
    """
    found = load(key, name)
    own = KINDS[key].own.get(name, Own(""))
    what, where = f"{key}={name!r}", KINDS[key].options
    for argument in own.given.keys() & options.keys():
        raise ConfigError(
            f"{where}.{argument}: {name} takes it from {own.given[argument]}; set that key",
        )

    # Arguments from the configuration's own keys, such as ``federation.prox_mu``, then the options.
    arguments: dict[str, Any] = {}
    for argument, place in own.given.items():
        arguments[argument] = functools.reduce(_part, place.split("."), sections)
    arguments |= options
    _check_options(found, what, where, KINDS[key].takes, arguments, own.given)
    if not isinstance(found, type):
        return functools.partial(found, **arguments)
    with calling(what, ConfigError):
        return found(**arguments)


def source_file(key: str, name: str) -> Path | None:
    """Find the file of the code that a name selects; None for built-in code.

    Of a module it is the file that defines the class or function.
    """
    if is_own(key, name):
        return None
    # A file by its path, or the source file of a module.
    place = name.rpartition(":")[0]
    if place.endswith(".py"):
        return user_path(place)
    return Path(inspect.getfile(load(key, name)))


def _check_options(
    found: Any,
    what: str,
    where: str,
    takes: tuple[str, ...],
    arguments: Mapping[str, Any],
    given: Mapping[str, str],
) -> None:
    """Compare options with a signature.

    Args:
        found: class or function.
        what: its key and name, for errors.
        where: key of the options, for errors.
        takes: positional arguments of every call.
        arguments: all keyword arguments.
        given: those of them that are no options.

    Raises:
        ConfigError: too few positional arguments, an unknown option, or a missing one.
    """
    # The signature's positional arguments must take those of every call.
    parameters = list(inspect.signature(found).parameters.values())
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    has_rest = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    if len(positional) < len(takes) and not has_rest:
        taken = ", ".join(p.name for p in positional)
        raise ConfigError(
            f"{what}: must take the arguments ({', '.join(takes)}), takes ({taken})",
        )

    # All other named arguments are options; one without a default is needed.
    called = {p.name for p in positional[: len(takes)]}
    options = {p.name: p for p in parameters if p.kind in named and p.name not in called}
    # A signature with **kwargs takes any option.
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    for option, value in arguments.items():
        if option not in options and not takes_any:
            known = [name for name in options if name not in given]
            rule = "it takes none"
            if known:
                rule = f"it takes {', '.join(known)}"
            rule += _nearest(option, known)
            raise ConfigError(
                f"{where}.{option}={value!r:.200}: {what} has no such option; {rule}",
            )
    for option, parameter in options.items():
        if parameter.default is parameter.empty and option not in arguments:
            raise ConfigError(
                f"{where}.{option}: {what} needs this option; set {where}.{option}=...",
            )


def _part(whole: Any, name: str) -> Any:
    """Part of the configuration: a section by name, or a key of a section."""
    if isinstance(whole, Mapping):
        return whole[name]
    return getattr(whole, name)


def _nearest(name: str, known: Any) -> str:
    """Suggest a similar name for an error; "" if there is none."""
    close = difflib.get_close_matches(name, list(known), n=1)
    if not close:
        return ""
    return f"; did you mean {close[0]}?"
