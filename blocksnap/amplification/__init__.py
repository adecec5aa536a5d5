"""What storage drivers cost: workloads, measuring them on each driver, and reports.

workloads    what an application does, and the image it finds; operations is what its process runs
testbed      a fresh file system on a loop device of its own; volume, the baseline; machine
measure      compare(): one row a driver and block size; result, the figures
model        the copy-on-write model; analysis, a trace through it, with its report and plot; advice
report       table, JSON, CSV, plot, HTML; verdict, the conclusion in words
"""
