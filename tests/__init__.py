"""The tests, with one thread for each process unless OMP_NUM_THREADS says otherwise.

On some CPUs the number of threads changes the last bits of a convolution, and two processes of a
test must agree bit for bit. Torch reads the variable when it is imported, so it is set before.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
