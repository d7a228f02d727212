"""Short for `python -m experiments.v1.table1`."""

import runpy

if __name__ == "__main__":
    runpy.run_module("experiments.v1.table1", run_name="__main__", alter_sys=True)
