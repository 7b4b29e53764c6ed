"""How training ends before its last step; apart from the loop, which takes a second to import."""

from pathlib import Path


class Interrupted(Exception):
    """Training was asked to stop and did, with everything saved; `signal` says by what."""

    def __init__(self, number: int, step: int, path: Path):
        super().__init__(f"stopped at step {step} and saved; go on with: kvcascade train --run {path} --resume")
        self.signal = number


class Diverged(Exception):
    """The loss stopped being a number."""
