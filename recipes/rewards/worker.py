"""The process that computes rewards, so that a function that hangs, or ends its process, ends no training run.

A line of JSON on standard input asks, one on standard output answers; what functions print goes to standard error.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from typing import IO, Any

from bridge.errors import BridgeError
from recipes.helper_signals import unheard
from recipes.rewards.named import RewardOptions, find_rewards


def serve(requests: IO[str], replies: IO[str]) -> None:
    """Until there are no more requests: first the options, then {reward, answer, reference, where} each."""

    def reply(said: dict[str, Any]) -> None:
        replies.write(json.dumps(said) + "\n")
        replies.flush()

    said = json.loads(requests.readline())
    try:
        rewards = find_rewards(RewardOptions(**said | {"names": tuple(said["names"])}))
    except BridgeError as error:
        reply({"error": str(error)})
        return
    reply({"ready": True})
    for line in requests:
        asked = json.loads(line)
        try:
            reply({"value": rewards[asked["reward"]].of(asked["answer"], asked["reference"], asked["where"])})
        except BridgeError as error:
            reply({"error": str(error)})


def main() -> None:
    unheard()
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    with contextlib.suppress(BrokenPipeError):
        serve(sys.stdin, replies)


if __name__ == "__main__":
    main()
