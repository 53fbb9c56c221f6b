"""Install torch into the running Python: the CPU build on a machine without a GPU, when one can be had.

On Linux, plain ``pip install torch`` brings the CUDA build and gigabytes of CUDA libraries. This script asks for the
much smaller CPU build first, from the sources pip is configured with and from PyTorch's own index if it answers, and
takes the plain one when there is no other. Standard library only.
"""

import importlib.util
import platform
import shutil
import subprocess
import sys
import urllib.error
import urllib.request

TESTED = "2.13.0"  # the version this package's tests ran on
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
ANSWER_SECONDS = 5


def has_gpu() -> bool:
    """Whether an NVIDIA driver answers."""
    if shutil.which("nvidia-smi") is None:
        return False
    return subprocess.run(["nvidia-smi", "-L"], capture_output=True, check=False).stdout.startswith(b"GPU")


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=ANSWER_SECONDS):
            return True
    except (urllib.error.URLError, OSError):
        return False


def pip(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", *arguments], stderr=subprocess.PIPE, text=True, check=False
    )


def main() -> int:
    if importlib.util.find_spec("torch"):
        return 0
    attempts = [("the default build", ["torch"])]
    if platform.system() == "Linux" and not has_gpu():
        extra = [["torch", "--index-url", CPU_INDEX]] if answers(f"{CPU_INDEX}/torch/") else []
        known = [f"torch=={TESTED}+cpu", *(["--extra-index-url", CPU_INDEX] if extra else [])]
        attempts = [("the CPU build (no NVIDIA GPU here)", known), *(("the CPU build", a) for a in extra), *attempts]
    for what, arguments in attempts:
        print(f"Installing torch: {what} ...", flush=True)
        result = pip(*arguments)
        if result.returncode == 0:
            return 0
    print(result.stderr, file=sys.stderr)
    return result.returncode


if __name__ == "__main__":
    sys.exit(main())
