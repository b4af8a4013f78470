"""The command of lm-evaluation-harness, to which the model class `gemma4_bridge` is known."""

from __future__ import annotations

import sys

from lm_eval.__main__ import cli_evaluate

import integrations.lm_eval.model  # noqa: F401 - which registers it
from bridge.errors import BridgeError


def main() -> None:
    try:
        cli_evaluate()
    except BridgeError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
