"""A cache divided among devices stays divided, with a compiler and without one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["c++", "/bin/false"])
def test_two_devices(compiler):
    """Decode over rows and over heads, and products; a process has as many devices as it started with."""
    flags = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
    environment = os.environ | {"XLA_FLAGS": flags, "CXX": compiler, "JAX_PLATFORMS": "cpu"}
    child = Path(__file__).parent / "sharded.py"
    done = subprocess.run([sys.executable, child], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
