"""What Megatron warns of, kept from the terminal of every command."""

from __future__ import annotations

import subprocess
import sys

COMMAND = """
import sys, warnings
from bridge import cli

def app(*_, **__):
    warnings.warn_explicit("no Transformer Engine", UserWarning, "optimizer.py", 1, module="megatron.core.optimizer")
    warnings.warn_explicit("a user's own", UserWarning, "rewards.py", 1, module="rewards")

cli.app = app
sys.argv = ["gemma4-bridge", "sync"]
cli.main()
"""


def test_every_command() -> None:
    """None has to remember it: it is the program that is silent, before a command runs."""
    done = subprocess.run([sys.executable, "-c", COMMAND], capture_output=True, text=True, check=True)
    assert "a user's own" in done.stderr
    assert "Transformer Engine" not in done.stderr
