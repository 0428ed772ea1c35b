"""The whole job on data that ships with scikit-learn: ``python -m demo.demo``, or ``make demo``."""

import os

# torch's profiler, which counts the copies, reports its start and stop on stderr otherwise; read when torch
# loads.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")
