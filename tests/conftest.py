"""What every test and every process that it starts sees; set before anything loads torch."""

import os

# No test may ask the network.
os.environ["HF_HUB_OFFLINE"] = "1"
# Threads change the last bits of a sum, and on tiny models they only wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"
