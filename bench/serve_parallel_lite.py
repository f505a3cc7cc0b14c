"""The handlers of serve_lite.py on one replica: `serve_parallel_lite.py HANDLER ...`.

What follows the handler's name goes to kserve-lite's own command line: parallel.py says
which Ray cluster to join.
"""

from __future__ import annotations

import sys

from serve_lite import HANDLERS

from kserve_lite import Model, run

if __name__ == "__main__":
    model = Model("echo", replicas=1)
    model.predict(HANDLERS[sys.argv.pop(1)])
    run(model)
