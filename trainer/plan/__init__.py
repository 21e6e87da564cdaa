"""Config → memory, time and cost of the run, without a GPU."""
