"""Check that a configuration holds no secrets, as files and logs show it.

A run writes its configuration and its command to its directory and to W&B. A value that holds a
password or a key is therefore an error before anything is written, and the error does not repeat
it.
"""

from __future__ import annotations

import re
from typing import Any, Final

from fedsim.base.errors import ConfigError

ENVIRONMENT: Final = "OPENAI_API_KEY for a judge, WANDB_API_KEY for W&B"
_WITH_PASSWORD: Final = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s?#]*@", re.IGNORECASE)
_SOUNDS_SECRET: Final = re.compile(
    r"api_?key|secret|passw|credential|(^|[_.-])(token|key)$",
    re.IGNORECASE,
)


def check_no_secret(name: str, value: Any, *, is_key: bool) -> None:
    """Check that a configuration may hold this value.

    Args:
        name: the key, as it was written.
        value: as it was written, or as YAML reads it.
        is_key: the configuration has such a key.

    Raises:
        ConfigError: an address with a user's name or password in it, or a key that is none and
            sounds like a secret's.
    """
    values = [value]
    if isinstance(value, list):
        values = value
    texts = [text for text in values if isinstance(text, str)]
    if any(_WITH_PASSWORD.search(text) for text in texts):
        raise ConfigError(
            f"{name}: must not hold an address with a user's name or password ('…@'), as the run "
            "directory keeps the configuration; take them out (keys of services are taken from "
            f"the environment: {ENVIRONMENT})",
        )

    # A number is no secret: max_new_token=64 is a mistyped key, and reported as one.
    is_number = all(text.strip().replace(".", "", 1).isdigit() for text in texts)
    if not is_key and not is_number and _SOUNDS_SECRET.search(name):
        raise ConfigError(
            f"{name}: is not a configuration key, and no secret may be in a configuration; "
            f"keys of services are taken from the environment: {ENVIRONMENT}",
        )
