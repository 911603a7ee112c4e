"""Benchmarks of every family against what people run today: `spectral-kernels bench`.

One file a family lists its cases; `case` says what a case is, `timing` how it is measured, `run`
goes through them and `report` prints. Errors against float64 come first: a case that breaks the
accuracy rule shows no speed.
"""
