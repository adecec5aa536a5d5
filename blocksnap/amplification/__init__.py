"""What storage drivers cost: workloads, measuring them on each driver, and reports.

workloads    what an application does (operations, postgres, fio, packages) and the base_image that it finds
testbed      a fresh file system on a loop device of its own; volume, the baseline; machine
measure      compare(): one row a target; phases of a run, repeats as one row; result, the figures; latency
model        the copy-on-write model; analysis, a trace through it, with its report and plot; advice
crossover    the sweep that asks where block-level copy-on-write writes less, with its rule, plot and report
study        several comparisons as one JSON; baseline, two studies side by side
report       the page and its files: tables, pictures, raw_data; verdict, the conclusion in words
"""
