"""No secret may be in a configuration, and the refusal does not repeat it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from fedsim.base.errors import ConfigError
from fedsim.config import load_config

SECRET = "hush-hush-42"


@pytest.mark.parametrize(
    "text",
    [
        f"judge.base_url=http://me:{SECRET}@host/v1",
        f"judge.base_url=http://host/v1?api-key={SECRET}",
        f"judge.base_url=http://host/v1#{SECRET}",
        f"judge.base_url={{http://me:{SECRET}@host",  # no YAML either
        f"judge.base_url={SECRET}@host",
        f"model.path=https://{SECRET}@huggingface.co/org/model",
        f"data.square=s3://key:{SECRET}@bucket/square.json",
        f"wandb.tags=[a, 'https://me:{SECRET}@host']",
        f"wandb.entity=HTTPS://me:{SECRET}@host",
        f"judge.api_key={SECRET}",
        f"OPENAI_API_KEY={SECRET}",
        f"WANDB_API_KEY={SECRET}",
        f"judge.key={SECRET}",
        f"hf_token={SECRET}",
        f"wandb.password={SECRET}",
        f"client_secret={SECRET}",
        f"local.lr=http://me:{SECRET}@host",
    ],
)
def test_a_secret_is_refused_unrepeated(text: str, tmp_path: Path) -> None:
    """On the command line, and in a file where YAML can hold it."""
    name, _, value = text.partition("=")
    with pytest.raises(ConfigError, match=rf"^{name}: ") as error:
        load_config(None, [text])
    assert (SECRET not in str(error.value) and "environment" in str(error.value)) or "export" in str(error.value)
    if "{" not in value:
        nested: object = yaml.safe_load(value)
        for part in reversed(name.split(".")):
            nested = {part: nested}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(nested), encoding="utf-8")
        with pytest.raises(ConfigError, match=rf"^{name}: ") as error:
            load_config(tmp_path / "config.yaml")
        assert SECRET not in str(error.value)


@pytest.mark.parametrize(
    "text",
    ["judge.base_url=http://localhost:8000/v1", "model.path=/models/a@b", "wandb.tags=[a@b]", "data.square=a/b@c.json",
     "eval.max_new_tokens=64", "name=token"],
)  # fmt: skip
def test_what_is_none_is_taken(text: str) -> None:
    load_config(None, [text])


def test_a_slip_still_gets_its_hint() -> None:
    with pytest.raises(ConfigError, match=r"eval\.max_new_token='?64'?: .*nearest key is eval\.max_new_tokens"):
        load_config(None, ["eval.max_new_token=64"])
