"""python -m bench cpu: everything that is claimed for a CPU, beside what is promised of it."""
