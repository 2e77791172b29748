"""The paper's command: ``torchrun --nproc_per_node=4 launch/run.py [--check] [CONFIG.yaml] [key=value …]``.

The same as ``fedsim run``; plain python and ``deepspeed --num_gpus 4`` start it too.
"""

import sys

from fedsim.commands.run import main

if __name__ == "__main__":
    sys.exit(main())
