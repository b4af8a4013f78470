"""What runs on the nodes of tests/functional/test_two_nodes.py."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any


def meeting() -> None:
    """A rank without torch: it finds the first one, which prints what every one is."""
    from recipes.train.rendezvous import meet

    said, env = meet(), os.environ
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "GLOO_SOCKET_IFNAME")
    facts = {"host": socket.gethostname(), "said": said} | {name: env.get(name) for name in names}
    where = env["MASTER_ADDR"], int(env["MASTER_PORT"])
    if env["RANK"] == "0":
        everyone = [facts]
        with socket.create_server(where) as server:
            while len(everyone) < int(env["WORLD_SIZE"]):
                connection, _ = server.accept()
                with connection, connection.makefile() as file:
                    everyone.append(json.loads(file.readline()))
        print(json.dumps(sorted(everyone, key=lambda one: one["RANK"])))
        return
    while True:  # the first one may not listen yet; what cannot be reached at all is srun's time limit
        try:
            with socket.create_connection(where, timeout=60) as connection:
                connection.sendall((json.dumps(facts) + "\n").encode())
            return
        except ConnectionRefusedError:
            time.sleep(0.1)


def noted(record: dict[str, Any]) -> dict[str, Any]:
    """`data.function`: the record as it is; who read it is noted in a file of its node."""
    with Path(os.environ["NOTED_IN"]).open("a") as file:
        file.write(f"{socket.gethostname()} {record['prompt']}\n")
    return record


if __name__ == "__main__":
    sys.exit(meeting())
