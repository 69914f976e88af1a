"""The names that are used of vLLM are where `compat` looks for them, in every version at hand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from handlers.backends.select import TESTED_ARCHITECTURES, TESTED_VERSION
from handlers.backends.vllm import compat
from handlers.backends.vllm.compat import architectures
from handlers.errors import InvalidConfiguration
from properties.names import KEYS, PREFIX
from properties.vllm_arguments import VLLM_ARGUMENTS

OTHERS = [*map(Path, filter(None, os.environ.get("LMI_TEST_VLLM", "").split(os.pathsep)))]
"""Other versions than the one that serves: unpacked wheels, whose shared libraries are not needed."""

LOOK = Path(__file__).with_name("names_of_vllm.py")


@pytest.mark.parametrize("place", [None, *OTHERS], ids=["serving", *(place.name for place in OTHERS)])
def test_every_name_is_found(place: Path | None) -> None:
    environ = {**os.environ, "VLLM_TARGET_DEVICE": "cpu"}
    environ |= {"PYTHONPATH": os.pathsep.join(str(p) for p in (place, Path.cwd()) if p)}
    found = subprocess.run([sys.executable, "-P", str(LOOK)], env=environ, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-3000:]
    version = found.stdout.rpartition("version ")[2].strip()
    assert (version == compat.installed_version()) == (place is None)


@pytest.mark.parametrize("version", [None, "0.31.4", "0.34.0", "1.0", "dev"])
def test_a_version_outside_the_range_is_refused_with_what_to_install(version: str | None) -> None:
    with pytest.raises(InvalidConfiguration, match=r"install vllm>=0\.32,<0\.34"):
        compat.check_version(version)


@pytest.mark.parametrize("version", ["0.32.0", "0.33.1.post2", "0.33.0rc1"])
def test_a_version_inside_is_taken(version: str) -> None:
    compat.check_version(version)


def test_what_is_said_to_be_served_where_vllm_is_not_installed_is_what_the_tested_one_serves() -> None:
    version = compat.installed_version()
    if version is None or not version.startswith(f"{TESTED_VERSION}."):
        pytest.skip("another version than the tested one is installed")
    assert architectures() == TESTED_ARCHITECTURES


def test_what_is_said_to_be_vllms_option_where_it_is_not_installed_is_an_option_of_the_tested_one() -> None:
    if not str(compat.installed_version()).startswith(f"{TESTED_VERSION}."):
        pytest.skip("another version than the tested one is installed")
    ours = {key.removeprefix(PREFIX) for key in KEYS}
    assert compat.engine_argument_names() - ours == VLLM_ARGUMENTS
