"""What `python bench/gpu.py` measures, and how it keeps to its time.

options     the command line
programme   cells one after the other, each within its time; ends by itself
bench       what every cell shares: device, models, records
cells       which cells there are, in order of importance, and how long each may take
decoding    decode steps of one model, batch and context
library     a decode step in the library's own generate
ours        captured steps of one way
prompts     what looking at a prompt adds to reading it
training    one training step
table       what is printed last, from the records
bars        what was promised, beside what was measured
"""
