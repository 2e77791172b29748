"""Load a frozen base model and its tokenizer from a local directory, and attach LoRA.

Only local files are read, only safetensors, and no code from the model directory is run. Dropout of
the base model's own is always switched off: fedsim draws LoRA's.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from fedsim.attention.choice import CUDA_ONLY, Choice, choose
from fedsim.attention.forward import IMPLEMENTATIONS, text_names
from fedsim.base.digests import FileDigests
from fedsim.base.errors import ModelError, reason
from fedsim.base.json_text import parse_json
from fedsim.base.paths import user_path
from fedsim.base.ranks import Ranks
from fedsim.config.lora import LoraSettings
from fedsim.data.chat import ChatFormat
from fedsim.fused.choice import Fused, fuse
from fedsim.model.faults import attention_table_error, missing_tokenizer_package, names_attention
from fedsim.model.fitness import check_fitness, switch_dropout_off
from fedsim.model.quantised import check_quantised

transformers_logging.disable_progress_bar()  # fedsim shows its own progress

GIVE_TOKENIZER = "give the tokenizer that belongs to the model"
GIVE_COMPLETE = "give a complete Hugging Face model directory"
INDEX = "model.safetensors.index.json"
JSON_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    INDEX,
)
"""Files that hold a JSON object if they are there."""
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
"""Weight files that can run code, and are never read."""
EMBEDDED = Path(__file__).parents[1] / "world" / "tiny"
"""Directory of the embedded model."""
TEXTS = ("The wind carries a kite over the hill.", "Water boils at sea level.")
"""Texts on whose first tokens a loaded model is tried."""
LENGTHS = (12, 7)
"""Tokens of each text, which is repeated if it has fewer."""


@dataclass(frozen=True)
class LoadedModel:
    """A base model with LoRA attached, its chat format, and the choice of its fused layers."""

    model: PeftModel
    chat: ChatFormat
    fused: Fused = field(default_factory=Fused)

    @property
    def base(self) -> PreTrainedModel:
        """The Hugging Face model inside, LoRA layers included."""
        base = self.model.get_base_model()
        assert isinstance(base, PreTrainedModel)
        return base

    @property
    def max_positions(self) -> int:
        """The longest context that the model's configuration allows, in tokens."""
        return max_positions(self.base)


def max_positions(model: PreTrainedModel) -> int:
    """The longest context that a model's configuration allows, in tokens."""
    return int(getattr(model.config.get_text_config(), "max_position_embeddings", 1 << 30))


def model_dir(path: str) -> Path:
    """The directory that ``model.path`` or ``guard.path`` names; 'embedded' is the tiny model."""
    return EMBEDDED if path == "embedded" else user_path(path)


def load_model(
    path: str,
    lora: LoraSettings,
    *,
    dtype: str,
    attention: str,
    device: torch.device,
    key: str = "model.path",
    ranks: Ranks | None = None,
) -> LoadedModel:
    """Load a chat model, freeze it and attach LoRA (fp32, on top of base weights in ``dtype``).

    Args:
        path: directory, or 'embedded'.
        dtype: "auto" (bfloat16 on CUDA, float32 on CPU), "float32" or "bfloat16".
        attention: "auto" or a backend's name (:mod:`fedsim.attention.choice`).
        key: the configuration key to name in errors.
        ranks: all load the model and must take the same backend; None: only this process does.

    Raises:
        ModelError: the directory lacks weights, config, tokenizer or chat template, one of them is
            damaged, the model has no such LoRA target or cannot compute packed rows
            (:mod:`fedsim.model.fitness`), or the attention backend cannot be had here.
    """
    base, chat = load_base(
        path,
        dtype=dtype,
        attention=attention,
        device=device,
        key=key,
        ranks=ranks,
    )
    model = attach_lora(base, lora, key)
    return LoadedModel(model, chat, fuse(model, ranks))


def chosen_attention(
    path: str,
    *,
    dtype: str,
    attention: str,
    device: torch.device,
    key: str,
    ranks: Ranks,
) -> Choice:
    """Choose the attention backend as :func:`load_model` would, from only the configuration.

    All ranks call this.

    Raises:
        ModelError: the configuration cannot be read, or the backend cannot be had here.
    """
    config, _ = read_config(model_dir(path), key)
    return choose(attention, config, compute_dtype(dtype, device), device, ranks)


def load_base(
    path: str,
    *,
    dtype: str,
    attention: str,
    device: torch.device,
    key: str,
    ranks: Ranks | None = None,
) -> tuple[PreTrainedModel, ChatFormat]:
    """Load a frozen chat model without LoRA; arguments and errors as of :func:`load_model`."""
    # Check the files first: cheap, and with better messages than the libraries'.
    folder = check_model_dir(path, key)
    config, _ = read_config(folder, key)
    chat = load_chat(folder, key)
    weights_dtype = compute_dtype(dtype, device)
    try:
        check_quantised(config, trains=False)
    except ModelError as error:
        raise ModelError(f"{key}={str(folder)!r}: {error}") from error

    # Load the weights, and freeze them.
    choice = choose(attention, config, weights_dtype, device, ranks)
    base = _read(folder, config, key, weights_dtype, choice)
    base.requires_grad_(False)
    torch.nn.Module.to(base, device)

    # Try the model on two rows.
    embeddings = base.get_input_embeddings()
    assert isinstance(embeddings, torch.nn.Embedding)
    check_tokenizer(chat, embeddings.num_embeddings, folder, key)
    try:
        rows = [trial_row(chat, text, length) for text, length in zip(TEXTS, LENGTHS, strict=True)]
        try_fitness(base, rows, choice, trains=key != "judge.path")
    except ModelError as error:
        raise ModelError(f"{key}={str(folder)!r}: {error}") from error
    return base, chat


def try_fitness(
    base: PreTrainedModel,
    rows: list[list[int]],
    choice: Choice,
    *,
    trains: bool = True,
) -> None:
    """Check that a loaded model fits; if not, try backends that also run elsewhere than on CUDA.

    Raises:
        ModelError: it does not fit. The message names a backend with which it does, if any.
    """
    try:
        check_fitness(base, rows, trains=trains)
    except ModelError as error:
        # Is a kernel of CUDA's to blame? Then the model fits with another backend.
        if choice.name not in CUDA_ONLY:
            raise
        for name, problem in choice.tried.items():
            if problem or name in CUDA_ONLY:
                continue
            base.set_attn_implementation(IMPLEMENTATIONS[name])
            if _fits(base, rows, trains):
                advice = f"With {name} in place of {choice.name} it fits"
                raise ModelError(f"{error}. {advice}: set model.attention={name}") from error
        raise


def _fits(base: PreTrainedModel, rows: list[list[int]], trains: bool) -> bool:
    try:
        check_fitness(base, rows, trains=trains)
    except ModelError:
        return False
    return True


def trial_row(chat: ChatFormat, text: str, length: int) -> list[int]:
    """The first ``length`` tokens of a text.

    Raises:
        ModelError: the tokenizer makes no token of it.
    """
    ids = chat.tokenizer.encode(text, add_special_tokens=False)
    if not ids:
        raise ModelError(f"its tokenizer makes no tokens of {text!r}; {GIVE_TOKENIZER}")
    return (ids * length)[:length]


def read_config(folder: Path, key: str) -> tuple[PretrainedConfig, dict[str, float]]:
    """Read a model's configuration without dropout.

    It comes before the tokenizer, whose error would hide a fault of the configuration.

    Returns:
        The configuration, and the dropout rates that were switched off, by name.

    Raises:
        ModelError: it cannot be read, names an unknown architecture, or holds values that make no
            sense or ask for random routing.
    """
    try:
        config = AutoConfig.from_pretrained(
            str(folder),
            local_files_only=True,
            trust_remote_code=False,
        )
        config.get_text_config()  # ambiguous where there are several
    except Exception as error:  # of any class: each configuration checks its values in its own way
        problem = f"its config.json cannot be loaded: {reason(error)}"
        raise ModelError(f"{key}={str(folder)!r}: {problem}; {GIVE_COMPLETE}") from error
    assert isinstance(config, PretrainedConfig)
    try:
        return config, switch_dropout_off(config)
    except ModelError as error:
        raise ModelError(f"{key}={str(folder)!r}: {error}") from None


def check_tokenizer(chat: ChatFormat, num_embeddings: int, folder: Path, key: str) -> None:
    """Check that the model has an embedding of every special token that fedsim puts into rows.

    Raises:
        ModelError: it has not.
    """
    for token_id in sorted({chat.pad_id, chat.end_id}):
        if token_id >= num_embeddings:
            token = chat.tokenizer.convert_ids_to_tokens(token_id)
            raise ModelError(
                f"{key}={str(folder)!r}: the tokenizer's {token!r} is token {token_id}, but the "
                f"model has {num_embeddings} embeddings; {GIVE_TOKENIZER}"
            )


def check_report(report: dict[str, Any], folder: Path, key: str) -> None:
    """Check that transformers found every weight, in the right shape.

    It fills in random numbers for the others.

    Args:
        report: transformers' loading info.

    Raises:
        ModelError: a weight is missing or of another shape.
    """
    lacking = sorted(report["missing_keys"])
    lacking += sorted(name for name, *_ in report["mismatched_keys"])
    if lacking:
        raise ModelError(
            f"{key}={str(folder)!r}: its weight files lack {len(lacking)} tensors of the shapes "
            f"that config.json asks for, such as {lacking[0]}; {GIVE_COMPLETE}"
        )


def load_chat(folder: Path, key: str) -> ChatFormat:
    """Load the tokenizer of a model directory with its chat template, tried on probes.

    A guard's template is tried where it is used: Llama Guard 3's own is not
    (:mod:`fedsim.safety.guard_format`).

    Raises:
        ModelError: it cannot be read, names no token that ends a reply, or has no chat template
            that writes every message once, unaltered and in order.
    """
    stops = stop_ids(folder, key)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
        chat = ChatFormat(tokenizer, stops)
        if key != "guard.path":
            chat.check(trains=key == "model.path")
    except ModelError:
        raise
    except Exception as error:  # the tokenizers library raises bare exceptions
        problem = f"its tokenizer cannot be loaded: {reason(error)}"
        raise ModelError(f"{key}={str(folder)!r}: {problem}") from error
    return chat


def stop_ids(folder: Path, key: str) -> list[int]:
    """Tokens that end a reply by generation_config.json, else by config.json; they may be none.

    Raises:
        ModelError: a value is no token id.
    """
    for name in ("generation_config.json", "config.json"):
        file = folder / name
        if not file.is_file():
            continue
        content = parse_json(file.read_text(encoding="utf-8"))
        text_model = content.get("text_config")  # of a multimodal model
        named = content.get("eos_token_id")
        if named is None and isinstance(text_model, dict):
            named = text_model.get("eos_token_id")
        if named is None:
            continue
        ids = named if isinstance(named, list) else [named]
        if not all(type(i) is int and i >= 0 for i in ids):
            rule = "must be a token id or a list of them"
            fix = "correct it, or download the file again"
            raise ModelError(f"{key}: {file}'s eos_token_id is {named!r}: {rule}; {fix}")
        if ids:
            return ids
    return []


def _read(
    folder: Path,
    config: PretrainedConfig,
    key: str,
    dtype: torch.dtype,
    attention: Choice,
) -> PreTrainedModel:
    """Load the whole model, every weight from the files."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # its warnings are errors below
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(folder),
            config=config,
            dtype=dtype,
            attn_implementation=attention.implementation,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except Exception as error:  # the tokenizers library raises nothing more specific
        if names_attention(error):
            fault = attention_table_error(architecture(config))
            raise ModelError(f"{key}={str(folder)!r}: {fault}") from error
        raise ModelError(f"{key}={str(folder)!r}: cannot be loaded: {reason(error)}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    base, report = loaded
    check_report(report, folder, key)
    assert isinstance(base, PreTrainedModel)
    return base


def architecture(config: PretrainedConfig) -> str:
    """Class name of a configuration's causal language model."""
    found = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, config.model_type)
    return found if isinstance(found, str) else found[0]  # some types have several classes


def attach_lora(base: PreTrainedModel, lora: LoraSettings, key: str = "model.path") -> PeftModel:
    """Wrap ``base`` with LoRA layers on every linear text layer that ``lora.targets`` names.

    A target names all layers whose dotted names end in it. Text layers are those of the decoder
    and the LM head: no text reaches the towers of a multimodal model.

    Raises:
        ModelError: no text layer has a target's name. PEFT would skip such a target if another one
            matches.
    """
    everything = [n for n, m in base.named_modules() if isinstance(m, torch.nn.Linear)]
    text = text_names(base)
    names = [name for name in everything if re.fullmatch(text, name)]

    unknown = []
    for target in lora.targets:
        if not any(f".{name}".endswith(f".{target}") for name in names):
            unknown.append(target)
    if unknown:
        where = f"{key.partition('.')[0]}.lora_targets={list(lora.targets)}"
        known = sorted({name.rpartition(".")[2] for name in names})
        problem = f"no such layer in the model: {', '.join(unknown)}"
        raise ModelError(f"{where}: {problem}; choose from {known}")

    settings = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets),
        exclude_modules=None if len(names) == len(everything) else rf"(?!{text}$).*",
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():  # PEFT asks for an attribute that transformers has renamed
        message = ".*is_gradient_checkpointing"
        warnings.filterwarnings("ignore", message=message, category=FutureWarning)
        model = get_peft_model(base, settings)
    assert isinstance(model, PeftModel)
    return model


def model_digest(path: str, digests: FileDigests) -> str:
    """SHA-256 of a model's files (:meth:`FileDigests.model`), its name in artefact keys."""
    return digests.model(model_dir(path))


def check_model_dir(path: str, key: str) -> Path:
    """Check that a model's directory has whole config, weights and tokenizer; nothing is loaded.

    Returns:
        The directory.

    Raises:
        ModelError: it is no directory, a file in it is missing, cut short or not valid JSON, or it
            asks for code of its own, holds weights only as pickle, or is an adapter.
    """
    folder = model_dir(path)
    if not folder.is_dir():
        name = path if re.fullmatch(r"[\w.-]+/[\w.-]+", path) else "ORGANISATION/NAME"
        raise ModelError(
            f"{key}={str(folder)!r}: is not a directory; download the model and give its path "
            f"(hf download {name} --local-dir DIRECTORY; a gated one after its licence was "
            "accepted on its page, and hf auth login), or use 'embedded'"
        )
    _check_trusted_form(folder, key)

    # Files that have to be there, by any of their names.
    needed = {
        "config.json": ["config.json"],
        "weights (*.safetensors)": ["*.safetensors"],
        "tokenizer (tokenizer.json or tokenizer.model)": [
            "tokenizer.json",
            "tokenizer.model",
            "vocab.json",
        ],
    }
    for what, patterns in needed.items():
        if not any(next(folder.glob(pattern), None) for pattern in patterns):
            raise ModelError(f"{key}={str(folder)!r}: holds no {what}; {GIVE_COMPLETE}")

    # JSON files.
    for name in JSON_FILES:
        _check_json(folder / name, key)

    # Weights: opening a file reads its header, and compares that with the file's length.
    tensors: dict[str, set[str]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(str(file), "pt") as header:
                tensors[file.name] = set(header.keys())
        except (OSError, SafetensorError) as error:
            problem = f"{file} is damaged or cut short ({error})"
            raise ModelError(f"{key}: {problem}; download it again") from error
    _check_index(folder, tensors, key)

    missing = missing_tokenizer_package(folder)
    if missing is not None:
        raise ModelError(f"{key}={str(folder)!r}: {missing}")
    return folder


def _check_index(folder: Path, tensors: dict[str, set[str]], key: str) -> None:
    """Check that the weights are one file of the usual name, or shards with a fitting index.

    Args:
        tensors: names of the tensors in each file.
    """
    if "model.safetensors" in tensors:
        return
    if not (folder / INDEX).is_file():
        raise ModelError(
            f"{key}={str(folder)!r}: has {len(tensors)} weight file(s), such as {min(tensors)}, "
            f"but neither model.safetensors nor {INDEX}, by which the weights are found; "
            "download the index too"
        )
    places = parse_json((folder / INDEX).read_text(encoding="utf-8")).get("weight_map", {})
    lacking = sorted(name for name, file in places.items() if name not in tensors[file])
    if lacking:
        raise ModelError(
            f"{key}={str(folder)!r}: {INDEX} names {len(lacking)} of {len(places)} tensors that "
            f"the files do not hold, such as {lacking[0]} in {places[lacking[0]]}; download the "
            "index and the files again"
        )


def _check_trusted_form(folder: Path, key: str) -> None:
    """Check that the directory holds a model itself, in a form that cannot run code."""
    # transformers would load the adapter too, or the model that it names.
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"{key}={str(folder)!r}: is an adapter (adapter_config.json), which names another "
            "model; merge the adapter into its model, or give the model's own directory"
        )
    if any(folder.glob("*.safetensors")):
        return
    pickles: list[str] = []
    for pattern in PICKLES:
        pickles += [path.name for path in folder.glob(pattern)]
    if pickles:
        raise ModelError(
            f"{key}={str(folder)!r}: its weights are there only as pickle ({min(pickles)}), which "
            "can run code and is never read; give them as *.safetensors (transformers' "
            "save_pretrained writes them)"
        )


def _check_json(file: Path, key: str) -> None:
    """Check that a file, if it is there, holds a JSON object that asks for no code of its own."""
    if not file.is_file():
        return
    try:
        content = parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{key}: {file} is not valid JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        problem = f"must be a JSON object, is a {type(content).__name__}"
        raise ModelError(f"{key}: {file} {problem}; download it again")
    if content.get("auto_map"):
        raise ModelError(
            f"{key}: {file} asks for code of its own (auto_map), which fedsim never runs; give a "
            "model whose architecture is part of transformers, or remove auto_map where "
            "transformers knows its model_type"
        )
    if file.name == INDEX:
        _check_weight_map(file, content.get("weight_map", {}), key)


def _check_weight_map(file: Path, weight_map: Any, key: str) -> None:
    """Check that the weight files that an index names are there.

    Args:
        file: the index.
        weight_map: tensor → file, as it was read.
    """
    files: list[Any] = []
    if isinstance(weight_map, dict):
        files = list(weight_map.values())
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in files):
        problem = f"{file}'s weight_map is no mapping of tensors to files"
        raise ModelError(f"{key}: {problem}; download it again")
    named = sorted(set(files))
    lacking = [name for name in named if not (file.parent / name).is_file()]
    if lacking:
        raise ModelError(
            f"{key}={str(file.parent)!r}: {len(lacking)} of the {len(named)} weight files that "
            f"{INDEX} names are not there, such as {lacking[0]}; download them too"
        )


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type that ``model.dtype`` means on a device."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
