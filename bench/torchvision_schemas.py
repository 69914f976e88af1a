"""Makes torchvision's CUDA wheel importable beside a CPU build of torch, in the environment that runs this.

Nothing is done if it is importable already. torchvision's Python part registers fake kernels for operators
that only its shared library defines, and that library does not load here. Declaring the operators is enough
for vLLM, which uses only the image transforms. A .pth file does it in every process of the environment,
vLLM's children included, and only once torchvision is imported. Only for the environment of measurements.
"""

import subprocess
import sys
import sysconfig
from pathlib import Path

MODULE = """\
import importlib.abc
import sys


class _Declare(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            global _library
            _library = torch.library.Library("torchvision", "DEF")
            _library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return None


sys.meta_path.insert(0, _Declare())
"""


def importable() -> bool:
    return subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True).returncode == 0


if __name__ == "__main__" and not importable():
    site = Path(sysconfig.get_paths()["purelib"])
    (site / "_torchvision_schemas.py").write_text(MODULE)
    (site / "_torchvision_schemas.pth").write_text("import _torchvision_schemas\n")
