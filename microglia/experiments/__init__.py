"""What is tried on a model: the demo, comparisons, ablations and calibrations, all measured through one door.

Imports nothing by itself, so that a verb loads the experiment that it runs and no other.
"""
