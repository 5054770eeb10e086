"""Pre-train a vision encoder on rendered scenes: train.py with the configuration ``pretrain``.

    python -m policy.pretrain --config-dir=config/pusht [key=value ...]

The simulator that renders the scenes is composed in train.py, which this package does not import; it is run.
"""

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    if not any(argument.startswith(("--config-name", "-cn")) for argument in sys.argv[1:]):
        sys.argv.append("--config-name=pretrain")
    runpy.run_path(str(Path(__file__).parent.parent / "train.py"), run_name="__main__")
