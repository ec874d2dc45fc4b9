"""``python -m kvrelay.simulator.faults``: see `kvrelay.simulator.faults.run`."""

import sys

from kvrelay.simulator.faults.run import main

if __name__ == "__main__":
    sys.exit(main())
