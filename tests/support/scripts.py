"""People's scripts, run as they run them: by an interpreter of their own, away from this project's folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.support.shapes import ROOT


def run_script(folder: Path, text: str, *arguments: object) -> str:
    """What it printed, once it has ended well. folder: where it lies and runs."""
    script = folder / "script.py"
    script.write_text(text)
    done = subprocess.run(
        [sys.executable, str(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
